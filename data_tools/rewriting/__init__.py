"""Finding and replacing what captions say: objects, attributes and relations, for UNIMO's views of a caption.

``wordlists`` and ``lexicon`` know words, ``chunker`` (or ``spacy_parser``) turns a caption into the ``Analysis`` of
``graph``, ``vocabulary`` counts a corpus, ``meanings`` says which replacements would still be true, ``replacing`` makes
the others, ``back_translation`` and ``neighbours`` work on whole sentences.
"""

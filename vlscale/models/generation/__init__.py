"""Generation of texts with a cache of keys and values: greedy, by beam search, by sampling.

``search.py`` is the entry and ``settings.py`` its arguments; ``captions.py`` and ``sources.py`` make what texts are
generated from, ``decoder.py`` and ``cache.py`` run the model, ``rules.py`` and ``ngrams.py`` say what may come next,
``loop.py``, ``official.py`` and ``pooled.py`` are the searches.
"""

from vlscale.models.generation.captions import caption_batch
from vlscale.models.generation.result import Generated
from vlscale.models.generation.search import generate
from vlscale.models.generation.settings import GenerationSettings

__all__ = ["Generated", "GenerationSettings", "caption_batch", "generate"]

"""WordPiece for the demo: trained on the captions, or any Hugging Face vocabulary by path."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from data_tools.tokenizers import canonical
from vlscale.data.schema import SPECIAL_TOKENS, Vocabulary
from vlscale.errors import VlscaleError

_SPECIAL = tuple(SPECIAL_TOKENS.values())
_MAX_BYTES = 64 << 20
_UNUSED = re.compile(r"\[unused\d+\]")


@dataclass(frozen=True)
class WordPieces:
    """A tokenizer, its vocabulary as the stores keep it, and its file (``tokenizer.json``) as text."""

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    json: str

    def encode(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Return, per text, the ids without [CLS] and [SEP], and the characters [start, end) of each token."""
        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [(item.ids, item.offsets) for item in encoded]


def _assemble(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(WordPiece(vocab, unk_token=SPECIAL_TOKENS["unk"]))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    return tokenizer


def _finish(tokenizer: Tokenizer, where: str) -> WordPieces:
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise VlscaleError(f"{where}: token ids are not 0..{len(tokens) - 1} without gaps; use the published file")
    missing = [token for token in _SPECIAL if token not in vocab]
    if missing:
        raise VlscaleError(f"{where}: no {', '.join(missing)}; a BERT-style WordPiece vocabulary is needed")
    # A random replacement must be a word: [unused] slots and special tokens stand at the head of BERT's files.
    head = max(i for i, token in enumerate(tokens) if token in _SPECIAL or _UNUSED.fullmatch(token))
    low = head + 1 if head + 1 < len(tokens) else 0
    text = tokenizer.to_str(pretty=False)
    digest = hashlib.sha256(canonical(tokenizer, tokens)).hexdigest()
    vocabulary = Vocabulary.from_tokens(tokens, random_range=(low, len(tokens)), fingerprint=digest)
    return WordPieces(tokenizer, vocabulary, text)


def train_wordpieces(texts: Iterable[str]) -> WordPieces:
    """Train WordPiece on captions and keep the pieces that they use.

    The captions have so few words that each becomes one piece. Letters and half words that no caption is split into
    are dropped: they would only be wrong answers for a masked word. So a word that training never saw is [UNK].
    Pieces are numbered alphabetically, which makes the result independent of the trainer's internal order.
    """
    texts = list(texts)
    tokenizer = _assemble({token: i for i, token in enumerate(_SPECIAL)}, lowercase=True)
    trainer = WordPieceTrainer(vocab_size=30000, min_frequency=1, special_tokens=list(_SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    used = {token for item in tokenizer.encode_batch(texts, add_special_tokens=False) for token in item.tokens}
    kept = list(_SPECIAL) + sorted(used - set(_SPECIAL))
    final = _assemble({token: i for i, token in enumerate(kept)}, lowercase=True)
    final.add_special_tokens(list(_SPECIAL))
    return _finish(final, "trained vocabulary")


def load_wordpieces(path: Path) -> WordPieces:
    """Read ``tokenizer.json`` or ``vocab.txt``: the file itself, or a Hugging Face folder that holds one of them.

    ``vocab.txt`` is taken as cased where ``tokenizer_config.json`` beside it says so, else where it has capitals.

    Raises:
        VlscaleError: nothing there, too large, not a tokenizer, or without the five special tokens.
    """
    path = Path(path)
    found = [path] if path.is_file() else [path / name for name in ("tokenizer.json", "vocab.txt")]
    file = next((candidate for candidate in found if candidate.is_file()), None)
    if file is None:
        raise VlscaleError(f"--vocab {path}: neither tokenizer.json nor vocab.txt there; give a file or its folder")
    if file.stat().st_size > _MAX_BYTES:
        raise VlscaleError(f"--vocab {file}: larger than {_MAX_BYTES >> 20} MiB; that is no vocabulary")
    try:
        if file.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return _finish(tokenizer, str(file))
        tokens = file.read_text(encoding="utf-8").split("\n")
    except VlscaleError:
        raise
    except Exception as error:
        raise VlscaleError(f"--vocab {file}: cannot be read as a tokenizer ({error}); use the published file") from None
    tokens = [token.rstrip("\r") for token in tokens]
    while tokens and not tokens[-1]:
        tokens.pop()
    if len(set(tokens)) != len(tokens):
        raise VlscaleError(f"--vocab {file}: a token stands on two lines; use the published file")
    tokenizer = _assemble({token: i for i, token in enumerate(tokens)}, _is_lowercase(file, tokens))
    tokenizer.add_special_tokens([token for token in _SPECIAL if token in tokens])
    return _finish(tokenizer, str(file))


def _is_lowercase(vocab: Path, tokens: list[str]) -> bool:
    config = vocab.parent / "tokenizer_config.json"
    if config.is_file() and config.stat().st_size <= _MAX_BYTES:
        try:
            told = json.loads(config.read_text(encoding="utf-8")).get("do_lower_case")
        except (ValueError, AttributeError) as error:
            raise VlscaleError(f"{config}: not a JSON object ({error}); restore or remove it") from None
        if isinstance(told, bool):
            return told
    return not any(token != token.lower() and not token.startswith("[") for token in tokens)

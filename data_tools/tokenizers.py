"""Tokenizers by path: WordPiece and byte-level BPE through ``tokenizers``, SentencePiece through ``sentencepiece``.

Special tokens that stand in a text as words ("[MASK]") are split as ordinary words, so no text can smuggle one in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel

from vlscale.data.schema import SPECIAL_TOKENS, Vocabulary
from vlscale.errors import VlscaleError

ROLES: dict[str, tuple[str, ...]] = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
"""Names that BERT's, ALBERT's, XLNet's and RoBERTa's vocabularies give the special roles, most telling first."""

MAX_BYTES = 64 << 20
FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""What a folder may hold, in the order in which they are looked for."""
UNIMO = ("encoder.json", "vocab.bpe", "vocab.txt")
"""What a folder of UNIMO's vocabulary holds, all three."""
_NO_WORD = re.compile(r"\[unused\d+\]|<unused\d+>|madeupword\d+|<extra_id_\d+>|<\|endoftext\|>")


class FastTokenizer:
    """A tokenizer of the ``tokenizers`` library.

    Args:
        tokenizer: the tokenizer; truncation and padding are switched off.
        text: content of its ``tokenizer.json``.
        where: its file, for errors.

    Raises:
        VlscaleError: its ids have gaps, or a special token is missing.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, where: str) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._text = text
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        tokens = sorted(vocab, key=vocab.__getitem__)
        if [vocab[token] for token in tokens] != list(range(len(tokens))):
            raise VlscaleError(f"{where}: token ids are not 0..{len(tokens) - 1} without gaps; use the published file")
        self.vocabulary = vocabulary_of(tokens, canonical(tokenizer, tokens), where)
        self._needs_space = _drops_word_starts(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_many(self, texts: Sequence[str], following: bool = False) -> list[list[int]]:
        """Return the ids of several texts.

        Args:
            texts: the texts.
            following: each comes after another text and a space, which byte-level BPE tells apart from a beginning.
        """
        if following and self._needs_space:
            texts = [f" {text}" for text in texts]
        return [item.ids for item in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    @property
    def marks_following(self) -> bool:
        """A text has other ids after another text than alone."""
        return self._needs_space

    def to_json(self) -> str | None:
        """Content of ``tokenizer.json``."""
        return self._text


FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3 around a plain SentencePiece model, as fairseq and XLM-R number them; <mask> follows the last piece."""
_PLAIN = ("<unk>", "<s>", "</s>")
"""What a SentencePiece model begins with where its trainer was told nothing else: no padding, no mask."""


class PieceTokenizer:
    """A SentencePiece model.

    One that has neither <pad> nor <mask> (XLM-R's, and those trained with the library's defaults) is numbered as
    fairseq does: :data:`FAIRSEQ`, the pieces behind the model's own <unk>, <s> and </s>, and <mask>.

    Args:
        model: content of its file.
        where: its file, for errors.

    Raises:
        VlscaleError: it is damaged, or a special token is missing.
    """

    marks_following = False

    def __init__(self, model: bytes, where: str) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise VlscaleError(f"{where}: {error}; pip install 'vlscale[import]'") from None
        self._pieces: Any = SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(model)
            tokens = [self._pieces.IdToPiece(index) for index in range(self._pieces.GetPieceSize())]
        except (RuntimeError, OSError, ValueError, TypeError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise VlscaleError(f"{where}: cannot be read as a SentencePiece model ({reason})") from None
        self._fairseq = tuple(tokens[: len(_PLAIN)]) == _PLAIN and not {"<pad>", "<mask>"} & {*tokens}
        if self._fairseq:
            tokens = [*FAIRSEQ, *tokens[len(_PLAIN) :], "<mask>"]
            model += b"fairseq"  # the same file, other ids
        self.vocabulary = vocabulary_of(tokens, model, where)  # a file that no library ever writes anew

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ids: list[int] = self._pieces.EncodeAsIds(text)
        if self._fairseq:
            unknown = FAIRSEQ.index("<unk>")
            ids = [index + 1 if index >= len(_PLAIN) else unknown for index in ids]
        return ids

    def encode_many(self, texts: Sequence[str], following: bool = False) -> list[list[int]]:
        """Return the ids of several texts; a text has the same ids wherever it stands."""
        return [self.encode(text) for text in texts]

    def to_json(self) -> str | None:
        """There is no ``tokenizer.json``."""
        return None


AnyTokenizer = FastTokenizer | PieceTokenizer


def load_tokenizer(path: Path) -> AnyTokenizer:
    """Read a tokenizer.

    Args:
        path: ``tokenizer.json``; ``vocab.txt`` (WordPiece; cased where ``tokenizer_config.json`` beside it says so,
            else where it has capitals); ``vocab.json`` with ``merges.txt`` beside it (byte-level BPE); a SentencePiece
            ``.model``; or a folder that holds one of them, or UNIMO's ``encoder.json``, ``vocab.bpe``, ``vocab.txt``.

    Raises:
        VlscaleError: nothing there, too large, damaged, or without the five special tokens.
    """
    path = Path(path)
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise VlscaleError(f"--tokenizer {path}: no such file, or a folder without any of {', '.join(FILES)}")
    if file.suffix == ".model":
        return PieceTokenizer(_read(file), str(file))
    try:
        assembled = _assembler(file)
        if assembled is not None:
            tokenizer = assembled(file)
            return FastTokenizer(tokenizer, tokenizer.to_str(pretty=False), str(file))
        text = _read(file).decode("utf-8")
        return FastTokenizer(Tokenizer.from_str(text), text, str(file))
    except VlscaleError:
        raise
    except Exception as error:  # the library raises plain Exception
        reason = " ".join(str(error).split())[:200]
        raise VlscaleError(
            f"--tokenizer {file}: cannot be read as a tokenizer ({reason}); use the published file"
        ) from None


def _assembler(file: Path) -> Callable[[Path], Tokenizer] | None:
    """What makes a tokenizer of a vocabulary that is no ``tokenizer.json``."""
    if all(file.with_name(name).is_file() for name in UNIMO) and file.name in UNIMO:
        return _unimo
    if file.name.endswith("vocab.json"):
        return _byte_level
    return _wordpiece if file.suffix == ".txt" else None


_DECIDE_IDS = (
    *("type", "lowercase", "strip_accents", "clean_text", "handle_chinese_chars", "add_prefix_space", "use_regex"),
    *("pattern", "Regex", "String", "content", "behavior", "invert", "normalizers", "pretokenizers", "prepend"),
    *("replacement", "prepend_scheme", "split", "individual_digits", "strip_left", "strip_right", "left", "right"),
    *("precompiled_charsmap", "delimiter", "unk_token", "unk_id", "continuing_subword_prefix", "end_of_word_suffix"),
    *("max_input_chars_per_word", "fuse_unk", "byte_fallback", "ignore_merges"),
)
"""Settings of normalizers, pre-tokenizers and models that change the ids of a text. A fixed list: what a later release
of the library writes besides must not change the fingerprint."""


def canonical(tokenizer: Tokenizer, tokens: Sequence[str]) -> bytes:
    """Spell out what decides the ids of a text, the same for every file and release that gives the same ids.

    That is the tokens in the order of their ids, the model's type, merges or scores, and the settings of model,
    normalizer and pre-tokenizer; not the file's layout, decoder, templates, truncation or padding.

    Args:
        tokenizer: the tokenizer.
        tokens: in the order of their ids.
    """
    told = json.loads(tokenizer.to_str(pretty=False))
    model = told["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
    scores = [score for _, score in model["vocab"]] if isinstance(model["vocab"], list) else []
    own = {token for token, _ in model["vocab"]} if scores else set(model["vocab"])
    facts = {
        "tokens": list(tokens),
        "added": sorted(each["content"] for each in told.get("added_tokens") or [] if each["content"] not in own),
        "merges": merges,
        "scores": scores,
        "model": _settings(model),
        "normalizer": _settings(told.get("normalizer")),
        "pre_tokenizer": _settings(told.get("pre_tokenizer")),
    }
    return json.dumps(facts, sort_keys=True).encode()


def _settings(value: Any) -> Any:
    """The settings of :data:`_DECIDE_IDS` that are on; off, empty and left out are the same."""
    if isinstance(value, list):
        return [_settings(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "BertNormalizer" and value.get("strip_accents") is None:
        value = {**value, "strip_accents": value.get("lowercase")}  # which is what the library does then
    found = {key: _settings(value[key]) for key in _DECIDE_IDS if key in value}
    return {key: each for key, each in found.items() if each is not None and each is not False and each != ""}


def vocabulary_of(tokens: Sequence[str], content: bytes, where: str) -> Vocabulary:
    """Describe a token list: special roles by their usual names, and the ids that a random word may have.

    Random words come from the longest run of ids without special or unused tokens: [106, V) of BERT's cased vocabulary,
    [4, 50260) of RoBERTa's.

    Args:
        tokens: in the order of their ids.
        content: what decides the ids of a text, spelled canonically; its sha256 is the fingerprint.
        where: the file, for errors.

    Raises:
        VlscaleError: a special token is missing, or a token stands twice.
    """
    known = set(tokens)
    special: dict[str, str] = {}
    for role in SPECIAL_TOKENS:
        found = next((name for name in ROLES[role] if name in known), None)
        if found is None:
            raise VlscaleError(
                f"{where}: has no {role} token ({' or '.join(ROLES[role])}) among {len(tokens)} tokens; models "
                f"need one: use the published tokenizer.json, or train one with data_tools.train_tokenizer"
            )
        special[role] = found
    names = {name for candidates in ROLES.values() for name in candidates}
    try:
        return Vocabulary.from_tokens(
            tokens, _longest_run(tokens, names), special, fingerprint=hashlib.sha256(content).hexdigest()
        )
    except VlscaleError as error:
        raise VlscaleError(f"{where}: {error}") from None


def _longest_run(tokens: Sequence[str], names: set[str]) -> tuple[int, int]:
    best, begin = (0, 0), 0
    for index, token in enumerate([*tokens, "[PAD]"]):
        if token in names or _NO_WORD.fullmatch(token):
            if index - begin > best[1] - best[0]:
                best = (begin, index)
            begin = index + 1
    return best if best[1] else (0, len(tokens))


def wordpiece(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    """Assemble BERT's tokenizer around a vocabulary."""
    tokenizer = Tokenizer(WordPiece(vocab, unk_token=SPECIAL_TOKENS["unk"], max_input_chars_per_word=100))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS.values() if token in vocab])
    return tokenizer


def byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Assemble RoBERTa's tokenizer around a vocabulary."""
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([name for names in ROLES.values() for name in names if name in vocab])
    return tokenizer


def _wordpiece(file: Path) -> Tokenizer:
    tokens = [token.rstrip("\r") for token in _read(file).decode("utf-8").split("\n")]
    while tokens and not tokens[-1]:
        tokens.pop()
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise VlscaleError(f"--tokenizer {file}: a token stands on two lines; use the published file")
    return wordpiece(vocab, _is_lowercase(file, tokens))


def _byte_level(file: Path) -> Tokenizer:
    merges = file.with_name(file.name.replace("vocab.json", "merges.txt"))
    if not merges.is_file():
        raise VlscaleError(f"--tokenizer {file}: {merges.name} is missing beside it; byte-level BPE needs both")
    return byte_level(json.loads(_read(file)), _merges(merges))


def _unimo(file: Path) -> Tokenizer:
    """GPT-2's byte-level BPE, renumbered: line i of vocab.txt is GPT-2's number of token i, or its name."""
    tokens = {str(number): token for token, number in json.loads(_read(file.with_name("encoder.json"))).items()}
    lines = [line.strip() for line in _read(file.with_name("vocab.txt")).decode("utf-8").splitlines()]
    vocab = {tokens.get(line, line): number for number, line in enumerate(lines)}
    if len(vocab) != len(lines):
        raise VlscaleError(f"--tokenizer {file}: a token stands on two lines; use the published file")
    return byte_level(vocab, _merges(file.with_name("vocab.bpe")))


def _merges(file: Path) -> list[tuple[str, str]]:
    pairs = []
    for line in _read(file).decode("utf-8").split("\n"):
        if line.strip() and not line.startswith("#version"):
            left, _, right = line.rstrip("\r").partition(" ")
            pairs.append((left, right))
    return pairs


def _is_lowercase(vocab: Path, tokens: Sequence[str]) -> bool:
    config = vocab.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            told = json.loads(_read(config)).get("do_lower_case")
        except (ValueError, AttributeError) as error:
            raise VlscaleError(f"{config}: not a JSON object ({error}); restore or remove it") from None
        if isinstance(told, bool):
            return told
    return not any(token != token.lower() and not token.startswith("[") for token in tokens)


def _drops_word_starts(tokenizer: Tokenizer) -> bool:
    """Tell whether "b" alone has other ids than "b" in "a b", where the space belongs to the word."""
    alone = tokenizer.encode("a", add_special_tokens=False).ids
    both = tokenizer.encode("a a", add_special_tokens=False).ids
    return bool(both != alone + alone)


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise VlscaleError(f"{file}: larger than {MAX_BYTES >> 20} MiB; that is no vocabulary")
        return file.read_bytes()
    except OSError as error:
        raise VlscaleError(f"{file}: cannot be read ({error.strerror})") from None

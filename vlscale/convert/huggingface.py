"""Folders of BERT and RoBERTa as the Hugging Face hub has them: ``config.json``, weights, vocabulary.

The weights may lie in ``model.safetensors``, in shards with an index, or in ``pytorch_model.bin`` (whole or in shards);
the library ``transformers`` is not needed. What the names mean for this library's models stands in
:mod:`vlscale.convert.text_encoders`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from vlscale.convert.source import TensorInfo, TensorSource
from vlscale.data.schema import Vocabulary
from vlscale.errors import VlscaleError
from vlscale.hashing import file_digest
from vlscale.models.folder import CONFIG_FILE, read_json
from vlscale.models.shards import read_index
from vlscale.untrusted import check_count, shown

KINDS = ("bert", "roberta")
"""Values of ``model_type`` that are read."""
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The forms of the weights, best first; the first one present is read."""
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
"""Files that decide the ids of a text, most telling first (``vocab.json`` needs ``merges.txt`` beside it)."""
_BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_LICENCE = re.compile(r"^licen[sc]e:[ \t]*['\"]?([\w.+-]{1,64})['\"]?[ \t]*$", re.MULTILINE)
_MOST_VOCABULARY = 64 << 20
_MOST_README = 1 << 16
_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 16,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 20,
}
VocabularyReader = Callable[[Path], Vocabulary]
"""Reads a tokenizer file; the import tools have one: ``lambda path: load_tokenizer(path).vocabulary``."""


@dataclass(frozen=True)
class EncoderShape:
    """What decides the shape and the arithmetic of a BERT or RoBERTa.

    Attributes:
        kind: one of :data:`KINDS`.
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: as in ``config.json``.
        max_position_embeddings: rows of the position table.
        type_vocab_size: rows of the token type table.
        layer_norm_eps: of every LayerNorm.
        first_position: row of a text's first token; RoBERTa's rows up to its padding id are for no token.
    """

    kind: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    first_position: int


class HuggingFaceSource:
    """A :class:`~vlscale.convert.source.TensorSource` over such a folder; the names are those of its files.

    Attributes:
        shape: the encoder that ``config.json`` describes.
        vocabulary: ``files`` (name -> sha256), ``fingerprint`` (of :class:`~vlscale.data.schema.Vocabulary`, or None)
            and ``problem`` (why there is none, or None); also in ``extra``, beside ``config`` and ``licence``.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        shape: EncoderShape,
        parts: Sequence[TensorSource],
        more: Sequence[Path],
        stack: ExitStack,
    ) -> None:
        self.path = path
        self.shape = shape
        self.format = f"hf-{shape.kind}"
        self.files = (path / CONFIG_FILE, *more, *(file for part in parts for file in part.files))
        self.tensors: Mapping[str, TensorInfo] = {name: each for part in parts for name, each in part.tensors.items()}
        self.aliases: Mapping[str, str] = {name: first for part in parts for name, first in part.aliases.items()}
        self.vocabulary: dict[str, Any] = {"files": {}, "fingerprint": None, "problem": None}
        self.extra: Mapping[str, Any] = {"config": config, "vocabulary": self.vocabulary, "licence": _licence(path)}
        self._part_of = {name: part for part in parts for name in part.tensors}
        self._stack = stack

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, of the stored dtype; only its own bytes are read.

        Raises:
            VlscaleError: there is none of that name, or its file is damaged or has been changed.
        """
        if name not in self._part_of:
            raise VlscaleError(f"{self.path}: holds no tensor {shown(name)}")
        return self._part_of[name].read(name)

    def __enter__(self) -> HuggingFaceSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def recognise(path: Path) -> bool:
    """Say whether ``path`` is a folder with the configuration of a BERT or RoBERTa and a file of weights."""
    if not path.is_dir() or not any((path / name).is_file() for name in WEIGHT_FILES):
        return False
    with suppress(VlscaleError):
        return kind_of(read_json(path / CONFIG_FILE)) is not None
    return False


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Return which of :data:`KINDS` a parsed ``config.json`` is of, else None.

    Google's first releases, of BERT alone, have no ``model_type``; their token types tell them from other models.
    """
    found = config.get("model_type", "bert" if "type_vocab_size" in config else None)
    return found if isinstance(found, str) and found in KINDS else None


def open_source(path: Path, read_vocabulary: VocabularyReader | None = None) -> HuggingFaceSource:
    """Read configuration, names and shapes of a folder, and note where its vocabulary comes from.

    Args:
        path: the folder.
        read_vocabulary: finds the fingerprint that texts are compared with; None leaves it open.

    Raises:
        VlscaleError: not such a folder, a setting that these models do not have, or files that lie or are damaged.
    """
    if not path.is_dir():
        raise VlscaleError(f"{path}: no such folder; give one that holds {CONFIG_FILE} and {WEIGHT_FILES[0]}")
    config = read_json(path / CONFIG_FILE)
    form = next((name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if form is None:
        raise VlscaleError(f"{path}: neither {WEIGHT_FILES[0]} nor {WEIGHT_FILES[2]} found, nor an index of shards")
    with ExitStack() as stack:
        shape = encoder_shape(config, path / CONFIG_FILE)
        parts, more = _open_weights(path, form, stack)
        source = HuggingFaceSource(path, config, shape, parts, more, stack.pop_all())
    try:
        check_count(path, len(source.tensors))
        source.vocabulary.update(read_provenance(path, shape.vocab_size, read_vocabulary))
    except BaseException:
        source.__exit__()
        raise
    return source


def encoder_shape(config: Mapping[str, Any], where: Path) -> EncoderShape:
    """Check a parsed ``config.json`` and return what counts of it; optional keys default as in ``transformers``.

    Raises:
        VlscaleError: another kind of model, a size that is missing or absurd, or arithmetic that differs from the
            published models' (activation, relative positions, causal or cross attention).
    """
    kind = kind_of(config)
    if kind is None:
        found = shown(str(config.get("model_type")))
        raise VlscaleError(f"{where}: model_type is {found}, expected one of {', '.join(KINDS)}")
    sizes = {key: _size(config, key, 1, most, where) for key, most in _SIZES.items()}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise VlscaleError(
            f"{where}: hidden_size {sizes['hidden_size']} is not a multiple of num_attention_heads "
            f"{sizes['num_attention_heads']}; fetch the file again"
        )
    fixed = {"hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for key, expected in {**fixed, "add_cross_attention": False}.items():
        if config.get(key, expected) != expected:
            more = " (the exact one)" if key == "hidden_act" else ""
            raise VlscaleError(f"{where}: {key} is {shown(str(config[key]))}, expected {expected!r}{more}")
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise VlscaleError(f"{where}: layer_norm_eps is {shown(str(eps))}, expected a small positive number")
    types = _size({"type_vocab_size": 2, **config}, "type_vocab_size", 1, 1 << 10, where)
    first = 0
    if kind == "roberta":
        rows = sizes["max_position_embeddings"]
        first = 1 + _size({"pad_token_id": 1, **config}, "pad_token_id", 0, rows - 2, where)
    return EncoderShape(kind, **sizes, type_vocab_size=types, layer_norm_eps=eps, first_position=first)


def _size(config: Mapping[str, Any], key: str, least: int, most: int, where: Path) -> int:
    found = config.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
        raise VlscaleError(f"{where}: {key} is {shown(str(found)[:80])}, expected a whole number in {least}..{most}")
    return found


def read_provenance(
    folder: Path, rows: int, read_vocabulary: VocabularyReader | None
) -> dict[str, dict[str, str] | str | None]:
    """Return ``files`` (name -> sha256 of its bytes), ``fingerprint`` and ``problem`` of a folder's vocabulary.

    A vocabulary that cannot be used is no reason to refuse the weights: then the fingerprint stays open and the problem
    is told.

    Args:
        folder: the folder.
        rows: of the word table, which no id may exceed.
        read_vocabulary: see :func:`open_source`.

    Raises:
        VlscaleError: a file of it cannot be read, or is far too large.
    """
    present = [name for name in (*VOCABULARIES, *_BESIDE) if (folder / name).is_file()]
    files = {name: _digest(folder / name) for name in present}
    usable = [name for name in VOCABULARIES if name in files and (name != "vocab.json" or "merges.txt" in files)]
    told: dict[str, dict[str, str] | str | None] = {"files": files, "fingerprint": None, "problem": None}
    if not usable:
        return {**told, "problem": f"the folder has none of {', '.join(VOCABULARIES)}"}
    if read_vocabulary is None:
        return {**told, "problem": "its fingerprint was not asked for"}
    try:
        found = {name: read_vocabulary(folder / name) for name in usable}
    except VlscaleError as error:
        return {**told, "problem": str(error)}
    first, *others = found
    differing = [name for name in others if found[name].fingerprint != found[first].fingerprint]
    if differing:
        return {**told, "problem": f"{first} and {differing[0]} give different ids; remove the wrong one"}
    if found[first].size > rows:
        return {**told, "problem": f"{first} has {found[first].size} word pieces, the word table {rows} rows"}
    return {**told, "fingerprint": found[first].fingerprint}


def _digest(file: Path) -> str:
    try:
        size = file.stat().st_size
        if size > _MOST_VOCABULARY:
            raise VlscaleError(f"{file}: has {size} bytes, expected at most {_MOST_VOCABULARY}; that is no vocabulary")
        return file_digest(file, hashlib.sha256)
    except OSError as error:
        raise VlscaleError(f"{file}: cannot be read ({error.strerror}); fetch it again") from None


def _licence(folder: Path) -> str | None:
    """The licence that the head of the model card names."""
    try:
        with (folder / "README.md").open("rb") as file:
            text = file.read(_MOST_README).decode("utf-8", "replace")
    except OSError:
        return None
    head = text.replace("\r\n", "\n").split("\n---\n", 1)[0]
    found = _LICENCE.search(head) if head.startswith("---\n") else None
    return found[1] if found else None


def _open_weights(folder: Path, form: str, stack: ExitStack) -> tuple[list[TensorSource], list[Path]]:
    """Open the files of one form; return them, and files that belong to them besides."""
    if form.startswith("model.safetensors"):
        from vlscale.convert import safetensors_files

        return [stack.enter_context(safetensors_files.open_source(folder / form))], []
    if not form.endswith(".index.json"):
        return [stack.enter_context(_open_pickled(folder / form))], []
    parts: list[TensorSource] = []
    index = read_index(folder / form, ".bin")
    for shard in index.files:
        part = stack.enter_context(_open_pickled(shard))
        index.check_shard(shard, part.tensors)
        parts.append(part)
    return parts, [folder / form]


def _open_pickled(path: Path) -> TensorSource:
    from vlscale.convert import torch_files

    return cast(TensorSource, torch_files.open_source(path))

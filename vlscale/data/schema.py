"""What the three stores of a dataset hold: their columns, and the meta.json that stands beside each index.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vlscale.errors import VlscaleError

FloatName = Literal["float16", "float32"]
Width = Annotated[int, Field(ge=1, le=1 << 20)]
CODED = "vlscale_features"
"""Name of the MDS encoding of coded features: ``vlscale_features:<codec>:<dtype>``; see :mod:`vlscale.data.codec`."""

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
"""Names that BERT's vocabularies give the five special tokens."""

MAX_TYPES = 1 << 16
ADDED = "[added{}]"
"""Name of the n-th word piece that :meth:`Vocabulary.grown` adds, counted from 0."""


class Meta(BaseModel):
    """Base of the meta.json models: frozen, strict about types, and without tolerance for unknown keys.

    ``version`` is that of the on-disk layout; a reader takes exactly the one it knows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Vocabulary(Meta):
    """The word pieces that ``input_ids`` number; travels with the texts so that a model can be checked against it.

    Attributes:
        size: number of word pieces V; ids are 0..V-1.
        pad, unk, cls, sep, mask: ids of the special tokens, all different.
        random_range: ``(lo, hi)``, the ids in [lo, hi) that a masked word may be replaced with at random
            (UNITER leaves out the first 106 of BERT's cased vocabulary).
        fingerprint: sha256 (hex) of what decides the ids of a text: tokens, merges or scores, and settings such as
            lower-casing, spelled canonically by the import tools, so that two files of one tokenizer have the same; of
            a SentencePiece model file; or of the token list alone.
        tokens: all V tokens in the order of their ids.
    """

    size: int = Field(ge=6, le=1 << 24)
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    random_range: tuple[int, int]
    fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    tokens: tuple[str, ...]

    @model_validator(mode="after")
    def _fits(self) -> Vocabulary:
        if len(self.tokens) != self.size:
            raise ValueError(f"size is {self.size}, but there are {len(self.tokens)} tokens")
        if len(set(self.tokens)) != self.size:
            raise ValueError("a token stands twice in the token list")
        special = [getattr(self, name) for name in SPECIAL_TOKENS]
        if len(set(special)) != len(special) or min(special) < 0 or max(special) >= self.size:
            raise ValueError(f"special ids {special} must differ and lie in 0..{self.size - 1}")
        low, high = self.random_range
        if not 0 <= low < high <= self.size:
            raise ValueError(f"random_range {self.random_range} is not an interval inside 0..{self.size}")
        return self

    @classmethod
    def from_tokens(
        cls,
        tokens: Sequence[str],
        random_range: tuple[int, int] | None = None,
        special: Mapping[str, str] = SPECIAL_TOKENS,
        fingerprint: str | None = None,
    ) -> Vocabulary:
        """Build a vocabulary from tokens in the order of their ids.

        Args:
            tokens: all tokens; the five special ones are among them.
            random_range: see the class; default: from after the last special token to the end.
            special: token of each special role (``pad``, ``unk``, ``cls``, ``sep``, ``mask``).
            fingerprint: see the class; default: sha256 of the token list.

        Raises:
            VlscaleError: a special token is missing, a token repeats, or the range is empty.
        """
        ids = {token: index for index, token in enumerate(tokens)}
        missing = [token for token in special.values() if token not in ids]
        if missing:
            raise VlscaleError(f"vocabulary: special tokens {missing} are missing among {len(tokens)} tokens; add them")
        roles: dict[str, Any] = {name: ids[special[name]] for name in SPECIAL_TOKENS}
        try:
            return cls(
                size=len(tokens),
                **roles,
                random_range=random_range or (max(roles.values()) + 1, len(tokens)),
                fingerprint=fingerprint or hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest(),
                tokens=tuple(tokens),
            )
        except ValidationError as error:
            raise VlscaleError(f"vocabulary: {first_problem(error)}") from None

    def grown(self, count: int) -> Vocabulary:
        """Return this vocabulary with ``count`` more word pieces at its end, named :data:`ADDED`.

        The ids of texts do not change, so a model that knows this vocabulary can start one that knows the grown one.
        No random word is ever drawn from the added ones.

        Raises:
            VlscaleError: a word piece has such a name already, or there would be too many.
        """
        tokens = (*self.tokens, *(ADDED.format(number) for number in range(count)))
        fingerprint = grown_fingerprint(self.fingerprint, count)
        known = {**dict(self), "size": len(tokens), "tokens": tokens, "fingerprint": fingerprint}
        try:
            return Vocabulary(**known)
        except ValidationError as error:
            raise VlscaleError(f"vocabulary of {self.size} grown by {count}: {first_problem(error)}") from None


def grown_fingerprint(fingerprint: str, count: int) -> str:
    """Fingerprint of a vocabulary that :meth:`Vocabulary.grown` has made of the one with ``fingerprint``."""
    return hashlib.sha256(f"{fingerprint} grown by {count}".encode()).hexdigest() if count else fingerprint


class ImagesMeta(Meta):
    """images/meta.json: width D and dtype of the region features, how they are coded, and what computed them."""

    kind: Literal["images"] = "images"
    version: Literal[1] = 1
    feature_dim: Width
    feature_dtype: FloatName
    feature_codec: Literal["none", "lossless", "uint8"] = "none"
    source: str = Field("", description="free text: the detector or network behind the features")


class TextsMeta(Meta):
    """texts/meta.json: the vocabulary that the word-piece ids belong to, and how many kinds of segments there are.

    Attributes:
        vocabulary: what the ids mean.
        num_types: texts have segments whose types are 0..num_types-1, in a column ``type_ids``; 1: all is of type 0,
            and there is no such column. Left out of meta.json where it is 1, as in every store from before.
    """

    kind: Literal["texts"] = "texts"
    version: Literal[1] = 1
    vocabulary: Vocabulary
    num_types: int = Field(1, ge=1, le=MAX_TYPES)

    @model_serializer(mode="wrap")
    def _without_default(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = write(self)
        if self.num_types == 1:  # fingerprints of datasets are taken of what is written
            found.pop("num_types", None)
        return found


class ClassesMeta(Meta):
    """classes/meta.json: number C of the detector's classes, their names if known, and the dtype of the rows."""

    kind: Literal["classes"] = "classes"
    version: Literal[1] = 1
    num_classes: Width
    dtype: FloatName
    class_names: list[str] | None = None

    @model_validator(mode="after")
    def _names_fit(self) -> ClassesMeta:
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"num_classes is {self.num_classes}, but there are {len(self.class_names)} class_names")
        return self


def image_columns(meta: ImagesMeta) -> dict[str, str]:
    """Columns (name -> MDS encoding) of the images store; arrays without a shape are ragged."""
    features = f"ndarray:{meta.feature_dtype}"
    if meta.feature_codec != "none":
        features = f"{CODED}:{meta.feature_codec}:{meta.feature_dtype}"
    return {
        "id": "str",
        "width": "int",
        "height": "int",
        "features": features,
        "boxes": "ndarray:float32",
        "conf": "ndarray:float32",
        "extra": "json",
    }


def text_columns(meta: TextsMeta) -> dict[str, str]:
    """Columns (name -> MDS encoding) of the texts store."""
    types = {"type_ids": "ndarray:int32"} if meta.num_types > 1 else {}
    return {"id": "str", "text": "str", "input_ids": "ndarray:int32", **types, "images": "json", "extra": "json"}


def class_columns(meta: ClassesMeta) -> dict[str, str]:
    """Columns (name -> MDS encoding) of the classes store: one of fixed size, so that a gather is one indexing."""
    return {"probs": f"ndarray:{meta.dtype}:{meta.num_classes}"}


def first_problem(error: ValidationError) -> str:
    """One line for the first problem of a validation: where, and what."""
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}{more}" if where else f"{message}{more}"

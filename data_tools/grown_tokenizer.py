"""A tokenizer whose vocabulary has more word pieces at its end, which texts that were tokenized elsewhere use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_tools.build_texts import Tokenizer
from data_tools.tokenizers import load_tokenizer
from vlscale.data.schema import Vocabulary


@dataclass(frozen=True)
class GrownTokenizer:
    """A tokenizer that never makes the added word pieces itself.

    Attributes:
        base: the tokenizer.
        count: word pieces that are added; see :meth:`vlscale.data.schema.Vocabulary.grown`.
    """

    base: Tokenizer
    count: int

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The grown vocabulary."""
        return self.base.vocabulary.grown(self.count)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, as the base does."""
        return self.base.encode(text)

    def to_json(self) -> str | None:
        """Content of the base's ``tokenizer.json``: it still gives every text its ids."""
        return self.base.to_json()


def load_grown(path: Path, count: int) -> Tokenizer:
    """Read a tokenizer; with ``count`` more word pieces, if there are any.

    Raises:
        VlscaleError: see :func:`data_tools.tokenizers.load_tokenizer`.
    """
    base = load_tokenizer(path)
    return GrownTokenizer(base, count) if count else base

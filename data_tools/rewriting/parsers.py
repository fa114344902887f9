"""Choosing the parser: the lexicon, or a spaCy model by path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data_tools.rewriting import lexicon
from data_tools.rewriting.chunker import analyse
from data_tools.rewriting.graph import Analysis
from data_tools.rewriting.spacy_parser import SpacyParser


class Parser(Protocol):
    """Analyses texts."""

    name: str

    def analyse(self, texts: Sequence[str]) -> list[Analysis]:
        """Analyse some texts."""
        ...


class LexiconParser:
    """Rules and dictionaries; see :mod:`data_tools.rewriting.chunker`."""

    name = "lexicon"

    def analyse(self, texts: Sequence[str]) -> list[Analysis]:
        """Analyse some texts."""
        return [analyse(text) for text in texts]


@dataclass(frozen=True)
class ParserChoice:
    """Which parser; pickled into worker processes.

    Attributes:
        spacy_model: folder of a spaCy pipeline; None for the lexicon.
    """

    spacy_model: Path | None = None

    def load(self) -> Parser:
        """Load it.

        Raises:
            VlscaleError: a package or the model is missing.
        """
        if self.spacy_model is not None:
            return SpacyParser(self.spacy_model)
        lexicon.require_packages()
        return LexiconParser()

"""Opens text formats as the command line does, and writes what public files hold."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from data_tools.train_tokenizer import train_bpe, train_sentencepiece, train_wordpiece

ENGLISH = [
    "A dog runs along the beach.",
    "Two children play with a red ball in the park, while their mother reads a book.",
    "The old man said that he would come back tomorrow!",
    "Is there anything left to eat?",
    "Mr. Smith bought 12 apples for $3.50 at the market.",
    "She opened the window and looked at the trees, the houses and the river below.",
    "Nobody knew why the train was late again.",
    "It rained all day long.",
]
"""Training sentences of the small tokenizers."""


def open_format(name: str, paths: Any, *options: str, out: Path | None = None, tokenizer: Path | None = None) -> Any:
    """Open a source from command-line options."""
    module = importlib.import_module(f"data_tools.formats.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    parsed = parser.parse_args([str(each) for each in options])
    parsed.sources = list(paths) if isinstance(paths, (list, tuple)) else [paths]
    parsed.out, parsed.tokenizer, parsed.workers = out, tokenizer, 1
    return module.open_source(parsed)


def write_json(path: Path, value: Any, **options: Any) -> Path:
    """Write JSON as it is."""
    path.write_text(json.dumps(value, **options), encoding="utf-8")
    return path


def small_tokenizer(folder: Path, kind: str) -> Path:
    """Train a small tokenizer into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(train_sentencepiece(ENGLISH * 3, 70))
    else:
        train = {"wordpiece": train_wordpiece, "bpe": train_bpe}[kind]
        (folder / "tokenizer.json").write_text(train(ENGLISH, 340, min_frequency=1), encoding="utf-8")
    return folder

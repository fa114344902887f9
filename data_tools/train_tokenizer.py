"""Train a tokenizer: ``python -m data_tools.train_tokenizer wordpiece|bpe|sentencepiece FILE... --out FOLDER``.

FILE is text, one or more sentences a line, or JSON lines (``.jsonl``, with ``--field``), plain or ``.gz``. FOLDER gets
``tokenizer.json``, or ``tokenizer.model`` for SentencePiece; ``import_texts --tokenizer FOLDER`` takes it. Keep the
file: BPE and SentencePiece come out the same each time; WordPiece's trainer breaks ties differently in each run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

from data_tools.formats.arrays import FieldError, sentence
from data_tools.formats.lines import line_parts, read_lines
from data_tools.options import OneLineParser, number
from data_tools.records import BadRow
from data_tools.tokenizers import AnyTokenizer, byte_level, load_tokenizer, wordpiece
from vlscale.data.schema import SPECIAL_TOKENS
from vlscale.errors import VlscaleError, one_line_errors

KINDS = ("wordpiece", "bpe", "sentencepiece")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
LEAST = {"wordpiece": 16, "bpe": len(ROBERTA) + 256, "sentencepiece": 16}
"""Smallest vocabularies; the trainers of the library would silently give larger ones."""
MAX_TRAINING_LINE = 1 << 20


def training_texts(paths: Sequence[Path], field: str = "text") -> Iterator[str]:
    """Yield the lines of text files, or a field of JSON lines.

    Raises:
        VlscaleError: a file cannot be read, or a line is not UTF-8, too long, or has no such field.
    """
    for part in line_parts(paths):
        path = paths[part["file"]]
        for line in read_lines(paths, part, MAX_TRAINING_LINE):
            if isinstance(line, BadRow):
                raise VlscaleError(str(line))
            try:
                text = sentence("line", line.data)
                if ".jsonl" in path.suffixes:
                    text = sentence(field, json.loads(text)[field])
            except FieldError as error:
                raise VlscaleError(str(error.at(line.where))) from None
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise VlscaleError(f"{line.where}: {field}: not to be had ({type(error).__name__}: {error})") from None
            if text.strip():
                yield text.strip()


def train_wordpiece(texts: Iterable[str], size: int, lowercase: bool = False, min_frequency: int = 2) -> str:
    """Train BERT's WordPiece; return the content of ``tokenizer.json``."""
    special = list(SPECIAL_TOKENS.values())
    tokenizer = wordpiece({token: index for index, token in enumerate(special)}, lowercase)
    trainer = WordPieceTrainer(
        vocab_size=size, min_frequency=min_frequency, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str(pretty=False))


def train_bpe(texts: Iterable[str], size: int, min_frequency: int = 2) -> str:
    """Train RoBERTa's byte-level BPE, with all 256 bytes in its alphabet; return the content of ``tokenizer.json``."""
    tokenizer = byte_level({}, [])
    trainer = BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=list(ROBERTA),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str(pretty=False))


def train_sentencepiece(texts: Iterable[str], size: int, sentences: int = 5_000_000) -> bytes:
    """Train a unigram SentencePiece model with ALBERT's special tokens; return the content of its ``.model`` file.

    Args:
        texts: training texts.
        size: of the vocabulary.
        sentences: texts that are held in memory, a random sample if there are more.

    Raises:
        VlscaleError: the package is missing, or the texts do not suffice for so many pieces.
    """
    try:
        from sentencepiece import SentencePieceTrainer
    except ImportError as error:
        raise VlscaleError(f"{error}; pip install 'vlscale[import]'") from None
    model = io.BytesIO()
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            character_coverage=0.9995,
            input_sentence_size=sentences,
            shuffle_input_sentence=True,
            max_sentence_length=MAX_TRAINING_LINE,
            pad_id=0,
            pad_piece="<pad>",
            unk_id=1,
            unk_piece="<unk>",
            bos_id=2,
            bos_piece="[CLS]",
            eos_id=3,
            eos_piece="[SEP]",
            control_symbols=["[MASK]"],
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[-200:]
        raise VlscaleError(f"SentencePiece cannot be trained with --vocab-size {size} ({reason})") from None
    return model.getvalue()


def train(options: argparse.Namespace) -> AnyTokenizer:
    """Train what the command line asks for, write it, and read it back.

    Raises:
        VlscaleError: the texts cannot be read, are too few, or the file exists.
    """
    least = LEAST[options.kind]
    if options.vocab_size < least:
        raise VlscaleError(
            f"--vocab-size {options.vocab_size}: a {options.kind} vocabulary has at least {least} (its special tokens "
            f"and alphabet); give more"
        )
    name = "tokenizer.model" if options.kind == "sentencepiece" else "tokenizer.json"
    path = options.out / name
    if path.exists():
        raise VlscaleError(f"{path}: exists; remove it, or give another --out")
    texts = training_texts(options.sources, options.field)
    if options.kind == "wordpiece":
        content = train_wordpiece(texts, options.vocab_size, options.lowercase, options.min_frequency).encode("utf-8")
        found = len(json.loads(content)["model"]["vocab"])  # the trainer keeps every letter of the texts
        if found > options.vocab_size:
            raise VlscaleError(
                f"--vocab-size {options.vocab_size}: special tokens and letters of these texts are {found}; give more"
            )
    elif options.kind == "bpe":
        content = train_bpe(texts, options.vocab_size, options.min_frequency).encode("utf-8")
    else:
        content = train_sentencepiece(texts, options.vocab_size)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be written ({error.strerror})") from None
    return load_tokenizer(path)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(prog="python -m data_tools.train_tokenizer", description=(__doc__ or "").split(":")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("sources", nargs="+", type=Path, metavar="FILE", help="text or JSON lines, plain or .gz")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--vocab-size", type=number(16, 1 << 20), default=30000, metavar="V", help="default 30000")
    parser.add_argument("--min-frequency", type=number(1, 1 << 20), default=2, metavar="N", help="of a merge (2)")
    parser.add_argument("--lowercase", action="store_true", help="WordPiece: lower-case texts, drop accents")
    parser.add_argument("--field", default="text", help="of JSON lines (default text)")
    return parser.parse_args(list(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    with one_line_errors("train_tokenizer"):
        options = parse(sys.argv[1:] if arguments is None else arguments)
        vocabulary = train(options).vocabulary
        print(f"{options.out}: {vocabulary.size} word pieces, fingerprint {vocabulary.fingerprint[:16]}")


if __name__ == "__main__":
    main()

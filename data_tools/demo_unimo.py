"""Builds UNIMO's demo corpus from the demo's scenes and texts: pairs, images whose captions are withheld, and texts.

Everything is a pure function of :class:`Options`, the scenes and the texts; the region features are those of the
scenes, copied.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools import build_retrieval, find_units, import_texts, rewrite_captions
from data_tools.demo_corpus import MANIFEST_KIND as SCENES_KIND
from data_tools.demo_texts import TEXTS, is_held_out, sentences
from data_tools.tokenizers import AnyTokenizer, load_tokenizer
from data_tools.train_tokenizer import train_bpe
from vlscale.data.dataset import Dataset, open_dataset
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter
from vlscale.errors import VlscaleError

MANIFEST_KIND = "vlscale-demo-unimo"


@dataclass(frozen=True)
class Options:
    """What a corpus is made of; written to its manifest.

    Attributes:
        withheld: the captions of one in so many training scenes are withheld.
        held_out: one in so many sentences is for validation.
        vocab_size: byte-level BPE pieces, special tokens included.
        max_tokens: word pieces of a row of text.
        neighbours: images and texts that are retrieved for each caption, at most.
        sentences: of each file of texts, at most; None: all.
        scenes: for training, and for validation, at most; None: all.
    """

    withheld: int = 3
    held_out: int = 20
    vocab_size: int = 6000
    max_tokens: int = 48
    neighbours: int = 20
    sentences: int | None = None
    scenes: int | None = None


@dataclass(frozen=True)
class Report:
    """Rows of each dataset, word pieces of the vocabulary, and how long the building took."""

    rows: Mapping[str, tuple[int, int]]
    vocabulary: int
    seconds: float


def build(options: Options, scenes: Path, texts: Path, out: Path, workers: int) -> Report:
    """Write the corpus into the new folder ``out``: a root per dataset, ``tokenizer/`` and ``manifest.json``.

    Args:
        options: what to build.
        scenes: a corpus of :mod:`data_tools.build_demo`, with ``train`` and ``val``.
        texts: folder of :func:`data_tools.demo_texts.sentences`.
        out: a folder; the caller renames it when all is well.
        workers: processes of the tools that look at texts; does not change the result.

    Raises:
        VlscaleError: there are no such scenes or texts, or an option is out of range.
    """
    began = time.monotonic()
    told = _read_manifest(scenes)
    train, val = open_dataset("train", scenes / "train"), open_dataset("val", scenes / "val")
    rows, val_rows = (np.arange(len(part.images))[: options.scenes] for part in (train, val))
    withheld = rows % options.withheld == options.withheld - 1
    captions = Captions(train, rows[~withheld]), Captions(val, val_rows)
    every = list(dict.fromkeys(sentences(texts, options.sentences)))
    seen = [each for each in every if not is_held_out(each, options.held_out)]
    tokenizer = _train_tokenizer([*captions[0].texts, *seen], options.vocab_size, out / "tokenizer")
    for name, group in (("pairs", captions[0]), ("val_pairs", captions[1])):
        write_images(group.dataset, group.rows, out / name)
        group.write(out / name, tokenizer)
    write_images(train, rows[withheld], out / "images")
    _copy_pictures(scenes / "val" / "scenes", out / "val_pairs" / "scenes")
    held_out = [each for each in every if is_held_out(each, options.held_out)]
    for name, group_of in (("texts", seen), ("val_texts", held_out)):
        _import_sentences(group_of, name, out, options.max_tokens, workers)
    _add_companions(options, out, workers)
    manifest = {"corpus": MANIFEST_KIND, "options": asdict(options), "scenes": told}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(scenes / "CREDITS.md", out / "CREDITS.md")
    shutil.copyfile(TEXTS / "LICENSE.wordnet.txt", out / "LICENSE.wordnet.txt")
    found = {name: _rows_of(out / name) for name in ("pairs", "images", "texts", "val_pairs", "val_texts")}
    return Report(found, tokenizer.vocabulary.size, time.monotonic() - began)


class Captions:
    """The captions of some scenes, in lower case.

    Args:
        dataset: the scenes.
        rows: int64 [S], those of the images store that are meant.

    Attributes:
        texts: the captions, in the order of the scenes.
    """

    def __init__(self, dataset: Dataset, rows: NDArray[np.int64]) -> None:
        self.dataset, self.rows = dataset, rows
        first = dataset.lengths.first_image(np.arange(len(dataset)))
        self._found = [dataset.texts.row(row) for row in np.flatnonzero(np.isin(first, rows)).tolist()]
        self.texts = [row["text"].lower() for row in self._found]

    def write(self, root: Path, tokenizer: AnyTokenizer) -> None:
        """Write ``ROOT/texts``; ``ROOT/images`` holds the scenes."""
        ids = [self.dataset.images.row(row)["id"] for row in self.rows.tolist()]
        place = {name: number for number, name in enumerate(ids)}
        pieces = tokenizer.encode_many(self.texts)
        with TextWriter(root, tokenizer.vocabulary, place, tokenizer.to_json()) as writer:
            for row, text, piece in zip(self._found, self.texts, pieces, strict=True):
                writer.write(row["id"], text, piece, row["images"], {"kind": row["extra"].get("kind", "")})


def write_images(dataset: Dataset, rows: NDArray[np.int64], root: Path) -> None:
    """Copy some images (int64 [S]) of a dataset, with their class probabilities, into a new root."""
    meta, classes = dataset.images.meta, dataset.classes
    with ImageWriter(root, meta.feature_dim, meta.feature_dtype, source=meta.source) as writer:
        for row in rows.tolist():
            found = dataset.images.row(row)
            one = np.array([row])
            features, boxes, _, _ = dataset.images.regions(one, 1 << 20)
            size = found["width"], found["height"]
            writer.write(found["id"], *size, features, boxes, found["conf"], found["extra"])
    if classes is None:
        return
    counts = dataset.images.counts_of(rows, 1 << 20)
    regions = np.split(dataset.images.region_rows(rows, counts), np.cumsum(counts)[:-1])
    with ClassWriter(root, classes.meta.num_classes, classes.meta.dtype, classes.meta.class_names) as class_writer:
        for each in regions:
            class_writer.write(classes.probs(each))


def _train_tokenizer(texts: Iterable[str], size: int, folder: Path) -> AnyTokenizer:
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(train_bpe(texts, size), encoding="utf-8")
    return load_tokenizer(folder)


def _import_sentences(group: Sequence[str], name: str, out: Path, max_tokens: int, workers: int) -> None:
    """Write ``out/NAME/texts``, a sentence a row; too long ones are cut."""
    if not group:
        raise VlscaleError(f"{name}: no sentences are left; take more with --sentences")
    source = out / f"{name}.txt"
    source.write_text("\n".join(group) + "\n", encoding="utf-8")
    options = ["--pack", "none", "--documents", "line", "--max-tokens", str(max_tokens)]
    common = ["--out", str(out / name), "--tokenizer", str(out / "tokenizer"), "--workers", str(workers)]
    import_texts.run(["plain_text", str(source), *options, *common])
    source.unlink()


def _add_companions(options: Options, out: Path, workers: int) -> None:
    """Units of all texts, rewrites of the captions, and what is retrieved for those that are trained on."""
    common = ["--workers", str(workers)]
    for name in ("pairs", "texts", "val_pairs", "val_texts"):
        find_units.run([str(out / name), *common])
    rewrite_captions.run([str(out / "pairs"), *common])
    vocabulary = str(out / "pairs" / "units" / "vocabulary.json")
    rewrite_captions.run([str(out / "val_pairs"), "--vocabulary", vocabulary, *common])
    roots = ["--images", str(out / "images"), "--texts", str(out / "texts")]
    build_retrieval.run([str(out / "pairs"), *roots, "-k", str(options.neighbours), *common])


def _copy_pictures(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)


def _read_manifest(scenes: Path) -> dict[str, Any]:
    """What the scenes are made of, as their manifest says."""
    path = scenes / "manifest.json"
    cure = "build the scenes first: python -m data_tools.build_demo --out FOLDER"
    try:
        told = json.loads(path.read_bytes())
        if told["corpus"] != SCENES_KIND:
            raise VlscaleError(f"{path}: corpus {told['corpus']!r}, expected {SCENES_KIND!r}; {cure}")
        return {"options": told["options"], "vocabulary": told["vocabulary"]}
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror}); {cure}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise VlscaleError(f"{path}: no manifest of scenes ({type(error).__name__}: {error}); {cure}") from None


def _rows_of(root: Path) -> tuple[int, int]:
    """Images and texts of a root."""
    lengths = (root / "images" / "lengths.npy", root / "texts" / "lengths.npy")
    images, texts = (len(np.load(path)) if path.exists() else 0 for path in lengths)
    return images, texts

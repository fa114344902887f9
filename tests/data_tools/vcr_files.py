"""A small VCR in UNITER's databases: scenes of four kinds, of which regions, answers and rationales tell the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.data_tools.uniter_files import as_msgpack, as_npz, write_images, write_texts

WIDTH, CLASSES, KINDS = 8, 5, 4
ADDED = 3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = [*SPECIAL, "!", *(f"w{number}" for number in range(24))]
SEP = SPECIAL.index("[SEP]")
Row = dict[str, Any]


def regions(kind: int, count: int, seed: int) -> dict[str, np.ndarray]:
    """Arrays of regions that show a kind of scene."""
    rng = np.random.default_rng(seed)
    low, size = rng.uniform(0, 0.4, (count, 2)), rng.uniform(0.1, 0.5, (count, 2))
    prototype = np.random.default_rng(kind).standard_normal(WIDTH)
    labels = np.full((count, CLASSES), 0.025)
    labels[:, 1 + kind] = 0.9
    return {
        "features": (prototype + 0.1 * rng.standard_normal((count, WIDTH))).astype(np.float16),
        "norm_bb": np.concatenate([low, low + size, size], 1).astype(np.float16),
        "conf": np.linspace(0.9, 0.3, count).astype(np.float16),
        "soft_labels": labels.astype(np.float16),
    }


def record(kind: int, image: str, number: int, answered: bool = True) -> Row:
    """A question with four answers and four rationales; the correct ones follow from the kind of scene."""
    first = 6 + kind * 6  # six word pieces of each kind; a person is one of the added ones
    person = len(TOKENS) + number % ADDED
    question = [first, person, first + 1]
    answers = [[6 + (kind + turn) % KINDS * 6 + 2, person] for turn in range(4)]
    rationales = [[6 + (kind + turn) % KINDS * 6 + place for place in (3, 4, 5)] for turn in range(4)]
    correct, why = number % 4, (number + 1) % 4
    return {
        "input_ids": question,
        "input_ids_as": answers[-correct:] + answers[:-correct],
        "input_ids_rs": rationales[-why:] + rationales[:-why],
        "qa_target": correct if answered else -1,
        "qar_target": why if answered else -1,
        "img_fname": [f"vcr_gt_{image}.npz", f"vcr_{image}.npz"],
        "raw": {"movie": "none", "objects": ["person"]},
    }


def write_vcr(root: Path, images: int = 12, questions: int = 3, answered: bool = True, seed: int = 0) -> dict[str, Row]:
    """Write ``gt``, ``det``, ``txt`` and ``vocab.txt`` into ``root``; return the records of the texts.

    Image 0 has no question, and every image has 1 to 3 ground-truth boxes and 2 to 5 detected ones.
    """
    truth, detected, rows = {}, {}, {}
    for number in range(images):
        kind, name = number % KINDS, f"m{number:03}"
        truth[f"vcr_gt_{name}.npz"] = as_msgpack(regions(kind, 1 + number % 3, seed * 1000 + number))
        detected[f"vcr_{name}.npz"] = as_npz(regions(kind, 2 + number % 4, seed * 1000 + 500 + number))
        for turn in range(questions if number else 0):
            rows[f"train-{number * questions + turn}"] = record(kind, name, turn, answered)
    write_images(root / "gt/feat_numbb100", truth)
    write_images(root / "det/feat_th0.2_max100_min10_compressed", detected)
    meta = {"CLS": 2, "SEP": SEP, "MASK": 4, "UNK": 1, "v_range": [5, len(TOKENS)], "bert": "toy"}
    write_texts(root / "txt", rows, meta)
    (root / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    return rows


def import_arguments(root: Path, out: Path) -> tuple[list[str], list[str]]:
    """Command lines of import_images and import_texts."""
    images = ["uniter-vcr-images", str(root / "gt"), str(root / "det"), "--texts", str(root / "txt"), "--out", str(out)]
    texts = ["uniter-vcr-texts", str(root / "txt"), "--out", str(out), "--tokenizer", str(root / "vocab.txt")]
    return images, [*texts, "--added-tokens", str(ADDED)]

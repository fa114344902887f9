"""A fingerprint of what a step trained on, to compare runs: ``VLSCALE_RECORD_BATCHES=1`` writes ``batches.jsonl``.

It covers task, dataset, example ids, passes, images, masked inputs and targets, and depends neither on their order nor
on how they were dealt: the examples' hashes are added up.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from vlscale.ragged import RaggedBatch
from vlscale.train.processes import Processes

VARIABLE = "VLSCALE_RECORD_BATCHES"
_HALF = 1 << 32


class BatchRecord:
    """Writes one line per step if the environment asks for it; otherwise does nothing."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self._active = bool(os.environ.get(VARIABLE))
        self._path, self._processes = folder / "batches.jsonl", processes

    def add(self, step: int, window: list[RaggedBatch]) -> None:
        """Note a window; all ranks have to call it."""
        if not self._active:
            return
        hashes = [value for batch in window if batch.weight for value in example_hashes(batch)]
        low = sum(value % _HALF for value in hashes)
        high = sum(value // _HALF for value in hashes)
        examples, low, high = (int(total) for total in self._processes.total([len(hashes), low, high]))
        if self._processes.main:
            digest = (high * _HALF + low) % (_HALF * _HALF)
            line = {"step": step, "task": window[0].task, "examples": examples, "digest": f"{digest:016x}"}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def example_hashes(batch: RaggedBatch) -> list[int]:
    """Return a 64-bit hash per example of everything that is drawn for it or read because of it."""
    words = np.full(batch.input_ids.numel(), -1, np.int64)
    regions = np.zeros(batch.boxes.shape[0], bool)
    targets = batch.targets
    for kind in ("token", "bidirectional", "seq2seq"):
        if f"{kind}_positions" in targets:
            words[targets[f"{kind}_positions"].numpy()] = targets[f"{kind}_labels"].numpy()
    if "region_positions" in targets:
        regions[targets["region_positions"].numpy()] = True
    labels = targets["itm_labels"].numpy() if "itm_labels" in targets else np.full(len(batch), -1)
    roles = targets["role"].numpy() if "role" in targets else None
    ids, features = batch.input_ids.numpy(), batch.features.numpy()
    cu_text, cu_regions = batch.cu_text.tolist(), batch.cu_regions.tolist()
    head = f"{batch.task}\0{batch.dataset}".encode()
    found = []
    for index in range(len(batch)):
        text = slice(cu_text[index], cu_text[index + 1])
        image = slice(cu_regions[index], cu_regions[index + 1])
        keys = [int(batch.passes[index]), int(batch.examples[index]), int(batch.images[index]), int(labels[index])]
        if roles is not None:
            keys += [int(roles[index]), int(targets["source"][index])]
        digest = hashlib.blake2b(head + np.array(keys).tobytes(), digest_size=8)
        for part in (ids[text], words[text], regions[image], features[image]):
            digest.update(part.tobytes())
        found.append(int.from_bytes(digest.digest(), "little"))
    return found

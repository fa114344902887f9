"""`make bench`: run every benchmark in this folder, or those named, print their tables and keep their figures as JSON.

A benchmark is a module ``bench_*.py`` with ``main()``; it prints each figure beside its rival, as the median of
interleaved runs in one process. What it returns, a list of rows, is written with the machine's description to
``runs/bench/NAME.json``; tables worth keeping are copied into ``results/``.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.bench.timing import machine

WRITTEN = Path("runs/bench")


def main(names: list[str]) -> None:
    """Run the benchmarks whose names contain one of ``names``; all of them without names."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if not names or any(name in path.stem for name in names):
            module = importlib.import_module(f"tests.bench.{path.stem}")
            title = (module.__doc__ or path.stem).splitlines()[0]
            print(f"\n== {path.stem.removeprefix('bench_')}: {title}", flush=True)
            rows = module.main()
            if rows is not None:
                _write(path.stem.removeprefix("bench_"), title, rows)


def _write(name: str, title: str, rows: list[dict[str, Any]]) -> None:
    WRITTEN.mkdir(parents=True, exist_ok=True)
    path = WRITTEN / f"{name}.json"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = {"benchmark": name, "title": title, **machine(device), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])

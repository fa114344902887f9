"""`make bench`: run every benchmark in this folder, or those named, and print their tables.

A benchmark is a module ``bench_*.py`` with ``main() -> None``; it prints each figure beside its rival, as the median
of interleaved runs in one process.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main(names: list[str]) -> None:
    """Run the benchmarks whose names contain one of ``names``; all of them without names."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        if not names or any(name in path.stem for name in names):
            module = importlib.import_module(f"tests.bench.{path.stem}")
            title = (module.__doc__ or path.stem).splitlines()[0]
            print(f"\n== {path.stem.removeprefix('bench_')}: {title}", flush=True)
            module.main()


if __name__ == "__main__":
    main(sys.argv[1:])

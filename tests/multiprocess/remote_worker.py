"""One process of a run that reads its own remote through its own cache: FOLDER/remote-RANK, FOLDER/cache-RANK."""

from __future__ import annotations

import os
import sys

from launch.pretrain import main
from vlscale.train.processes import run_and_exit

if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    rank = os.environ["RANK"]
    changes = [f"data.datasets.0.root={folder}/remote-{rank}", f"data.cache={folder}/cache-{rank}"]
    run_and_exit(lambda: main([*words, *(word for change in changes for word in ("--set", change))]))

"""A rank of ``vlscale doctor --dist`` on a host of its own name; rank 1 is odd in the ways that its arguments name.

usage: doctor_worker.py FOLDER [wrong-sums] -- ARGUMENTS OF THE DOCTOR
"""

from __future__ import annotations

import os
import sys

from vlscale.cli import main

if __name__ == "__main__":
    odd, arguments = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    os.environ["SLURMD_NODENAME"] = f"node-{os.environ['RANK']}"
    if os.environ["RANK"] == "1":
        sys.path.insert(0, odd[0])  # with the metadata of other versions
        if "wrong-sums" in odd:
            from vlscale.doctor import allreduce

            right = allreduce.values
            allreduce.values = lambda rank, count: right(rank + 1, count)
    raise SystemExit(main(["doctor", *arguments]))

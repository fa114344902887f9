"""Worker: several runs of launch/pretrain.py, one after the other, in one group of processes (starting them is slow).

Usage: runs_worker.py FILE.json, a list of command lines. What became of each is written to FILE.<rank>.out: exit status
and standard error. With VLSCALE_TEST_FP16 set, DeepSpeed is told that this CPU can do fp16 (PyTorch computes it,
slowly), so that the paths of fp16 run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
from pathlib import Path


def main(path: str) -> None:
    """Run every command line of the list."""
    from launch import pretrain
    from vlscale.train import ds_config
    from vlscale.train.engine import connect
    from vlscale.train.environment import choose_accelerator

    if os.environ.get("VLSCALE_TEST_FP16"):
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True
        ds_config.check_machine = lambda *ignored: None  # type: ignore[assignment]
    processes = connect(choose_accelerator("cpu"), timeout_s=60)
    results = []
    for arguments in json.loads(Path(path).read_text(encoding="utf-8")):
        status, heard = 0, io.StringIO()
        with contextlib.redirect_stderr(heard):
            try:
                pretrain.main(arguments)
            except SystemExit as error:
                status = int(error.code or 0)
            except Exception:
                traceback.print_exc()
                status = 1
        results.append({"status": status, "err": heard.getvalue()})
        Path(f"{path}.{processes.rank}.out").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    from vlscale.train.processes import run_and_exit

    run_and_exit(lambda: main(next(argument for argument in sys.argv[1:] if argument.endswith(".json"))))

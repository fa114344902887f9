"""What has to hold before DeepSpeed is imported: the device, the compiler, the launcher's variables."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Literal

import torch

from vlscale.errors import VlscaleError

DeviceChoice = Literal["auto", "cpu", "gpu"]


def choose_accelerator(asked: DeviceChoice) -> str:
    """Return ``cpu`` or ``cuda`` and set ``DS_ACCELERATOR`` to it. Call it before deepspeed is imported.

    Args:
        asked: ``auto`` follows ``DS_ACCELERATOR`` where it is set, and otherwise takes a GPU where there is one.

    Raises:
        VlscaleError: a GPU is asked for and there is none; ``DS_ACCELERATOR`` names something else.
    """
    present = torch.cuda.is_available()
    wished = os.environ.get("DS_ACCELERATOR")
    if asked == "auto" and wished not in (None, "", "cpu", "cuda"):
        raise VlscaleError(f"DS_ACCELERATOR={wished}: expected cpu or cuda; unset it or give --device")
    wants_gpu = asked == "gpu" or (asked == "auto" and wished == "cuda")
    if wants_gpu and not present:
        source = "--device gpu" if asked == "gpu" else "DS_ACCELERATOR=cuda"
        raise VlscaleError(
            f"{source}: a GPU is asked for, but PyTorch {torch.__version__} sees none; start on a machine with GPUs, "
            f"check `nvidia-smi`, or use --device cpu"
        )
    on_cpu = asked == "cpu" or not present or (asked == "auto" and wished == "cpu")
    chosen = "cpu" if on_cpu else "cuda"
    os.environ["DS_ACCELERATOR"] = chosen
    return chosen


def compute_capability(accelerator: str) -> tuple[int, int] | None:
    """Return the compute capability of the GPU, or None on a CPU."""
    return torch.cuda.get_device_capability() if accelerator == "cuda" else None


def check_compiler() -> None:
    """Make sure that DeepSpeed can compile its shared-memory operator, which it does on a CPU at start.

    ``ninja`` beside the running Python is put on PATH if it is not there.

    Raises:
        VlscaleError: ninja or a C++ compiler is missing.
    """
    if shutil.which("ninja") is None:
        beside = Path(sys.executable).parent
        if (beside / "ninja").is_file():
            os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
        else:
            raise VlscaleError("ninja is not on PATH, and DeepSpeed compiles with it on a CPU: pip install ninja")
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        raise VlscaleError(
            f"{compiler} is not on PATH, and DeepSpeed compiles with it on a CPU: install g++ or set CXX"
        )


def stand_alone() -> None:
    """Set the launcher's variables for a single process where no launcher has.

    Raises:
        VlscaleError: this is one of several tasks of a Slurm step; each would train alone, in the same folder.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise VlscaleError(
            f"task {os.environ.get('SLURM_PROCID')} of {tasks} of a Slurm step, but RANK and WORLD_SIZE are not set; "
            f"let srun start launch/slurm/task.sh, which sets them"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in alone.items()})

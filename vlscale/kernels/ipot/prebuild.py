"""Compile all CUDA kernels ahead of time, for machines whose nodes shall not compile at first use.

``VLSCALE_BUILD_CUDA=1 pip install --no-build-isolation .`` runs it; ``VLSCALE_CUDA_ARCHS`` names the architectures.
NVRTC does the work, so neither nvcc nor a GPU is needed.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from vlscale.kernels.ipot import nvrtc
from vlscale.kernels.ipot.cuda_sources import all_kernels

ARCHITECTURES = "70;80;90"
"""V100, A100, H100."""


def architectures(text: str) -> list[str]:
    """Return ``sm_70`` etc. of ``"70;80"`` or ``"7.0 8.0"``.

    Raises:
        ValueError: an entry is no architecture from sm_70 on.
    """
    found = []
    for word in re.split(r"[;,\s]+", text.strip()):
        number = word.removeprefix("sm_").replace(".", "")
        if not re.fullmatch(r"\d{2,3}", number) or int(number) < 70:
            raise ValueError(f"VLSCALE_CUDA_ARCHS has {word!r}, expected numbers from 70 on such as {ARCHITECTURES}")
        found.append(f"sm_{number}")
    return list(dict.fromkeys(found))


def main(folder: Path) -> int:
    """Compile every kernel for every architecture into ``folder``; 1 and one line if that fails."""
    try:
        wanted = architectures(os.environ.get("VLSCALE_CUDA_ARCHS") or ARCHITECTURES)
        kernels = list(all_kernels())
        for architecture in wanted:
            for kernel in kernels:
                kernel.prebuild(architecture, folder)
    except (OSError, ValueError) as error:
        print(f"vlscale: IPOT's CUDA kernels cannot be compiled: {error}", file=sys.stderr)
        return 1
    print(f"vlscale: {len(kernels)} CUDA kernels compiled for {', '.join(wanted)} by NVRTC {nvrtc.version()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else nvrtc.PREBUILT))

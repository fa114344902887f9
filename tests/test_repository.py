"""Rules that hold for the tree as a whole: import directions, and what may be imported where."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("vlscale", "launch", "data_tools") for path in (ROOT / folder).rglob("*.py"))
ONLY_IN = {
    "deepspeed": ("vlscale/train/engine.py",),
    "streaming": ("vlscale/data/mds.py",),
    "transformers": ("vlscale/hf.py",),
    "triton": ("vlscale/kernels/",),
}
# What a package of vlscale may not import: whatever stands above it.
ABOVE = {
    "vlscale/kernels/": ("data", "models", "objectives", "train", "convert", "report"),
    "vlscale/data/": ("models", "objectives", "train", "convert", "report", "kernels"),
    "vlscale/models/": ("objectives", "train", "report"),
    "vlscale/objectives/": ("train", "report"),
    "vlscale/train/": ("report",),
}


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    modules = imported(path)
    for library, places in ONLY_IN.items():
        used = {module for module in modules if module.split(".")[0] == library}
        assert not used or name.startswith(places), f"{name} imports {library}; only {places} may"
    for folder, above in ABOVE.items():
        if name.startswith(folder):
            wrong = {module for module in modules for layer in above if module.startswith(f"vlscale.{layer}")}
            assert not wrong, f"{name} imports {wrong}, which stands above it"


def test_kernels_models_objectives_and_planning_need_neither_deepspeed_nor_streaming() -> None:
    """They are used on machines that have neither: check that no import chain from them reaches one."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules.update(dict.fromkeys(('deepspeed', 'streaming', 'transformers')))\n"
        "import vlscale.kernels.attention, vlscale.kernels.ipot, vlscale.models.uniter, vlscale.objectives\n"
        "import vlscale.data.plan, vlscale.data.deal, vlscale.data.dataset, vlscale.data.loader, vlscale.train.optim\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)

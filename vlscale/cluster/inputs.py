"""What a training script needs on every host: known from its arguments, before a host is asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlscale.errors import VlscaleError


@dataclass(frozen=True)
class Needs:
    """What every host must have.

    Attributes:
        paths: local files and folders.
        gpus: whether each process takes a GPU.
        posix_shell: whether the login shell has to be one.
    """

    paths: tuple[str, ...]
    gpus: bool
    posix_shell: bool = False


def needs_of(script: Path, arguments: Sequence[str]) -> Needs:
    """Return what a script needs: itself, and for ``launch/pretrain.py`` what it is given.

    That is the DeepSpeed JSON, the recipe, the roots of its datasets and the weights it starts from. Remote roots, and
    what other scripts read, are their own business.

    Raises:
        VlscaleError: the script, or a file that its arguments name, is missing or wrong on this host already.
        SystemExit: the script's arguments are wrong, or ask for its help.
    """
    if not script.is_file():
        raise VlscaleError(f"script {script}: no such file here")
    resolved = script.resolve()
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    if (resolved.parent.name, resolved.name) != ("launch", "pretrain.py"):
        return Needs((str(script),), not on_cpu)
    from vlscale.config import load_recipe
    from vlscale.train.ds_config import find_recipe, read_ds_config
    from vlscale.train.options import parse

    args = parse(str(script), arguments)
    read_ds_config(args.ds_config)
    recipe_path = args.recipe or find_recipe(args.ds_config, resolved.parent / "recipes")
    recipe = load_recipe(recipe_path, tuple(args.set))
    roots = [dataset.root for dataset in (*recipe.data.datasets, *recipe.data.validation)]
    found = [script, args.ds_config, recipe_path, *(root for root in roots if isinstance(root, Path))]
    found += [recipe.model.init_from] if recipe.model.init_from else []
    gpus = args.device == "gpu" or (args.device == "auto" and not on_cpu)
    return Needs(tuple(dict.fromkeys(map(str, found))), gpus)

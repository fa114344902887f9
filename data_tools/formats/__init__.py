"""The foreign formats, by name.

Each is a module with

* ``KIND``: ``"images"`` or ``"texts"``, which of the two import tools takes it;
* ``HELP``: one line for ``--help``;
* ``add_arguments(parser)``: adds the format's own options. The tools add the ones that all formats share:
  ``sources`` (list of Path), ``--out``, ``--on-error``, ``--exclude``, ``--workers``, ... (``data_tools/options.py``);
  an option that names a file has ``type=Path``, which lets a second run notice that the file has changed;
* ``open_source(options)``: an :class:`~data_tools.records.ImageSource` or :class:`~data_tools.records.TextSource` for
  the parsed options. It is called again in each worker process, so it is cheap, and nothing needs to be pickled.

Modules are imported when they are asked for, so that one format's packages are not needed by the others.
"""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType
from typing import Any

from vlscale.errors import VlscaleError, nearest

FORMATS: dict[str, str] = {
    name: f"data_tools.formats.{name}"
    for name in (
        "bottom_up_tsv",
        "coco_captions",
        "conceptual_captions",
        "flickr30k",
        "image_folder",
        "image_only",
        "jsonl_texts",
        "karpathy",
        "lxmert_tsv",
        "parquet_texts",
        "plain_text",
        "sbu",
        "unimo_images",
        "unimo_texts",
        "uniter_images",
        "uniter_texts",
        "uniter_vcr_images",
        "uniter_vcr_texts",
        "vilbert_captions",
        "vilbert_lmdb",
        "vinvl_tsv",
        "visual_genome",
        "webdataset",
    )
}
"""Name -> module. On the command line ``-`` may stand for ``_``."""


def find_format(name: str, kind: str) -> ModuleType:
    """Import the module of a format.

    Args:
        name: as the command line says it.
        kind: ``images`` or ``texts``, what the calling tool imports.

    Raises:
        VlscaleError: there is no such format, it is of the other kind, or a package that it needs is missing.
    """
    key = name.replace("-", "_")
    if key not in FORMATS:
        known = ", ".join(FORMATS)
        raise VlscaleError(f"format {name!r} is not known{nearest(key, FORMATS)} (known: {known})")
    try:
        module = importlib.import_module(FORMATS[key])
    except ImportError as error:
        raise VlscaleError(f"format {name!r}: {error}; pip install 'vlscale[import]'") from None
    if kind != module.KIND:
        raise VlscaleError(f"format {name!r} holds {module.KIND}; use python -m data_tools.import_{module.KIND}")
    return module


def open_source(name: str, kind: str, options: argparse.Namespace) -> Any:
    """Open the source of a format; see :mod:`data_tools.formats`."""
    return find_format(name, kind).open_source(options)

"""Extract region features from pictures: ``python -m data_tools.extract_regions EXTRACTOR FOLDER --out ROOT``.

Writes ``ROOT/images`` and, for detectors, ``ROOT/classes``, as the import tools do: resumable, in parts, with
``--shard i/n`` for array jobs and ``--merge``. Weights are given as a file; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_tools.build import import_images
from data_tools.build_images import Choice as Kept
from data_tools.fingerprint import describe_options
from data_tools.options import OneLineParser, add_exclusion, add_run, exclusion, fraction, number, run_of
from data_tools.regions.types import Choice, Extractor
from vlscale.errors import VlscaleError, one_line_errors

EXTRACTORS = {
    "bottom_up": "bottom-up attention (Faster R-CNN, ResNet-101 C4/res5, Visual Genome): features, classes, attributes",
    "torchvision": "a Faster R-CNN of torchvision: box-head features and classes",
    "grid": "a ResNet of torchvision: one region per cell of its last map",
}

NUMBERING = {
    "bottom_up": "; objects 1..1600 and attributes 1..400 count the lines of the Visual Genome vocabularies from 1 "
    "(0, background or no attribute, never stands there)",
    "torchvision": "; objects are the detector's classes, from 1 (0 is the background)",
    "grid": "",
}
"""What ``extra.objects`` and ``extra.attributes`` count; for images/meta.json."""


def parser_of(extractor: str) -> OneLineParser:
    """Return the command line of one extractor."""
    parser = OneLineParser(
        prog=f"python -m data_tools.extract_regions {extractor}", description=EXTRACTORS[extractor], allow_abbrev=False
    )
    parser.add_argument("sources", nargs=1, type=Path, metavar="FOLDER", help="pictures, in any depth")
    parser.add_argument("--out", type=Path, required=True, metavar="ROOT", help="the dataset's folder")
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="FILE", help="safetensors, or a PyTorch file of tensors alone"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--batch", type=number(1, 1024), default=8, metavar="N", help="pictures at a time (default 8)")
    parser.add_argument(
        "--follow-links", action="store_true", help="read linked folders, and links to pictures outside FOLDER"
    )
    parser.add_argument("--feature-dtype", choices=("float16", "float32"), default="float16", help="default float16")
    parser.add_argument("--codec", choices=("none", "lossless", "uint8"), default="lossless", help="of the features")
    if extractor == "grid":
        parser.add_argument("--backbone", default="resnet101", metavar="NAME", help="torchvision's (resnet101)")
        parser.add_argument(
            "--size", type=number(32, 320), default=224, metavar="N", help="pixels a side (default 224)"
        )
        parser.add_argument("--classes", type=number(1, 65536), default=1000, metavar="N", help="of the weights' head")
    else:
        _add_choice(parser)
    if extractor == "torchvision":
        parser.add_argument("--detector", default="fasterrcnn_resnet50_fpn", metavar="NAME", help="of torchvision")
        parser.add_argument(
            "--classes", type=number(2, 65536), default=91, metavar="N", help="with the background (91)"
        )
    add_run(parser)
    add_exclusion(parser.add_argument_group("images that models are evaluated on"))
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--boxes", type=Path, metavar="FILE", help='given boxes, JSON lines {"image": id, "boxes": [...]}'
    )
    parser.add_argument(
        "--box-format",
        choices=("xyxy", "xywh"),
        default="xyxy",
        help="of --boxes, in pixels",
    )
    parser.add_argument("--min-regions", type=number(1, 300), default=10, metavar="N", help="at least (default 10)")
    parser.add_argument("--max-regions", type=number(1, 300), default=100, metavar="N", help="at most (default 100)")
    parser.add_argument("--confidence", type=fraction, default=0.2, metavar="C", help="keep regions from C on (0.2)")
    parser.add_argument("--nms", type=fraction, default=0.3, metavar="IOU", help="suppression per class (0.3)")


def make_extractor(options: argparse.Namespace) -> Extractor:
    """Build the network and load its weights.

    Raises:
        VlscaleError: the network is not known, or the weights are not its own.
    """
    from data_tools.regions import bottom_up, grid, torchvision_detector, weights

    network: Any
    if options.extractor == "bottom_up":
        network = bottom_up.BottomUp()
    elif options.extractor == "torchvision":
        network = torchvision_detector.TorchvisionDetector(options.detector, options.classes)
    else:
        network = grid.GridBackbone(options.backbone, options.size, options.classes)
    # A published file holds the bare network's names, not the wrapper's.
    weights.load(getattr(network, "network", network), options.weights)
    return network


def open_regions(options: argparse.Namespace, make: Callable[[], Extractor]) -> Any:
    """Return the :class:`~data_tools.regions.source.RegionSource` that the options ask for."""
    from data_tools.regions.source import RegionSource

    choice = Choice()
    if options.extractor != "grid":
        choice = Choice(options.min_regions, options.max_regions, options.confidence, options.nms)
    return RegionSource(
        folder=options.sources[0],
        make=make,
        boxes=getattr(options, "boxes", None),
        box_format=getattr(options, "box_format", "xyxy"),
        choice=choice,
        batch=options.batch,
        feature_dtype=options.feature_dtype,
        device=options.device,
        description=f"{EXTRACTORS[options.extractor]}; weights {options.weights.name}{NUMBERING[options.extractor]}",
        follow_links=options.follow_links,
    )


def run(
    arguments: Sequence[str], make: Callable[[argparse.Namespace], Extractor] = make_extractor
) -> dict[str, Any] | None:
    """Extract what the command line says and return the report.

    Args:
        arguments: without the program's name.
        make: builds the extractor; pickled into worker processes.

    Raises:
        VlscaleError: an option is wrong, or see :func:`data_tools.build.import_images`.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m data_tools.extract_regions EXTRACTOR FOLDER --out ROOT --weights FILE [options]\n")
        print("extractors (EXTRACTOR --help tells the options):")
        print("\n".join(f"  {name:12} {what}" for name, what in EXTRACTORS.items()))
        raise SystemExit(0 if arguments else 2)
    extractor = arguments[0].replace("-", "_")
    if extractor not in EXTRACTORS:
        raise VlscaleError(f"extractor {arguments[0]!r} is not known (known: {', '.join(EXTRACTORS)})")
    options = parser_of(extractor).parse_args(arguments[1:])
    options.extractor = options.format = extractor
    _check(options)
    return import_images(
        partial(open_regions, options, partial(make, options)),
        describe_options(options),
        run_of(options),
        Kept(codec=options.codec),
        exclusion(options),
        options.on_error == "skip",
    )


def _check(options: argparse.Namespace) -> None:
    import torch

    if options.extractor != "grid" and options.min_regions > options.max_regions:
        raise VlscaleError(f"--min-regions {options.min_regions} is more than --max-regions {options.max_regions}")
    if options.extractor != "grid" and options.boxes is None and options.box_format != "xyxy":
        raise VlscaleError("--box-format says how --boxes are written; give both")
    if options.merge:
        return  # no network is built: any machine may merge what GPUs have extracted
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise VlscaleError(f"--device {options.device}: not usable here ({str(error).splitlines()[0][:100]})") from None
    if device.type != "cpu" and options.workers > 1:
        raise VlscaleError(
            f"--workers {options.workers}: a GPU is fed by one process; use --shard i/n for several GPUs"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line tool."""
    with one_line_errors("extract_regions"):
        run(sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()

"""What a build tells, and when: exclusions that match nothing, rows of a part under way, files that are missing."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from functools import partial

import pytest
from rich.console import Console

from data_tools import unpack_images
from data_tools.build import import_images
from data_tools.build_images import Choice
from data_tools.fingerprint import describe_options
from data_tools.parts import Run
from data_tools.texts import import_texts
from data_tools.under_way import rows_under_way
from tests.data_tools.test_import_build import QUIET, images_into
from tests.data_tools.toy_sources import ToyImages, ToyTexts, ToyTokenizer, tree
from vlscale.data.store import ImageStore
from vlscale.errors import VlscaleError


def test_images_in_folders_are_excluded_by_their_names(tmp_path):
    faults = ((3, "id:val/img3"), (4, "id:val/img4"))
    report = images_into(tmp_path, ToyImages(faults=faults), excluded=frozenset({"img3", "img9"}))
    assert (report["rows"], report["excluded"]) == (22, 2)
    assert "warning" not in report
    store = ImageStore(tmp_path / "images")
    assert {"val/img3", "img9"}.isdisjoint(store.row(row)["id"] for row in range(22))


class FolderTexts(ToyTexts):
    """Their first image lies in a folder."""

    def read(self, part):
        for text in super().read(part):
            yield dataclasses.replace(text, images=tuple(f"val/{i}" if i == "img0" else i for i in text.images))


def test_texts_of_images_in_folders_are_left_out_with_them(tmp_path):
    """Otherwise they would be bad rows, whose image is missing."""
    images_into(tmp_path, ToyImages(faults=((0, "id:val/img0"),)), excluded=frozenset({"img0"}))
    excluded = frozenset({"img0"})
    report = import_texts(FolderTexts, ToyTokenizer, {"format": "toy"}, Run(tmp_path), excluded, console=QUIET)
    assert (report["rows"], report["excluded"], report["dropped"]) == (23, 1, {})


@pytest.mark.parametrize("how", ["ids", "options"])
def test_exclusions_that_match_nothing_are_told_loudly(tmp_path, how):
    written = io.StringIO()
    excluded = frozenset({"COCO_val2014_000000000042"}) if how == "ids" else frozenset()
    described = {"format": "toy", "exclude_karpathy": [{"name": "dataset_coco.json"}] if how == "options" else []}
    run = Run(tmp_path)
    report = import_images(ToyImages, described, run, excluded=excluded, console=Console(file=written, width=60))
    assert "NOT ONE image" in report["warning"]
    (line,) = [line for line in written.getvalue().splitlines() if line.startswith("WARNING: ")]
    assert "--exclude-karpathy" in line
    assert "warning" not in images_into(tmp_path / "not asked for")


def test_rows_are_counted_from_inside_a_part(tmp_path, monkeypatch):
    """A part may be the whole source: what stands beside the bar moves all the same."""
    monkeypatch.setattr("data_tools.under_way.EVERY_SECONDS", 0)
    seen = []
    read = ToyImages.read

    def watched(self, part):
        for record in read(self, part):
            yield record
            seen.append(rows_under_way())

    monkeypatch.setattr(ToyImages, "read", watched)
    import_images(partial(ToyImages, count=1, rows=9), {"format": "toy"}, Run(tmp_path), console=QUIET)
    assert seen == list(range(9))
    assert rows_under_way() == 0


def test_merging_does_not_ask_the_source_what_its_images_share(tmp_path, monkeypatch):
    """Region extraction would build its network for it."""
    images_into(tmp_path / "whole")
    with pytest.raises(VlscaleError, match="nothing is built here yet"):
        images_into(tmp_path / "shards", merge=True)
    assert not (tmp_path / "shards/.parts").exists()
    for shard in ((0, 2), (1, 2)):
        images_into(tmp_path / "shards", shard=shard)
    monkeypatch.delattr(ToyImages, "layout")
    images_into(tmp_path / "shards", merge=True)
    assert tree(tmp_path / "shards") == tree(tmp_path / "whole")


def test_missing_files_are_told_before_anything_is_begun(tmp_path):
    (tmp_path / "source").write_text("x")
    good = {"sources": [tmp_path / "source"], "boxes": None, "out": tmp_path / "none yet", "image_id": "{id}"}
    describe_options(argparse.Namespace(**good))
    no = tmp_path / "bocks"
    for change, name in (
        ({"boxes": no}, "--boxes "),
        ({"coco_images": [no]}, "--coco-images "),
        ({"sources": [no]}, ""),
    ):
        with pytest.raises(VlscaleError, match=rf"^{name}/.*: no such file or folder"):
            describe_options(argparse.Namespace(**good | change))


@pytest.mark.parametrize("codec", ["none", "lossless", "uint8"])
def test_features_are_coded_as_was_asked_for(tmp_path, codec):
    """The writer has a default of its own."""
    images_into(tmp_path, choice=Choice(codec=codec))
    assert json.loads((tmp_path / "images/meta.json").read_bytes())["feature_codec"] == codec


def test_a_missing_tar_is_told_before_any_is_unpacked(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(VlscaleError, match=r"1\.tar: no such file"):
        unpack_images.run([str(tmp_path / "0.tar"), str(tmp_path / "1.tar"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

"""From a feature file to a store, through the command line tool, for each format that has features."""

import json

import numpy as np
import pytest

from data_tools.import_images import main, run
from tests.data_tools.feature_files import Picture, bottom_up_row, write_lines
from tests.data_tools.test_import_bottom_up import lxmert_row
from tests.data_tools.test_import_unimo import coco_row, flickr_row, snli_row
from tests.data_tools.test_import_vilbert import caption_items, captions_lmdb, downstream_item, downstream_lmdb
from tests.data_tools.test_import_vinvl import one_array, predicted, wide
from tests.data_tools.uniter_files import as_msgpack, as_npz
from tests.data_tools.uniter_files import write_images as write_uniter
from vlscale.data.store import ClassStore, ImageStore

PICTURES = [Picture(f"{100 + number}", 640 - number, 480, 2 + number % 5, seed=number) for number in range(30)]


def bottom_up(path):
    return ["bottom_up_tsv", write_lines(path / "x.tsv", [bottom_up_row(each, probs=True) for each in PICTURES])]


def lxmert(path):
    return ["lxmert_tsv", write_lines(path / "x.tsv", map(lxmert_row, PICTURES))]


def vinvl(path):
    labels = write_lines(path / "l.tsv", map(predicted, PICTURES))
    return ["vinvl_tsv", write_lines(path / "x.tsv", map(one_array, PICTURES)), "--predictions", labels]


def vilbert_captions(path):
    return ["vilbert_lmdb", captions_lmdb(path / "x.lmdb", map(caption_items, PICTURES))]


def vilbert_downstream(path):
    return ["vilbert_lmdb", downstream_lmdb(path / "x.lmdb", map(downstream_item, PICTURES))]


def unimo_coco(path):
    rows = [coco_row(each, f"{each.id}{number}") for each in PICTURES for number in range(2)]
    return ["unimo_images", write_lines(path / "x.txt", rows)]


def unimo_snli_ve(path):
    return ["unimo_images", write_lines(path / "x.txt", [snli_row(each, "d" + each.id) for each in PICTURES])]


def unimo_flickr(path):
    return ["unimo_images", write_lines(path / "x.tsv", map(flickr_row, PICTURES))]


def uniter(path):
    arrays = {
        f"{each.id}.npz": {
            "features": each.features,
            "norm_bb": np.concatenate([each.unit_boxes, each.unit_boxes[:, 2:] - each.unit_boxes[:, :2]], 1),
            "conf": np.linspace(0.9, 0.3, each.regions).astype(np.float32),
            "soft_labels": each.probs,
        }
        for each in PICTURES
    }
    pack = as_npz if path.name.endswith("compressed") else as_msgpack
    write_uniter(path / "db" / "all", {name: pack(each) for name, each in arrays.items()})
    return ["uniter_images", path / "db"]


def uniter_compressed(path):
    (path / "compressed").mkdir()
    return uniter(path / "compressed")


FORMATS = {
    uniter: True,
    uniter_compressed: True,
    bottom_up: True,
    lxmert: False,
    vinvl: False,
    vilbert_captions: True,
    vilbert_downstream: False,
    unimo_coco: True,
    unimo_snli_ve: False,
    unimo_flickr: True,
}
"""Format -> whether it has class probabilities."""


def import_into(root, arguments):
    run([*map(str, arguments), "--out", str(root)])


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_the_store_holds_the_sources_arrays_in_its_dtype(tmp_path, write):
    root = tmp_path / "store"
    arguments = write(tmp_path)
    import_into(root, arguments)
    images = ImageStore(root / "images")
    assert images.meta.feature_dtype == "float32"
    assert len(images) == len(PICTURES)
    assert (root / "classes").exists() == FORMATS[write]
    for number, picture in enumerate(PICTURES):
        row = images.row(number)
        assert row["features"].dtype == np.float32
        np.testing.assert_array_equal(row["features"], wide(picture) if write is vinvl else picture.features)
        np.testing.assert_array_equal(row["boxes"], picture.unit_boxes)
        assert row["id"].partition(".")[0] == picture.id
        sides = (1, 1) if arguments[0] == "uniter_images" else (picture.width, picture.height)
        assert (row["width"], row["height"]) == sides
    if FORMATS[write]:
        classes = ClassStore(root / "classes")
        found = classes.probs(np.arange(sum(picture.regions for picture in PICTURES)))
        np.testing.assert_array_equal(found, np.concatenate([picture.probs for picture in PICTURES]))


def test_a_bad_row_stops_the_tool_with_one_line_or_is_listed(tmp_path, capsys):
    rows = [*map(bottom_up_row, PICTURES), bottom_up_row(Picture("bad"), num_boxes="4")]
    path = write_lines(tmp_path / "x.tsv", rows)
    arguments = ["bottom_up_tsv", str(path), "--out", str(tmp_path / "store")]
    with pytest.raises(SystemExit):
        main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "x.tsv: row 31: features: has 320 bytes, expected 256" in lines[0]
    import_into(tmp_path / "other", ["bottom_up_tsv", path, "--on-error", "skip"])
    assert len(ImageStore(tmp_path / "other" / "images")) == len(PICTURES)
    dropped = [json.loads(line) for line in (tmp_path / "other" / "dropped-images.jsonl").read_text().splitlines()]
    assert [row["where"] for row in dropped] == [f"{path}: row 31"]

import argparse
import json

import numpy as np
import pytest

from data_tools.formats import vinvl_tsv
from data_tools.records import BadRow, ImageLayout
from tests.data_tools.feature_files import (
    Picture,
    b64,
    good,
    json_row,
    only_bad,
    read_all,
    write_line_index,
    write_lines,
)
from vlscale.errors import VlscaleError

PICTURES = [Picture(str(2000 + number), 640, 400 + number, 2 + number % 4, seed=number) for number in range(20)]


def wide(picture):
    """Features with six more columns: the box as fractions, its width and its height."""
    unit = picture.unit_boxes
    return np.concatenate([picture.features, unit, unit[:, 2:] - unit[:, :2]], 1).astype(np.float32)


def objects(picture, **other):
    return [
        {"class": f"thing {number}", "rect": [float(side) for side in box], "conf": 0.9 - number / 10, **other}
        for number, box in enumerate(picture.boxes)
    ]


def one_array(picture):
    return json_row(picture.id, {"num_boxes": picture.regions, "features": b64(wide(picture))})


def three_columns(picture):
    return f"{picture.id}\t{picture.regions}\t{b64(wide(picture))}"


def one_each(picture):
    return json_row(picture.id, [{"feature": b64(row)} for row in wide(picture)])


def predicted(picture, **other):
    """A row of predictions: a map with the image's size."""
    about = {"image_h": picture.height, "image_w": picture.width, "num_boxes": picture.regions}
    return json_row(picture.id, {**about, "objects": objects(picture), **other})


def complete(picture):
    """A row of the detector itself: objects with their features."""
    found = [{**each, "feature": b64(row)} for each, row in zip(objects(picture), wide(picture), strict=True)]
    return predicted(picture, objects=found)


def open_source(path, rows, *options):
    parser = argparse.ArgumentParser()
    vinvl_tsv.add_arguments(parser)
    arguments = parser.parse_args(list(map(str, options)))
    arguments.sources = [write_lines(path / "val.feature.tsv", rows)]
    return vinvl_tsv.open_source(arguments)


def assert_described(record, picture):
    np.testing.assert_array_equal(record.features, wide(picture))
    np.testing.assert_array_equal(record.boxes, picture.unit_boxes)
    assert (record.id, record.width, record.height) == (picture.id, picture.width, picture.height)
    np.testing.assert_array_equal(record.conf, np.float32([0.9 - number / 10 for number in range(picture.regions)]))
    assert record.extra["objects"] == [f"thing {number}" for number in range(picture.regions)]


@pytest.mark.parametrize("row", [one_array, three_columns, one_each])
@pytest.mark.parametrize("indexed", [True, False])
def test_features_keep_their_width_and_boxes_come_from_the_last_six_columns(tmp_path, row, indexed):
    rows = [row(picture) for picture in PICTURES]
    source = open_source(tmp_path, rows)
    if indexed:
        write_line_index(source.paths[0], rows)
    source.part_bytes = 2000
    assert source.layout() == ImageLayout(22, "float32")
    assert len(source.parts()) > 2
    for record, picture in zip(good(source), PICTURES, strict=True):
        assert record.features.dtype == np.float32
        np.testing.assert_array_equal(record.features, wide(picture))
        np.testing.assert_array_equal(record.boxes, picture.unit_boxes)
        assert (record.id, record.width, record.height, record.conf) == (picture.id, 1, 1, None)


@pytest.mark.parametrize("form", ["map", "list"])
@pytest.mark.parametrize("order", ["same", "reversed"])
@pytest.mark.parametrize("indexed", [True, False])
def test_predictions_give_boxes_sizes_objects_and_confidences(tmp_path, form, order, indexed):
    described = PICTURES if order == "same" else PICTURES[::-1]
    if form == "map":
        rows = [predicted(picture) for picture in described]
    else:
        rows = [json_row(picture.id, objects(picture)) for picture in described]
    sizes = [json_row(picture.id, [{"height": picture.height, "width": picture.width}]) for picture in described]
    labels = write_lines(tmp_path / "val.label.tsv", rows)
    options = ["--predictions", labels]
    if form == "list":
        options += ["--sizes", write_lines(tmp_path / "val.hw.tsv", sizes)]
    features = [one_array(picture) for picture in PICTURES]
    source = open_source(tmp_path, features, *options)
    if indexed:
        write_line_index(source.paths[0], features)
        write_line_index(labels, rows)
    for record, picture in zip(good(source), PICTURES, strict=True):
        assert_described(record, picture)


def test_rows_of_the_detector_hold_everything(tmp_path):
    for record, picture in zip(good(open_source(tmp_path, map(complete, PICTURES))), PICTURES, strict=True):
        assert_described(record, picture)


def test_sizes_alone_give_the_size(tmp_path):
    sizes = [json_row(picture.id, [{"height": picture.height, "width": picture.width}]) for picture in PICTURES]
    path = write_lines(tmp_path / "hw.tsv", sizes)
    for record, picture in zip(
        good(open_source(tmp_path, map(one_array, PICTURES), "--sizes", path)), PICTURES, strict=True
    ):
        np.testing.assert_array_equal(record.boxes, picture.unit_boxes)
        assert (record.width, record.height) == (picture.width, picture.height)


P = Picture("7", regions=3)


def array_row(**other):
    return json_row("7", {"num_boxes": 3, "features": b64(wide(P)), **other})


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (array_row()[:-50], "the second column: is not JSON"),
        (array_row(num_boxes=4), "features: has 264 bytes, expected 352 (4 x 22 f4)"),
        (array_row(num_boxes=None), "num_boxes: None is not a whole number"),
        (array_row(num_boxes=True), "num_boxes: True is not"),
        (array_row(num_boxes=10**30), "num_boxes: "),
        (array_row(features=[1.0]), "features: [1.0] is not base64"),
        (array_row(features=b64(P.features)), "features: has 192 bytes, expected 264"),
        (array_row(features="é" * 352), "is not base64"),
        (json_row("7", {"num_boxes": 3}), "features: is missing"),
        (json_row("7", "text"), "features: is missing"),
        (json_row("7", []), "objects: 0 lies outside"),
        (json_row("7", [{"feature": b64(wide(P)[0])}, {"feature": 5}]), "feature: 5 is not base64"),
        ("7\t" + "[" * 100_000, "the second column: is not JSON"),
        ("7", "has 1 fields, expected 2 or 3"),
        ("7\tx\t" + b64(wide(P)), "num_boxes: 'x' is not"),
        (array_row(features=b64(wide(P)[:, ::-1])), "are not x1, y1, x2, y2, width, height; give --predictions"),
        (complete(P).replace('"rect": [', '"rect": ["x", '), "rect[0]: "),
        (complete(P).replace('"conf": 0.9', '"conf": NaN'), "conf[0]: [nan] is not 1 numbers"),
        (complete(P).replace('"conf": 0.9, ', ""), "conf: stands in 2 of 3 objects"),
        (complete(P).replace('"image_w": 640', '"image_w": null'), "image_w: None is not"),
        (complete(P).replace('"image_w": 640', '"image_w": 64'), "leaves the image of 64 x 480"),
    ],
)
def test_bad_rows(tmp_path, row, why):
    source = open_source(tmp_path, [*map(one_array, PICTURES), row])
    message = only_bad(source)
    assert message.startswith("val.feature.tsv: row 21: ")
    assert why in message
    assert len(message) < 300


def test_rects_without_a_size_are_bad_rows(tmp_path):
    labels = write_lines(tmp_path / "l.tsv", [json_row(P.id, objects(P))])
    source = open_source(tmp_path, [one_array(P)], "--predictions", labels)
    with pytest.raises(VlscaleError, match=r"image_w: is missing, and rect is in pixels; give --sizes"):
        read_all(source)


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (predicted(Picture("8", regions=3)), "key: '7' stands in no row of --predictions l.tsv"),
        (predicted(P, objects=objects(P)[:2]), "objects: has 2 objects for 3 rows of features"),
        (predicted(P, objects=5), "objects: is not a list of objects with rect"),
        ("7", "has no second column for '7'"),
        ("7\t{", "--predictions l.tsv: is not JSON"),
    ],
)
def test_predictions_that_do_not_fit_are_bad_rows(tmp_path, label, why):
    labels = write_lines(tmp_path / "l.tsv", [predicted(PICTURES[0]), label])
    message = only_bad(open_source(tmp_path, [one_array(PICTURES[0]), one_array(P)], "--predictions", labels))
    assert message.startswith("val.feature.tsv: row 2: ")
    assert why in message


def test_a_source_cut_off_against_its_index_is_refused(tmp_path):
    rows = [one_array(picture) for picture in PICTURES]
    source = open_source(tmp_path, rows)
    write_line_index(source.paths[0], rows)
    source.paths[0].write_bytes(source.paths[0].read_bytes()[:2000])
    with pytest.raises(VlscaleError, match=r"val\.feature\.tsv: has 2000 bytes, but its \.lineidx has a row at byte"):
        source.parts()


def test_a_part_is_read_again_the_same(tmp_path):
    source = open_source(tmp_path, map(one_array, PICTURES))
    source.part_bytes = 3000
    part = json.loads(json.dumps(source.parts()[1]))
    first, second = list(source.read(part)), list(source.read(part))
    assert [row.id for row in first] == [row.id for row in second]
    assert not any(isinstance(row, BadRow) for row in first)

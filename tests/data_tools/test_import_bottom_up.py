import argparse
import gzip

import numpy as np
import pytest

from data_tools.formats import bottom_up_tsv, lxmert_tsv
from data_tools.formats.arrays import BoxRule
from data_tools.formats.bottom_up_tsv import BottomUpTsv
from data_tools.formats.lxmert_tsv import LxmertTsv
from data_tools.import_images import main
from data_tools.records import BadRow, ImageLayout
from tests.data_tools.feature_files import (
    Picture,
    assert_same,
    b64,
    bottom_up_row,
    good,
    only_bad,
    read_all,
    write_lines,
)
from vlscale.errors import VlscaleError

PICTURES = [Picture(str(1000 + number), 640 - number, 480, 3 + number % 5, seed=number) for number in range(40)]


def open_source(module, paths, *options):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = parser.parse_args(list(options))
    arguments.sources = list(paths)
    return module.open_source(arguments)


def source_of(path, rows, *options):
    return open_source(bottom_up_tsv, [write_lines(path / "x.tsv", rows)], *options)


def test_arrays_come_back_equal_in_float32(tmp_path):
    source = source_of(tmp_path, [bottom_up_row(picture) for picture in PICTURES])
    assert source.layout() == ImageLayout(16, "float32")
    for record, picture in zip(good(source), PICTURES, strict=True):
        assert_same(record, picture)
        assert record.class_probs is None
        assert record.conf is None


def test_class_probabilities_come_back_equal(tmp_path):
    source = source_of(tmp_path, [bottom_up_row(picture, probs=True) for picture in PICTURES])
    assert source.layout() == ImageLayout(16, "float32", 7, "float32")
    for record, picture in zip(good(source), PICTURES, strict=True):
        assert_same(record, picture)
        np.testing.assert_array_equal(record.class_probs, picture.probs)


@pytest.mark.parametrize("part_bytes", [1, 700, 1500, 1 << 30])
def test_parts_of_any_size_over_several_files_give_all_images_in_order(tmp_path, part_bytes):
    paths = [
        write_lines(tmp_path / f"karpathy_val.tsv.{number}", map(bottom_up_row, PICTURES[number::2]))
        for number in (0, 1)
    ]
    source = BottomUpTsv(paths, BoxRule(), part_bytes=part_bytes)
    names = [record.id for record in good(source)]
    assert names == [picture.id for picture in [*PICTURES[0::2], *PICTURES[1::2]]]
    assert part_bytes > 1 << 20 or len(source.parts()) > 4


def test_gzip_gives_the_same(tmp_path):
    plain = write_lines(tmp_path / "x.tsv", map(bottom_up_row, PICTURES))
    packed = tmp_path / "x.tsv.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for record, picture in zip(good(open_source(bottom_up_tsv, [packed])), PICTURES, strict=True):
        assert_same(record, picture)


def test_a_heading_or_an_option_names_the_columns(tmp_path):
    order = ["image_id", "image_h", "image_w", "num_boxes", "boxes", "features"]

    def row(picture):
        fields = bottom_up_row(picture).split("\t")
        return "\t".join([fields[0], fields[2], fields[1], *fields[3:]])

    rows = [row(picture) for picture in PICTURES]
    for lines, *options in (
        (["\t".join(order), *rows],),
        (rows, "--columns", ",".join(order)),
        ([each + "\tother" for each in rows], "--columns", ",".join([*order, "_"])),
    ):
        source = source_of(tmp_path, lines, *options)
        for record, picture in zip(good(source), PICTURES, strict=True):
            assert_same(record, picture)
    with pytest.raises(VlscaleError, match=r"--columns: unknown \['width'\], missing \['image_w', 'image_h'\]"):
        source_of(tmp_path, rows, "--columns", "image_id,width,num_boxes,boxes,features")


P = Picture("1", regions=4)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (bottom_up_row(P)[:-100], "features: "),
        (bottom_up_row(P).rsplit("\t", 1)[0], "has 5 fields, expected 6; a row that was cut off?"),
        (bottom_up_row(P) + "\textra\tmore", "has 8 fields"),
        (bottom_up_row(P, features=b64(P.features[:3])), "features: has 192 bytes, expected 256 (4 x 16 f4)"),
        (bottom_up_row(P, features=b64(P.features[:, :12])), "features: has 192 bytes, expected 256"),
        (bottom_up_row(P, features=b64(P.features.astype("f8"))), "features: has 512 bytes, expected 256"),
        (bottom_up_row(P, features=b64(P.features)[:-1]), "features: is not base64"),
        (bottom_up_row(P, features="[" + b64(P.features)[1:]), "features: is not base64"),
        (bottom_up_row(P, features=b64(P.features * np.nan)), "features: has nan at [0, 0]"),
        (bottom_up_row(P, boxes=b64(P.boxes[:, :3])), "boxes: has 48 bytes, expected 64"),
        (bottom_up_row(P, boxes=b64(P.boxes[:, [2, 3, 0, 1]])), "boxes[0]: "),
        (bottom_up_row(P, boxes=b64(P.boxes - 900)), "has a negative corner"),
        (bottom_up_row(P, boxes=b64(P.boxes + 900)), "leaves the image of 640 x 480"),
        (bottom_up_row(P, num_boxes="0"), "num_boxes: 0 lies outside 1..1024"),
        (bottom_up_row(P, num_boxes="99999999"), "num_boxes: 99999999 lies outside"),
        (bottom_up_row(P, num_boxes="four"), "num_boxes: 'four' is not a whole number"),
        (bottom_up_row(P, image_w="-5"), "image_w: -5 lies outside"),
        (bottom_up_row(P, image_id=""), "image_id: '' is not a name"),
        (bottom_up_row(P, probs=True, cls_prob=b64(P.probs)), "fields"),
        ("\udce4".join("ab"), "fields"),
    ],
)
def test_bad_rows_are_one_line_with_file_row_and_field_and_the_others_are_read(tmp_path, row, why):
    path = tmp_path / "x.tsv"
    rows = [bottom_up_row(PICTURES[0]), row, *map(bottom_up_row, PICTURES[1:])]
    path.write_bytes("".join(each + "\n" for each in rows).encode("utf-8", "surrogateescape"))
    columns = ",".join(["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"])
    source = open_source(bottom_up_tsv, [path], "--columns", columns)
    message = only_bad(source)
    assert message.startswith("x.tsv: row 2: ")
    assert why in message
    assert [record.id for record in read_all(source) if not isinstance(record, BadRow)] == [p.id for p in PICTURES]


def test_an_id_that_is_not_utf8_is_a_bad_row(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes(bottom_up_row(P).encode() + b"\n" + bottom_up_row(P, image_id="@").encode().replace(b"@", b"\xe4"))
    assert only_bad(open_source(bottom_up_tsv, [path])).startswith("x.tsv: row 2: image_id: is not UTF-8")


def test_probabilities_missing_or_wrong_are_bad_rows(tmp_path):
    rows = [bottom_up_row(picture, probs=True) for picture in PICTURES[:5]]
    for row, why in (
        (bottom_up_row(P), "cls_prob: is missing, other rows have it"),
        (bottom_up_row(P, probs=True, cls_prob=b64(P.probs * 40)), "expected probabilities in 0..1"),
        (bottom_up_row(P, probs=True, cls_prob=b64(P.probs[:, :6])), "cls_prob: has 96 bytes, expected 112"),
    ):
        assert why in only_bad(source_of(tmp_path, [*rows, row]))


def test_the_last_row_cut_off_is_a_bad_row(tmp_path):
    path = write_lines(tmp_path / "x.tsv", map(bottom_up_row, PICTURES[:3]))
    path.write_bytes(path.read_bytes()[:-30])
    assert only_bad(open_source(bottom_up_tsv, [path])).startswith("x.tsv: row 3: features: ")


def test_the_commonest_width_of_the_first_rows_is_the_layout(tmp_path):
    odd = bottom_up_row(Picture("odd", regions=2, dim=15))
    rows = [odd, *map(bottom_up_row, PICTURES)]
    assert only_bad(source_of(tmp_path, rows)).startswith("x.tsv: row 1: features: has 120 bytes, expected 128")
    source = source_of(tmp_path, rows, "--feature-dim", "15")
    assert source.layout().feature_dim == 15
    assert sum(isinstance(row, BadRow) for row in read_all(source)) == len(PICTURES)


@pytest.mark.parametrize("width", ["0", "-4", "65537", "x", "1.5"])
def test_widths_that_no_feature_has_are_refused(tmp_path, capsys, width):
    path = write_lines(tmp_path / "x.tsv", map(bottom_up_row, PICTURES))
    with pytest.raises(SystemExit):
        main(["bottom_up_tsv", str(path), "--out", str(tmp_path / "out"), "--feature-dim", width])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--feature-dim: '{width}' is not a whole number in 1..65536" in line


def test_columns_that_stand_twice_are_refused(tmp_path):
    names = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features", "_", "_"]
    rows = ["\t".join([bottom_up_row(picture), "x", "y"]) for picture in PICTURES]
    assert len(good(source_of(tmp_path, rows, "--columns", ",".join(names)))) == len(PICTURES)
    names[-1] = "boxes"
    with pytest.raises(VlscaleError, match="--columns: boxes stands twice; name each column once"):
        source_of(tmp_path, rows, "--columns", ",".join(names))
    with pytest.raises(VlscaleError, match="is a heading that names a column twice"):
        source_of(tmp_path, ["\t".join(names), *rows]).layout()


def test_a_file_of_another_format_is_refused_at_once(tmp_path):
    with pytest.raises(VlscaleError, match=r"x\.tsv: row 1: has 2 fields.*is this the right format\?"):
        source_of(tmp_path, ["1\tx"]).layout()
    with pytest.raises(VlscaleError, match="missing"):
        open_source(bottom_up_tsv, [tmp_path / "missing.tsv"]).layout()


@pytest.mark.parametrize("order", ["xywh", "yxyx"])
def test_boxes_in_other_orders_need_the_option(tmp_path, order):
    def spelled(boxes):
        return (
            np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
            if order == "xywh"
            else boxes[:, [1, 0, 3, 2]]
        )

    rows = [bottom_up_row(picture, boxes=b64(spelled(picture.boxes))) for picture in PICTURES]
    assert any(isinstance(row, BadRow) for row in read_all(source_of(tmp_path, rows)))
    for record, picture in zip(good(source_of(tmp_path, rows, "--boxes", order)), PICTURES, strict=True):
        np.testing.assert_allclose(record.boxes, picture.unit_boxes, atol=1e-6)


def lxmert_row(picture, **other):
    """img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes, boxes, features."""
    numbers = np.arange(picture.regions)
    fields = {
        "img_id": picture.id,
        "img_h": str(picture.height),
        "img_w": str(picture.width),
        "objects_id": b64((numbers * 7 % 1600).astype(np.int64)),
        "objects_conf": b64((0.9 - numbers / 100).astype(np.float32)),
        "attrs_id": b64((numbers * 3 % 400).astype(np.int64)),
        "attrs_conf": b64((0.5 - numbers / 100).astype(np.float32)),
        "num_boxes": str(picture.regions),
        "boxes": b64(picture.boxes),
        "features": b64(picture.features),
    }
    return "\t".join({**fields, **other}.values())


def test_lxmert_arrays_objects_and_attributes_come_back_equal(tmp_path):
    pictures = [Picture(f"COCO_val2014_{number:012}", 500, 333, 36, seed=number) for number in range(8)]
    path = write_lines(tmp_path / "val2014_obj36.tsv", map(lxmert_row, pictures))
    source = open_source(lxmert_tsv, [path])
    assert source.layout() == ImageLayout(16, "float32")
    numbers = np.arange(36)
    for record, picture in zip(good(source), pictures, strict=True):
        assert_same(record, picture)
        assert record.conf.dtype == np.float32
        np.testing.assert_array_equal(record.conf, (0.9 - numbers / 100).astype(np.float32))
        assert record.extra["objects"] == (numbers * 7 % 1600).tolist()
        assert record.extra["attributes"] == (numbers * 3 % 400).tolist()
        np.testing.assert_array_equal(
            np.float32(record.extra["attribute_conf"]), (0.5 - numbers / 100).astype(np.float32)
        )
    assert isinstance(source, LxmertTsv)


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"objects_id": b64(np.zeros(5, np.int32))}, "objects_id: has 20 bytes, expected 40 (5 x 1 i8)"),
        ({"objects_conf": b64(np.zeros(4, np.float32))}, "objects_conf: has 16 bytes, expected 20"),
        ({"attrs_conf": b64(np.full(5, np.inf, np.float32))}, "attrs_conf: has inf"),
        ({"img_h": "x"}, "img_h: 'x' is not a whole number"),
    ],
)
def test_lxmert_bad_rows(tmp_path, other, why):
    rows = [lxmert_row(Picture("1")), lxmert_row(Picture("2"), **other)]
    message = only_bad(open_source(lxmert_tsv, [write_lines(tmp_path / "x.tsv", rows)]))
    assert message.startswith("x.tsv: row 2: ")
    assert why in message

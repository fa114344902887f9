import argparse
import json
import pickle

import lmdb
import msgpack
import numpy as np
import pytest

from data_tools.formats import vilbert_captions, vilbert_lmdb
from data_tools.formats.arrays import BoxRule
from data_tools.formats.vilbert_captions import VilbertCaptions, read_map
from data_tools.formats.vilbert_lmdb import VilbertLmdb
from data_tools.records import BadRow, ImageLayout
from tests.data_tools.feature_files import Picture, assert_same, good, only_bad, read_all, without_folder, write_lines
from vlscale.errors import VlscaleError

PICTURES = [Picture(f"{900 + number}", 320 + number, 200, 2 + number % 4, seed=number) for number in range(20)]


def write_lmdb(path, records, folder=False):
    """Write an LMDB as ``lmdb`` does: one file, or a folder with data.mdb."""
    with lmdb.open(str(path), subdir=folder, map_size=1 << 28) as env, env.begin(write=True) as transaction:
        for key, value in records.items():
            transaction.put(key, value)
    return path


def spelled(array):
    """An array as msgpack-numpy packs it."""
    return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}


def caption_items(picture, **other):
    """The eight items of a Conceptual Captions record."""
    items = {
        "features": spelled(picture.features),
        "cls_prob": spelled(picture.probs),
        "boxes": spelled(picture.boxes),
        "num_boxes": picture.regions,
        "image_h": picture.height,
        "image_w": picture.width,
        "image_id": picture.id,
        "caption": f"a caption of {picture.id}",
    }
    return list({**items, **other}.values())


def captions_lmdb(path, records):
    """Keys are numbers of eight digits; tensorpack adds the list of them."""
    named = {b"%08d" % number: msgpack.packb(record, use_bin_type=True) for number, record in enumerate(records)}
    return write_lmdb(path, {**named, b"__keys__": msgpack.packb(list(named))})


def downstream_item(picture, **other):
    item = {
        "image_id": picture.id,
        "image_h": picture.height,
        "image_w": picture.width,
        "num_boxes": picture.regions,
        "boxes": picture.boxes,
        "features": picture.features,
    }
    return {**item, **other}


def downstream_lmdb(path, items, protocol=4, folder=False):
    """Keys are image ids; ``keys`` is the pickled list of them."""
    records = {str(number).encode(): pickle.dumps(item, protocol) for number, item in enumerate(items, 100)}
    return write_lmdb(path, {**records, b"keys": pickle.dumps(list(records), protocol)}, folder)


def open_source(path, *options, module=vilbert_lmdb):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = parser.parse_args(list(options))
    arguments.sources = [path]
    return module.open_source(arguments)


@pytest.mark.parametrize("per_part", [1, 7, 1000])
def test_conceptual_captions_come_back_equal(tmp_path, per_part):
    path = captions_lmdb(tmp_path / "training_feat_all.lmdb", map(caption_items, PICTURES))
    source = VilbertLmdb([path], BoxRule(), per_part=per_part)
    assert source.layout() == ImageLayout(16, "float32", 7, "float32")
    assert len(source.parts()) == -(-21 // per_part)
    for record, picture in zip(good(source), PICTURES, strict=True):
        assert_same(record, picture)
        np.testing.assert_array_equal(record.class_probs, picture.probs)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("folder", [True, False])
def test_downstream_records_come_back_equal_from_every_protocol(tmp_path, protocol, folder):
    path = downstream_lmdb(tmp_path / "coco.lmdb", map(downstream_item, PICTURES), protocol, folder)
    source = open_source(path)
    assert source.layout() == ImageLayout(16, "float32")
    for record, picture in zip(good(source), PICTURES, strict=True):
        assert_same(record, picture)
        assert record.class_probs is None


def test_float16_features_keep_their_dtype(tmp_path):
    items = [downstream_item(picture, features=picture.features.astype("f2")) for picture in PICTURES]
    source = open_source(downstream_lmdb(tmp_path / "x.lmdb", items))
    assert source.layout() == ImageLayout(16, "float16")
    for record, picture in zip(good(source), PICTURES, strict=True):
        assert record.features.dtype == np.float16
        np.testing.assert_array_equal(record.features, picture.features.astype("f2"))


P = Picture("1", regions=3)


class Call:
    def __reduce__(self):
        return (print, ("called",))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"features": P.features[:2]}, "features: has shape 2 x 16, expected 3 x 16"),
        ({"features": P.features[:, :9]}, "features: has shape 3 x 9, expected 3 x 16"),
        ({"features": P.features.astype("f8")}, "features: is <f8, expected float32"),
        ({"features": P.features.tolist()}, "is not an array"),
        (
            {"features": np.array([[None] * 16] * 3, object)},
            "(the dtype O8, expected plain numbers)",
        ),
        ({"features": P.features * np.inf}, "features: has "),
        ({"features": Call()}, "record: is a pickle that needs builtins.print"),
        ({"boxes": P.boxes[:, [2, 3, 0, 1]]}, "boxes[0]: "),
        ({"boxes": P.boxes[:2]}, "boxes: has shape 2 x 4, expected 3 x 4"),
        ({"num_boxes": 4}, "features: has shape 3 x 16, expected 4 x 16"),
        ({"num_boxes": 5000}, "num_boxes: 5000 lies outside 1..1024"),
        ({"image_w": None}, "image_w: None is not a whole number"),
        ({"image_id": b"\xff"}, "image_id: is not UTF-8"),
        ({"image_id": ["x"]}, "image_id: "),
    ],
)
def test_bad_downstream_records(tmp_path, capsys, other, why):
    items = [*map(downstream_item, PICTURES), downstream_item(P, **other)]
    message = only_bad(open_source(downstream_lmdb(tmp_path / "coco.lmdb", items)))
    assert message.startswith("coco.lmdb: key '120': ")
    assert why in message
    assert "called" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (pickle.dumps([1, 2]), "record: is a pickled list, expected a dict"),
        (pickle.dumps({"features": 1}), "boxes: is missing"),
        (pickle.dumps(downstream_item(P))[:-40], "record: is a damaged pickle"),
        (msgpack.packb(caption_items(P))[:-5], "record: is not msgpack"),
        (msgpack.packb({"a": 1}), "record: is not a list of the 8 items"),
        (
            msgpack.packb(caption_items(P, features=spelled(P.features) | {b"kind": b"O"})),
            "features: is an array of kind",
        ),
        (
            msgpack.packb(caption_items(P, features=spelled(P.features) | {b"shape": [4, 16]})),
            "features: has 192 bytes",
        ),
        (msgpack.packb(caption_items(P, cls_prob=spelled(P.probs * 50))), "cls_prob: spans"),
        (msgpack.packb(caption_items(P, cls_prob=None)), "cls_prob: is missing"),
        (b"", "record: is not msgpack"),
    ],
)
def test_bad_records_of_any_kind(tmp_path, value, why):
    records = {b"%02d" % number: msgpack.packb(caption_items(picture)) for number, picture in enumerate(PICTURES)}
    message = only_bad(open_source(write_lmdb(tmp_path / "x.lmdb", {**records, b"99": value})))
    assert message.startswith("x.lmdb: key '99': ")
    assert why in message


def test_boxes_with_sizes_need_the_option(tmp_path):
    sides = [np.concatenate([each.boxes[:, :2], each.boxes[:, 2:] - each.boxes[:, :2]], 1) for each in PICTURES]
    items = [downstream_item(picture, boxes=boxes) for picture, boxes in zip(PICTURES, sides, strict=True)]
    path = downstream_lmdb(tmp_path / "gt.lmdb", items)
    with pytest.raises(VlscaleError, match=r"gt\.lmdb: key '100': boxes\[0\]: .*--boxes xywh"):
        open_source(path).layout()
    for record, picture in zip(good(open_source(path, "--boxes", "xywh")), PICTURES, strict=True):
        np.testing.assert_allclose(record.boxes, picture.unit_boxes, atol=1e-6)


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.001])
def test_a_truncated_lmdb_is_one_error_and_no_crash(tmp_path, kept):
    path = downstream_lmdb(tmp_path / "coco.lmdb", map(downstream_item, PICTURES * 10))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(VlscaleError, match=r"coco\.lmdb.*\n?"):
        read_all(open_source(path))


def test_what_is_no_lmdb_is_refused(tmp_path):
    write_lines(tmp_path / "x.lmdb", ["text"] * 5000)
    for name in ("x.lmdb", "missing.lmdb"):
        with pytest.raises(VlscaleError, match=name):
            open_source(tmp_path / name).parts()
    with pytest.raises(VlscaleError, match=r"empty\.lmdb: has no records"):
        open_source(write_lmdb(tmp_path / "empty.lmdb", {})).layout()


def test_captions_come_from_the_lmdb(tmp_path):
    path = captions_lmdb(tmp_path / "x.lmdb", map(caption_items, PICTURES))
    found = good(VilbertCaptions([path], per_part=6))
    assert [(text.id, text.images, text.text) for text in found] == [
        (f"{picture.id}-0", (picture.id,), f"a caption of {picture.id}") for picture in PICTURES
    ]


@pytest.mark.parametrize("indent", [None, 1])
def test_captions_come_from_json_piece_by_piece(tmp_path, monkeypatch, indent):
    monkeypatch.setattr(vilbert_captions, "_PIECE", 7)
    captions = {f"{number}": f'a "größer" \\ caption {number} 😀' for number in range(200)}
    captions["list"] = ["one", "two"]
    path = tmp_path / "caption_train.json"
    for ascii_only in (True, False):
        path.write_text(json.dumps(captions, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        assert dict(read_map(path)) == captions
    found = good(open_source(path, module=vilbert_captions))
    assert [text.text for text in found] == [*list(captions.values())[:-1], "one", "two"]
    assert [text.id for text in found][-3:] == ["199-0", "list-0", "list-1"]
    path.write_text(" { } ")
    assert list(read_map(path)) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"1": "a", "2": "b"', "is not JSON, is cut off or has an entry too long at character 16"),
        (b'{"1": "a", "2": "b"\n', "ends at character 20; it is cut off"),
        (b'{"1": "a", "2": "b', "is not JSON, is cut off"),
        (b'["a"]', "has '\\[' at character 0, expected '{'"),
        (b'{"1": "a" "2": "b"}', "has '\"' at character 10, expected ',' or '}'"),
        (b'{"1": "a", 2: "b"}', "has the key 2, expected text"),
        (b'{"1": "\xff"}', "is not UTF-8"),
    ],
)
def test_damaged_caption_files_are_one_error(tmp_path, text, why):
    path = tmp_path / "caption_train.json"
    path.write_bytes(text)
    with pytest.raises(VlscaleError, match=rf"caption_train\.json: {why}"):
        read_all(VilbertCaptions([path]))


def test_bad_captions_are_bad_rows(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"1": "fine", "2": " ", "3": None, "4": {"a": 1}, "5": "\ud800", "": "x"}))
    bad = [without_folder(str(row)) for row in read_all(VilbertCaptions([path])) if isinstance(row, BadRow)]
    assert [each.split(": ")[:3] for each in bad] == [
        *(["c.json", f"entry {number}", "caption"] for number in (2, 3, 4, 5)),
        ["c.json", "entry 6", "image_id"],
    ]

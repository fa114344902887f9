import argparse
import base64
import io
import sys
import zipfile
from unittest.mock import patch

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.formats.arrays import (
    BoxRule,
    FieldError,
    add_box_arguments,
    box_rule,
    from_base64,
    from_msgpack,
    integers,
    load_npz,
    sentence,
    typed,
    unpack_msgpack,
    whole_number,
    word,
)

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
TEXT = base64.b64encode(ROWS.tobytes())


@pytest.fixture(params=["pybase64", "binascii"])
def decoder(request, monkeypatch):
    """Decode with the fast package, and as if it were not installed."""
    if request.param == "binascii":
        monkeypatch.setitem(sys.modules, "pybase64", None)
    else:
        pytest.importorskip("pybase64")


@pytest.mark.usefixtures("decoder")
def test_base64_gives_the_array_bit_by_bit():
    np.testing.assert_array_equal(from_base64("features", TEXT, 3, 4), ROWS)
    np.testing.assert_array_equal(from_base64("features", TEXT, 3), ROWS)
    assert from_base64("ids", TEXT, 3, 2, "<i8").dtype == np.int64


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (TEXT[:-4], "has 45 bytes, expected 48"),
        (TEXT[:-3], "base64"),
        (TEXT[:20] + b"!" + TEXT[21:], "base64"),
        (TEXT[:20] + b"\n" + TEXT[20:], "is not base64: 65 characters"),
        (TEXT[:20] + b"AA==" + TEXT[20:], "base64"),
        (b"", "has 0 bytes"),
        (b"\xff" * 64, "base64"),
    ],
)
@pytest.mark.usefixtures("decoder")
def test_base64_that_is_damaged_or_of_the_wrong_length_is_refused(text, why):
    with pytest.raises(FieldError, match=f"features: .*{why}"):
        from_base64("features", text, 3, 4)


def test_base64_of_no_whole_number_of_rows_is_refused():
    with pytest.raises(FieldError, match=r"has 48 bytes, which are not 5 rows"):
        from_base64("features", TEXT, 5)
    with pytest.raises(FieldError, match=r"1\.\.65536"):
        from_base64("features", base64.b64encode(bytes(4 * 65537)), 1)


BASE64 = st.text("AZaz09+/=\n!", max_size=40).map(str.encode) | st.binary(max_size=60).map(base64.b64encode)


@given(BASE64 | st.binary(max_size=200), st.integers(1, 9), st.none() | st.integers(1, 9))
def test_no_bytes_make_base64_fail_otherwise_and_both_decoders_agree(data, rows, width):
    def outcome():
        try:
            found = from_base64("x", data, rows, width)
        except FieldError as error:
            assert str(error).startswith("x: ")  # noqa: PT017
            return None
        assert found.shape[0] == rows
        return found.tobytes()

    with patch.dict(sys.modules, {"pybase64": None}):
        plain = outcome()
    assert outcome() == plain


def packed(array, **other):
    """An array as msgpack-numpy spells it."""
    return {
        b"nd": True,
        b"type": array.dtype.str,
        b"kind": b"",
        b"shape": array.shape,
        b"data": array.tobytes(),
    } | other


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "<i8", "|u1", "|b1"])
def test_msgpack_numpy_arrays_in_all_string_types(binary, dtype):
    array = ROWS.astype(dtype)
    blob = msgpack.packb({"features": packed(array)}, use_bin_type=binary)
    found = from_msgpack("features", unpack_msgpack("record", blob)[b"features"])
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_msgpack_numpy_scalars():
    value = {b"nd": False, b"type": "<f4", b"data": np.float32(2.5).tobytes()}
    assert from_msgpack("x", unpack_msgpack("x", msgpack.packb(value))) == np.float32(2.5)
    assert from_msgpack("x", 7) == 7


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({b"kind": b"O", b"type": "|O"}, "of kind b'O'"),
        ({b"kind": b"V", b"type": [["a", "<f4"]]}, "of kind b'V'"),
        ({b"type": "|O"}, "dtype '|O'"),
        ({b"type": ">f4"}, "dtype '>f4'"),
        ({b"type": "<f4,<f4"}, "dtype"),
        ({b"type": "S4"}, "dtype"),
        ({b"shape": [3, 5]}, "48 bytes, expected 60"),
        ({b"shape": [-3, -4]}, "outside"),
        ({b"shape": [1 << 31, 1 << 31]}, "48 bytes"),
        ({b"shape": None}, "shape"),
        ({b"data": 3}, "no bytes"),
    ],
)
def test_msgpack_objects_where_arrays_should_be_are_refused(changed, why):
    blob = msgpack.packb(packed(ROWS, **{}) | changed)
    with pytest.raises(FieldError, match="features") as error:
        from_msgpack("features", unpack_msgpack("features", blob))
    assert why in str(error.value)


@pytest.mark.parametrize(
    "blob",
    [
        msgpack.packb(ROWS.tolist())[:-1],
        msgpack.packb(msgpack.ExtType(5, b"x")),
        b"\xdd\xff\xff\xff\xff",  # an array that claims four thousand million items
        b"\x91" * 5000 + b"\x01",
        b"",
        b"\xc1",
    ],
)
def test_msgpack_that_is_damaged_or_extended_is_refused(blob):
    with pytest.raises(FieldError, match="record: is not msgpack"):
        unpack_msgpack("record", blob)


def npz(**arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name + ".npy", data)
    return stream.getvalue()


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_npz_arrays_come_back_in_their_dtype():
    found = load_npz("record", npz(features=ROWS.astype(np.float16), order=np.asfortranarray(ROWS), flag=np.True_))
    assert found["features"].dtype == np.float16
    np.testing.assert_array_equal(found["features"], ROWS)
    np.testing.assert_array_equal(found["order"], ROWS)
    assert found["flag"].shape == ()
    assert set(load_npz("record", npz(a=ROWS, b=np.array([None])), names=["a"])) == {"a"}


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (npz(features=np.array([{"a": 1}], object)), "record.features: has the dtype 'object'"),
        (npz(features=np.zeros(2, [("a", "<f4")])), "dtype"),
        (npz(features=ROWS)[:-30], "not an intact npz"),
        (npz(features=ROWS).replace(b"features.npy", b"featuresXnpy", 1), "not an intact npz"),
        (b"PK\x03\x04 nothing", "not an intact npz"),
        (
            zipped(features=npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n")),
            "0 bytes",
        ),
        (zipped(features=npy_header("{'descr': __import__('os'), 'fortran_order': 0, 'shape': ()}\n")), "not an npy"),
        (zipped(features=b"\x80\x04."), "not an npy"),
        (zipped(features=b""), "not an npy"),
        (zipped(**{f"a{n}": b"" for n in range(65)}), "65 members"),
    ],
)
def test_npz_that_is_no_set_of_plain_arrays_is_refused(blob, why):
    with pytest.raises(FieldError) as error:
        load_npz("record", blob)
    assert why in str(error.value)


def test_npz_bombs_are_refused_before_they_unpack():
    bomb = npz(features=np.zeros((1 << 21,), np.float64))
    assert len(bomb) < 100_000
    with pytest.raises(FieldError, match="unpacks to more than is allowed"):
        load_npz("record", bomb, max_bytes=1 << 20)


BOXES = np.array([[0, 0, 320, 240], [10, 20, 640, 480]], np.float32)


def test_boxes_become_fractions():
    unit = BoxRule().apply("boxes", BOXES, 640, 480)
    assert unit.dtype == np.float32
    np.testing.assert_array_equal(unit, BOXES / np.array([640, 480, 640, 480], np.float32))
    np.testing.assert_array_equal(BoxRule("yxyx").apply("boxes", BOXES[:, [1, 0, 3, 2]], 640, 480), unit)
    sides = np.concatenate([BOXES[:, :2], BOXES[:, 2:] - BOXES[:, :2]], 1)
    np.testing.assert_array_equal(BoxRule("xywh").apply("boxes", sides, 640, 480), unit)


@pytest.mark.parametrize(
    ("box", "why"),
    [
        ([100, 50, 20, 60], "swapped corners"),
        ([-5, 0, 20, 60], "negative corner"),
        ([600, 400, 700, 470], "leaves the image of 640 x 480"),
        ([600, 400, 600, 470], "no area"),
        ([float("nan"), 0, 1, 1], "has nan"),
        ([float("inf"), 0, 1, 1], "has inf"),
    ],
)
def test_boxes_that_are_wrong_are_refused_by_row(box, why):
    boxes = np.array([[0, 0, 1, 1], box], np.float32)
    with pytest.raises(FieldError, match=r"^boxes.*1") as error:
        BoxRule().apply("boxes", boxes, 640, 480)
    assert why in str(error.value)


def test_xywh_boxes_read_as_corners_are_refused_and_the_message_names_the_option():
    with pytest.raises(FieldError, match="--boxes xywh"):
        BoxRule().apply("boxes", np.array([[300, 200, 50, 60]], np.float32), 640, 480)
    with pytest.raises(FieldError, match="negative size"):
        BoxRule("xywh").apply("boxes", np.array([[300, 200, -50, 60]], np.float32), 640, 480)


def test_only_explicit_options_repair_boxes():
    parser = argparse.ArgumentParser()
    add_box_arguments(parser)
    swapped, outside = np.array([[100, 50, 20, 60]], np.float32), np.array([[-64, 0, 320, 960]], np.float32)
    rule = box_rule(parser.parse_args(["--fix-boxes", "swap"]))
    np.testing.assert_array_equal(rule.apply("boxes", swapped, 100, 100), np.float32([[0.2, 0.5, 1, 0.6]]))
    with pytest.raises(FieldError, match="negative"):
        rule.apply("boxes", outside, 640, 480)
    rule = box_rule(parser.parse_args(["--fix-boxes", "clip"]))
    np.testing.assert_array_equal(rule.apply("boxes", outside, 640, 480), np.float32([[0, 0, 0.5, 1]]))
    with pytest.raises(FieldError, match="swapped"):
        rule.apply("boxes", swapped, 100, 100)
    assert box_rule(parser.parse_args([])) == BoxRule("xyxy", swap=False, clip=False)


def test_boxes_may_be_rounded_over_the_edge_by_half_a_pixel():
    unit = BoxRule().apply("boxes", np.array([[-0.2, 0, 640.4, 480]], np.float32), 640, 480)
    np.testing.assert_array_equal(unit, np.float32([[0, 0, 1, 1]]))


@pytest.mark.parametrize("value", [b"12", "12", " 12\n", 12, np.int64(12), 12.0, np.float32(12)])
def test_whole_numbers(value):
    assert whole_number("n", value) == 12


@pytest.mark.parametrize(
    "value", [b"", b"1.5", b"1e3", "²", "٣", b"9" * 5000, 1.5, float("nan"), True, None, [1], -1, 2**31]
)
def test_what_is_no_whole_number_in_range_is_refused(value):
    with pytest.raises(FieldError, match=r"^n: .*(not a whole number|outside)"):
        whole_number("n", value)


def test_names_and_texts_are_bounded_unicode():
    assert word("id", b"COCO_1.jpg") == "COCO_1.jpg"
    assert word("id", 12) == "12"
    assert sentence("text", "größer".encode()) == "größer"
    for value in (b"", b" ", b"a\x00b", b"\xff", b"x" * 513, None, 1.5, True, ["a"]):
        with pytest.raises(FieldError, match="id: "):
            word("id", value)
    with pytest.raises(FieldError, match="not UTF-8 at byte 1"):
        sentence("text", b"a\xe4")
    with pytest.raises(FieldError, match="surrogate"):
        sentence("text", "\ud800")
    with pytest.raises(FieldError, match="at most 1048576"):
        sentence("text", b"x" * (1 << 20 | 1))


def test_lists_of_integers():
    assert integers("ids", b" 1 22 3 ") == [1, 22, 3]
    assert integers("ids", b"") == []
    with pytest.raises(FieldError, match=r"ids\[1\]: 'x'"):
        integers("ids", b"1 x")
    with pytest.raises(FieldError, match="at most 2"):
        integers("ids", b"1 2 3", limit=2)


def test_typed_checks_dtype_and_shape():
    assert typed("x", ROWS, ("float32",), (3, None)) is not None
    for value, why in (
        ([1.0], "not an array"),
        (ROWS.astype(">f4"), ">f4"),
        (ROWS.astype("f8"), "<f8"),
        (ROWS[:2], "2 x 4"),
    ):
        with pytest.raises(FieldError, match="x: ") as error:
            typed("x", value, ("float32",), (3, None))
        assert why in str(error.value)

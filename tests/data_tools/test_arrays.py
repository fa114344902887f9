import argparse
import base64
import sys
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
    finite,
    from_base64,
    from_description,
    from_msgpack,
    integers,
    sentence,
    show,
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


HUGE = (10**400, -(10**400), 10**5000, np.uint64(2**64 - 1), 1e300, float("-inf"))


@pytest.mark.parametrize("value", HUGE, ids=range(len(HUGE)))
def test_numbers_as_large_as_json_and_pickles_can_spell_are_refused(value):
    with pytest.raises(FieldError, match=r"^n: .*(not a whole number|outside)"):
        whole_number("n", value)
    if isinstance(value, int):
        with pytest.raises(FieldError, match=r"^id: is a number of \d+ bits"):
            word("id", value)
    assert len(show([value])) < 50


def test_values_that_python_cannot_spell_have_a_name_in_messages():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert show(nested) == "a list"
    assert show({"a": 10**5000}) == "a dict"


@pytest.mark.parametrize("spelled", ["f4,f4", "(2)f4", "M8[s]", "V4", "a4", "f16", ">f4", "", "float", "T", 7, None])
def test_dtypes_are_those_of_plain_numbers_and_nothing_else_that_numpy_knows(spelled):
    with pytest.raises(FieldError, match=r"^x: has the dtype"):
        from_description("x", spelled, [1], b"1234")


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


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("least", [-1, 0])
def test_finite_agrees_with_numpy_about_every_kind_of_number(dtype, least):
    edges = [0.0, 5e-324, 1.0, np.finfo(dtype).max, np.finfo(dtype).tiny]
    plain = np.array([*edges, *(least * edge for edge in edges)] * 2, dtype).reshape(4, 5)
    for array in (plain, plain[:, ::2], np.asfortranarray(plain), plain[:0]):
        assert finite("x", array) is array
    for odd in (np.nan, -np.nan, np.inf, -np.inf):
        wrong = plain.copy()
        wrong[2, 4] = odd
        for array in (wrong, np.asfortranarray(wrong), wrong[:, ::2]):
            with pytest.raises(FieldError, match=r"x: has -?(nan|inf) at \[2, [24]\]"):
                finite("x", array)


@pytest.mark.parametrize("bits", range(0, 1 << 16, 257))
def test_finite_knows_all_bits_of_float16(bits):
    value = np.array([bits], np.uint16).view(np.float16)
    if np.isfinite(value).all():
        finite("x", value)
    else:
        with pytest.raises(FieldError):
            finite("x", value)

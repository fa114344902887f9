import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.formats.arrays import FieldError
from data_tools.formats.pickled import read_pickle

RECORD = {
    "image_id": "größe 12",
    "image_h": 480,
    "image_w": np.int64(640),
    "boxes": np.arange(8, dtype=np.float32).reshape(2, 4),
    "features": np.linspace(0, 1, 6).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "empty": np.zeros((0, 4), np.float32),
    "flags": np.array([True, False]),
    "score": np.float32(0.25),
    "other": [None, True, False, 1.5, -(1 << 70), b"", b"bytes\xff", (1, (2, "x"), ()), [], {}],
}


def assert_equal(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_equal(found[key], expected[key])
    else:
        assert found == expected


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_and_arrays_of_all_binary_protocols(protocol):
    assert_equal(read_pickle("record", pickle.dumps(RECORD, protocol)), RECORD)


def test_old_and_new_names_of_numpy_are_the_same():
    blob = pickle.dumps(RECORD["boxes"], 2)
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        other = blob.replace(b"cnumpy._core.multiarray", b"c" + name).replace(b"cnumpy.core.multiarray", b"c" + name)
        np.testing.assert_array_equal(read_pickle("record", other), RECORD["boxes"])


def test_pickles_of_numpy_before_1_19_are_read():
    """Those of the published features: a dtype's flags were numbers."""
    blob = pickle.dumps(RECORD["boxes"], 3)
    older = blob.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
    assert older != blob
    np.testing.assert_array_equal(read_pickle("record", older), RECORD["boxes"])


def test_shared_values_are_read_through_the_memo():
    key = b"100007"
    shared = [key, key, [key]]
    assert read_pickle("keys", pickle.dumps(shared)) == shared


class Call:
    """Would create a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_nothing_is_called(tmp_path, protocol):
    target = tmp_path / "created"
    with pytest.raises(FieldError, match=r"record: is a pickle that needs \w+\.open, expected .* values$"):
        read_pickle("record", pickle.dumps({"features": Call(str(target))}, protocol))
    assert not target.exists()


def test_nothing_is_imported():
    blob = b"\x80\x02cthis_module_prints\nthing\n."
    with pytest.raises(FieldError, match="this_module_prints"):
        read_pickle("record", blob)
    with pytest.raises(FieldError, match="needs antigravity"):
        read_pickle("record", b"\x80\x04\x8c\x0bantigravity\x8c\x03fly\x93.")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.array([1, None], object), "the dtype O8, expected plain numbers"),
        (np.zeros(2, [("a", "<f4")]), "the dtype V4, expected"),
        (np.zeros(3, ">f4"), "has the dtype '>f4'"),
        (np.array(["a"]), "the dtype U1, expected"),
        (np.datetime64("2020-01-01"), "record"),
        ({1, 2}, "is a pickle of set"),
        (1j, "complex"),
        (range(3), "range"),
        (np.dtype("f4"), "is a pickle of NumpyDtype"),
        (np.ndarray, "is a pickle of Name"),
        ({(1, 2): 3}, "a key that is neither"),
    ],
)
def test_objects_where_plain_values_should_be_are_refused(value, why):
    with pytest.raises(FieldError, match="record: ") as error:
        read_pickle("record", pickle.dumps(value))
    assert why in str(error.value)


def test_a_shape_that_its_bytes_do_not_fill_is_refused():
    blob = pickle.dumps(np.zeros((2, 4), np.float32), 4)
    for old, new in ((b"K\x02K\x04", b"K\x02K\x05"), (b"K\x02K\x04", b"M\xff\xffM\xff\xff")):
        assert old in blob
        with pytest.raises(FieldError, match="in 32 bytes, expected"):
            read_pickle("record", blob.replace(old, new, 1).replace(b"\x95", b"\x95"))


def test_bombs_of_references_and_nesting_are_refused():
    laughs = b"\x80\x02]q\x00" + b"".join(
        b"0(" + b"h" + bytes([level]) + b"h" + bytes([level]) + b"tq" + bytes([level + 1]) for level in range(60)
    )
    with pytest.raises(FieldError, match="nested too deep"):
        read_pickle("record", laughs + b".")
    wide = b"\x80\x02]q\x00" + b"".join(
        b"0(" + (b"h" + bytes([level])) * 50 + b"tq" + bytes([level + 1]) for level in range(10)
    )
    with pytest.raises(FieldError, match="refers to itself too often"):
        read_pickle("record", wide + b".")
    with pytest.raises(FieldError, match="nested"):
        read_pickle("record", b"\x80\x02]q\x00h\x00a.")  # a list that holds itself
    with pytest.raises(FieldError, match="more than 100 steps"):
        read_pickle("record", pickle.dumps(list(range(300))), max_items=100)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_makes_it_fail_otherwise(data):
    blob = bytearray(pickle.dumps(RECORD, data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_pickle("record", bytes(blob[: data.draw(st.integers(1, len(blob)))]))
    except FieldError as error:
        assert str(error).startswith("record")  # noqa: PT017

"""numpy's arrays and scalars out of pickles of every age; numpy itself says what they hold."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest

from tests.convert.hostile import refused
from vlscale.convert.numpy_values import NUMPY_CALLS, NumpyArray
from vlscale.convert.pickle_values import Grammar, read_pickle

FLAGS_NOW, FLAGS_BEFORE = b"\x89\x88\x87", b"K\x00K\x01\x87"
"""How ``(align, copy)`` of a dtype stand in pickles: False and True, until numpy 1.18 the numbers 0 and 1."""


def read(blob: bytes) -> NumpyArray:
    return read_pickle("f.pkl", io.BytesIO(blob), len(blob), Grammar(calls=NUMPY_CALLS))


def of_python_2(value: np.float64) -> bytes:
    """A scalar as numpy under Python 2 pickled it: all its texts and bytes are ``str``."""
    dtype = b"cnumpy\ndtype\nU\x02f8" + FLAGS_BEFORE + b"R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return b"\x80\x02cnumpy.core.multiarray\nscalar\n" + dtype + b"U\x08" + value.tobytes() + b"\x86R."


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("value", [np.arange(6, dtype="f4").reshape(2, 3), np.float64(0.1), np.array([True, False])])
def test_pickles_of_numpy_before_1_19_are_read(value, protocol):
    now = pickle.dumps(value, protocol)
    before = now.replace(FLAGS_NOW, FLAGS_BEFORE).replace(b"\x89\x88\x94\x87", b"K\x00K\x01\x94\x87")
    assert before != now
    blob = before if protocol < 4 else before[:2] + before[11:]  # without the frame, whose length has changed
    assert np.array_equal(pickle.loads(blob), value)
    for each in (read(now), read(blob)):
        assert each.shape == value.shape
        assert each.data == value.tobytes()
        assert np.dtype(each.dtype.plain()) == value.dtype


@pytest.mark.parametrize("number", [0.0, 2.0, 0.1])
def test_pickles_of_python_2_are_read(number):
    """The bytes of 0.0 and 2.0 are text too, those of 0.1 are not."""
    blob = of_python_2(np.float64(number))
    assert pickle.loads(blob, encoding="latin1") == number
    assert read(blob).plain() == number


def test_other_flags_of_a_dtype_are_refused():
    blob = pickle.dumps(np.float64(1), 2)
    for flags in (b"K\x02K\x01\x87", b"\x89N\x87", b"\x89]\x87"):
        with refused("the dtype f8, expected plain numbers"):
            read(blob.replace(FLAGS_NOW, flags))

"""npz files: what numpy writes comes back, and nothing else gets further than one FieldError."""

import io
import zipfile

import numpy as np
import pytest

from data_tools.formats.arrays import FieldError
from data_tools.formats.npz import load_npz

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
PLAIN = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "bool"]


def npz(save=np.savez_compressed, **arrays):
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


def zipped(method=zipfile.ZIP_DEFLATED, **members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name + ".npy", data)
    return stream.getvalue()


def npy(array, version=(1, 0)):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


def npy_header(text, data=b""):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin-1") + data


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", PLAIN)
def test_arrays_come_back_in_their_dtype_and_order(save, dtype):
    arrays = {
        "rows": ROWS.astype(dtype),
        "order": np.asfortranarray(ROWS.astype(dtype)),
        "flag": np.ones((), dtype),
        "none": np.zeros((0, 4), dtype),
        "deep": np.arange(24).reshape(2, 3, 4).astype(dtype),
    }
    found = load_npz("record", npz(save, **arrays))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_all_versions_of_the_header_are_read(version):
    found = load_npz("record", zipped(features=npy(ROWS, version)))
    np.testing.assert_array_equal(found["features"], ROWS)


def test_only_the_named_arrays_are_looked_at():
    assert set(load_npz("record", npz(a=ROWS, b=np.array([None])), names=["a", "c"])) == {"a"}


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }\n"


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (npz(features=np.array([{"a": 1}], object)), "record.features: has the dtype '|O'"),
        (npz(features=np.zeros(2, [("a", "<f4")])), "of plain dtype and shape"),
        (npz(features=ROWS.astype(">f4")), "has the dtype '>f4'"),
        (npz(features=np.array(["text"])), "has the dtype '<U4'"),
        (npz(features=ROWS)[:-30], "not an intact npz"),
        (npz(features=ROWS).replace(b"features.npy", b"featuresXnpy", 1), "is not where the directory says"),
        (b"PK\x03\x04 nothing", "not an intact npz"),
        (b"", "not an intact npz"),
        (zipped(features=npy_header(HEADER % "1000000000000")), "has 0 bytes, expected 4000000000000"),
        (zipped(features=npy_header(HEADER % ("9" * 3000))), "of plain dtype and shape"),
        (zipped(features=npy_header(HEADER % ("1, " * 9 + "1"), b"1234")), "10 dimensions"),
        (zipped(features=npy_header(HEADER % "-1")), "of plain dtype and shape"),
        (zipped(features=npy_header("{'descr': __import__('os'), 'fortran_order': 0, 'shape': ()}\n")), "not an npy"),
        (zipped(features=npy_header("(" * 60_000)), "its header has 60000 bytes"),
        (zipped(features=npy_header("(" * 4000)), "of plain dtype and shape"),
        (zipped(features=npy_header("{'descr': '<f4\n")), "of plain dtype and shape"),
        (zipped(features=b"\x93NUMPY\x01\x00\xff\xff"), "its header has 65535 bytes"),
        (zipped(features=b"\x93NUMPY\x09\x00\x00\x00"), "not an npy"),
        (zipped(features=b"\x80\x04."), "not an npy"),
        (zipped(features=b""), "not an npy"),
        (zipped(**{f"a{n}": b"" for n in range(65)}), "65 members"),
        (zipped(zipfile.ZIP_LZMA, features=npy(ROWS)), "packed with method 14"),
        (zipped(zipfile.ZIP_BZIP2, features=npy(ROWS)), "packed with method 12"),
    ],
)
def test_what_is_no_set_of_plain_arrays_is_refused(blob, why):
    with pytest.raises(FieldError) as error:
        load_npz("record", blob)
    assert why in str(error.value)
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def test_a_name_that_stands_twice_is_refused():
    twice = zipped(a=npy(ROWS), b=npy(ROWS)).replace(b"b.npy", b"a.npy")
    with pytest.raises(FieldError, match="'a' stands twice"):
        load_npz("record", twice)


def test_bombs_are_refused_before_they_unpack():
    bomb = npz(features=np.zeros((1 << 21,), np.float64))
    assert len(bomb) < 100_000
    with pytest.raises(FieldError, match="unpacks to more than is allowed"):
        load_npz("record", bomb, max_bytes=1 << 20)


def test_a_directory_that_promises_less_than_a_member_unpacks_to_is_a_bomb_too():
    bomb = bytearray(npz(features=np.zeros((1 << 21,), np.float64)))
    entry = bomb.rindex(b"PK\x01\x02")
    bomb[entry + 24 : entry + 28] = (1000).to_bytes(4, "little")  # the member's size in the directory
    with pytest.raises(FieldError, match="more or less than the 1000 bytes"):
        load_npz("record", bytes(bomb), max_bytes=1 << 20)


def mutants(blob, count, seed):
    """Files with bytes changed, cut out, doubled or exchanged with those of another place."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        data = bytearray(blob)
        for _ in range(rng.integers(1, 5)):
            at, size = (int(rng.integers(0, max(len(data), 1))), int(rng.integers(1, 20)))
            kind = rng.integers(0, 5)
            if kind == 0 and data:
                data[at] = int(rng.integers(0, 256))
            elif kind == 1:
                data[at : at + 4] = rng.choice([b"\0" * 4, b"\xff" * 4, b"\x0e\0\0\0", b"\1\0\0\0"])
            elif kind == 2:
                del data[at : at + size]
            elif kind == 3:
                data[at:at] = data[at : at + size]
            elif data:
                data[at : at + size] = data[int(rng.integers(0, len(data))) :][:size]
        yield bytes(data)


def survive(blob):
    """Read a damaged file; anything but arrays or one line is a defect."""
    try:
        found = load_npz("record", blob, max_bytes=1 << 20)
    except FieldError as error:
        assert str(error).startswith("record")  # noqa: PT017
        return False
    assert all(array.dtype.kind in "fiub" for array in found.values())
    return True


SEEDS = {
    "deflated": npz(features=ROWS, conf=ROWS[:, 0]),
    "stored": npz(np.savez, features=ROWS, conf=ROWS[:, 0]),
    "lzma": zipped(zipfile.ZIP_LZMA, features=npy(ROWS)),
}


@pytest.mark.parametrize("kind", SEEDS)
def test_no_mutation_of_a_file_gets_further_than_one_line(kind):
    survivors = sum(survive(blob) for blob in mutants(SEEDS[kind], 300, seed=1))
    assert survivors < 300


def test_no_mutation_of_a_header_gets_further_than_one_line():
    for blob in mutants(npy(ROWS)[:128], 400, seed=2):
        survive(zipped(zipfile.ZIP_STORED, features=blob + ROWS.tobytes()))

import numpy as np
import pytest

from vlscale.data.mds import open_writer

COLUMNS = {
    "id": "str",
    "count": "int",
    "half": "ndarray:float16",
    "single": "ndarray:float32",
    "ids": "ndarray:int32",
    "fixed": "ndarray:float16:5",
    "extra": "json",
}


def rows():
    rng = np.random.default_rng(0)
    for number in range(40):
        yield {
            "id": f"row {number} é",
            "count": number,
            "half": rng.standard_normal((1 + number % 3, 300 if number % 2 else 7)).astype(np.float16),
            "single": rng.standard_normal(70_000 if number == 5 else 4).astype(np.float32),
            "ids": np.arange(2 * (1 + number), dtype=np.int32)[::2],  # not contiguous
            "fixed": rng.standard_normal(5).astype(np.float16),
            "extra": {"number": number},
        }


@pytest.mark.parametrize("shard_bytes", [1 << 26, 300_000])
def test_shards_and_index_are_the_bytes_that_streaming_writes(tmp_path, shard_bytes):
    streaming = pytest.importorskip("streaming")
    with streaming.MDSWriter(
        out=str(tmp_path / "theirs"), columns=COLUMNS, hashes=["xxh64"], size_limit=shard_bytes
    ) as theirs:
        for row in rows():
            theirs.write(row)
    ours = open_writer(tmp_path / "ours", COLUMNS, shard_bytes)
    for row in rows():
        ours.write(row)
    ours.finish()
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert len(names) > (2 if shard_bytes < 1 << 20 else 1)
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name


@pytest.mark.parametrize("bad", [{"fixed": np.zeros(4, np.float16)}, {"half": np.zeros((2, 2), np.float32)},
                                 {"single": np.zeros(0, np.float32)}])  # fmt: skip
def test_arrays_of_another_shape_or_dtype_are_refused(tmp_path, bad):
    ours = open_writer(tmp_path / "ours", COLUMNS, 1 << 20)
    with pytest.raises((ValueError, KeyError)):
        ours.write({**next(iter(rows())), **bad})
    ours.cancel_future_jobs()

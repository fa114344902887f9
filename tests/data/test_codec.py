"""The codecs of features: exact for every bit pattern, small, and calm about damage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from streaming import StreamingDataset

from tests.helpers import make_dataset
from vlscale.data.codec import CODECS, decode_into, encode, shape_of
from vlscale.data.dataset import open_dataset
from vlscale.data.store_writer import ImageWriter
from vlscale.errors import VlscaleError

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)
WORDS = {np.float16: np.uint16, np.float32: np.uint32}


def blob_of(codec, features):
    return np.frombuffer(encode(codec, features), np.uint8)


def decoded(codec, blob, like):
    found = np.full_like(like, 7)
    decode_into(codec, blob, found)
    return found


def detector_like(zeros, dtype=np.float16, rows=36, seed=0):
    """Pooled features behind a ReLU: half-normal, a share of them exactly zero."""
    rng = np.random.default_rng(seed)
    features = np.abs(rng.standard_normal((rows, 2048))).astype(dtype)
    features[rng.random(features.shape) < zeros] = 0
    return features


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), zeros=st.sampled_from([0.0, 0.04, 0.5, 1.0]))
def test_lossless_keeps_every_bit(dtype, data, zeros):
    """Any bits: -0.0, subnormal numbers, infinity, every NaN."""
    words = data.draw(hnp.arrays(WORDS[dtype], SHAPES))
    seed = data.draw(st.integers(0, 99))
    words = np.where(np.random.default_rng(seed).random(words.shape) < zeros, 0, words).astype(WORDS[dtype])
    blob = blob_of("lossless", words.view(dtype))
    assert shape_of(blob) == words.shape
    assert np.array_equal(decoded("lossless", blob, words.view(dtype)).view(WORDS[dtype]), words)
    assert len(blob) <= words.nbytes + 12 + 4 * words.itemsize


@pytest.mark.parametrize(("zeros", "most"), [(0.0, 0.80), (0.05, 0.80), (0.5, 0.48), (0.8, 0.24), (1.0, 0.07)])
def test_lossless_is_small(zeros, most):
    """Needed: 0.65 of the raw size at 50 % zeros."""
    features = detector_like(zeros)
    assert len(encode("lossless", features)) <= most * features.nbytes


def test_noise_costs_a_header():
    noise = np.random.default_rng(0).integers(0, 1 << 16, (36, 2048), np.uint16).view(np.float16)
    assert len(encode("lossless", noise)) <= noise.nbytes + 20


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_uint8_errs_by_half_a_step_of_each_region(dtype):
    features = detector_like(0.5, dtype) * np.linspace(0.1, 30, 36, dtype=dtype)[:, None]
    features[3] = 2.5
    found = decoded("uint8", blob_of("uint8", features), features)
    wide = features.astype(np.float64)
    step = (wide.max(1) - wide.min(1)) / 255
    slack = wide.max(1) * (2**-10 if dtype == np.float16 else 2**-20)  # rounding to the stored dtype
    assert np.all(np.abs(found.astype(np.float64) - wide).max(1) <= step / 2 + slack)
    assert np.array_equal(found[3], features[3])
    assert len(encode("uint8", features)) == 12 + 36 * (8 + 2048)


def test_uint8_refuses_what_it_cannot_hold():
    for bad in (np.inf, np.nan):
        with pytest.raises(ValueError, match="does not take NaN"):
            encode("uint8", np.array([[1, bad]], np.float32))
    with pytest.raises(ValueError, match="range beyond float32"):
        encode("uint8", np.array([[3e38, -3e38]], np.float32))


def test_other_arrays_are_refused():
    for features in (np.ones(3, np.float16), np.ones((2, 2)), np.ones((2, 2), np.int16)):
        with pytest.raises(ValueError, match="does not take"):
            encode("lossless", features)
    with pytest.raises(ValueError, match="does not take"):
        encode("none", np.ones((2, 2), np.float16))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_blobs_of_other_arrays_are_refused(codec, dtype):
    features = detector_like(0.5, dtype, rows=3)
    blob = blob_of(codec, features)
    other = {np.float16: np.float32, np.float32: np.float16}[dtype]
    for target in (features[:2].copy(), np.empty((3, 2047), dtype), np.empty((3, 2048), other)):
        with pytest.raises(ValueError, match="codes"):
            decode_into(codec, blob, target)
    with pytest.raises(ValueError, match="codec number"):
        decode_into({"lossless": "uint8", "uint8": "lossless"}[codec], blob, features.copy())
    with pytest.raises(ValueError, match="not contiguous"):
        decode_into(codec, blob, np.empty((3, 4096), dtype)[:, ::2])
    with pytest.raises(ValueError, match="fewer than a header"):
        decode_into(codec, blob[:11], features.copy())


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damage_raises_or_gives_numbers(codec, data):
    """Flips, cuts, additions and rubbish: a ValueError or some array, never anything else."""
    features = detector_like(data.draw(st.sampled_from([0.0, 0.5, 1.0])), rows=data.draw(st.integers(1, 3)))
    blob = blob_of(codec, features).copy()
    kind = data.draw(st.sampled_from(["flip", "cut", "add", "rubbish", "swap"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.one_of(st.integers(0, 40), st.integers(0, len(blob) - 1)))
            blob[min(place, len(blob) - 1)] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        blob = blob[: data.draw(st.integers(0, len(blob) - 1))]
    elif kind == "add":
        blob = np.concatenate([blob, np.zeros(data.draw(st.integers(1, 99)), np.uint8)])
    elif kind == "rubbish":
        rubbish = np.frombuffer(data.draw(st.binary(min_size=0, max_size=200)), np.uint8)
        blob = np.concatenate([blob[:12], rubbish])
    else:
        blob[12:] = blob[12:][::-1].copy()
    target = np.empty_like(features)
    refused = False
    try:
        decode_into(codec, blob, target)
    except ValueError:
        refused = True
    assert refused or kind in ("flip", "swap", "rubbish")


def test_a_frame_that_claims_much_is_refused_before_it_is_unpacked():
    import zstandard

    features = detector_like(0.0, rows=2)
    blob = encode("lossless", features)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    low = blob[12 : 12 + 4 + 2 * 2048]
    forged = blob[:12] + low + len(bomb).to_bytes(4, "little") + bomb
    with pytest.raises(ValueError, match="a zstd frame of 67108864 bytes, expected 4096"):
        decoded("lossless", np.frombuffer(forged, np.uint8), features)


@pytest.mark.parametrize("codec", ["none", *CODECS])
def test_streaming_reads_coded_rows(tmp_path, codec):
    """The codec stands in index.json, and a plain StreamingDataset decodes it once the encoding is registered."""
    from vlscale.data.mds import register_encodings

    root = make_dataset(tmp_path / "data", images=12, codec=codec)
    encodings = json.loads((root / "images" / "index.json").read_text())["shards"][0]["column_encodings"]
    assert any(codec in encoding for encoding in encodings) is (codec != "none")
    assert json.loads((root / "images" / "meta.json").read_text())["feature_codec"] == codec
    register_encodings()
    ours = open_dataset("a", root)
    theirs = StreamingDataset(local=str(root / "images"), batch_size=1)
    for row in range(12):
        assert np.array_equal(theirs[row]["features"], ours.images.row(row)["features"])


def test_writer_codes_by_default(tmp_path):
    features = detector_like(0.5, rows=5)
    boxes = np.tile([[0.1, 0.1, 0.5, 0.5]], (5, 1))
    sizes = {}
    for codec in ("none", "lossless", "uint8", None):
        options = {} if codec is None else {"codec": codec}
        with ImageWriter(tmp_path / str(codec), 2048, **options) as writer:
            writer.write("a", 9, 9, features, boxes)
        sizes[codec] = next((tmp_path / str(codec) / "images").glob("*.mds")).stat().st_size
    assert sizes[None] == sizes["lossless"] < 0.5 * sizes["none"]
    with pytest.raises(VlscaleError, match="has compressed the features already"):
        ImageWriter(tmp_path / "twice", 2048, compression="zstd:3")
    with (
        pytest.raises(VlscaleError, match="compression 'zstd:99x'"),
        ImageWriter(tmp_path / "odd", 2048, codec="none", compression="zstd:99x"),
    ):
        pass


def test_writers_compress_whole_shards_where_features_are_not_coded(tmp_path):
    """Such shards are decompressed once, into the cache, and hold the same rows; without a cache the cure is named."""
    from vlscale.data.remote import CacheSettings

    plain = make_dataset(tmp_path / "plain", images=30, codec="none")
    packed = make_dataset(tmp_path / "packed", images=30, codec="none", compression="zstd:3")
    sizes = [sum(path.stat().st_size for path in root.rglob("shard*")) for root in (plain, packed)]
    assert sizes[1] < sizes[0]
    with pytest.raises(VlscaleError, match="cache"):
        open_dataset("a", packed)
    ours = open_dataset("a", packed, cache=CacheSettings(tmp_path / "cache"))
    theirs = open_dataset("a", plain)
    rows = np.arange(30)
    for one, other in zip(ours.images.regions(rows, 100), theirs.images.regions(rows, 100), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(ours.classes.probs(rows), theirs.classes.probs(rows))
    assert np.array_equal(ours.texts.input_ids(rows)[0], theirs.texts.input_ids(rows)[0])

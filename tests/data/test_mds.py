"""The edge to streaming: compressed shards, and URLs that go to streaming's downloaders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.data.remotes import counted, open_counting
from tests.data.test_remote import everything, flip
from tests.helpers import make_dataset
from vlscale.data import fetch, mds
from vlscale.data.cache import ShardCache
from vlscale.data.dataset import open_dataset
from vlscale.data.index import read_index
from vlscale.data.reader import MdsReader
from vlscale.data.remote import CachedFiles, CacheSettings
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("mds") / "data", images=14)


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / "data")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.0)
    monkeypatch.setattr(fetch, "_LOOK_S", 0.01)


COMPRESSIONS = ["zstd:3", "zstd", "gz:1", "bz2:1", "br:1", "snappy"]


def compress(root: Path, algorithm: str) -> None:
    """Write every shard of a dataset anew as streaming's MDSWriter does with compression."""
    from streaming.base.compression import compress as theirs
    from streaming.base.hashing import get_hash

    for folder in (root / "texts", root / "images", root / "classes"):
        index = json.loads((folder / "index.json").read_text())
        for shard in index["shards"]:
            path = folder / shard["raw_data"]["basename"]
            packed = theirs(algorithm, path.read_bytes())
            name = f"{path.name}.{algorithm.partition(':')[0]}"
            (folder / name).write_bytes(packed)
            shard["compression"] = algorithm
            shard["zip_data"] = {"basename": name, "bytes": len(packed), "hashes": {"xxh64": get_hash("xxh64", packed)}}
            path.unlink()
        (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("algorithm", COMPRESSIONS)
def test_compressed_shards_are_decompressed_into_the_cache(root, tmp_path, algorithm) -> None:
    expected = everything(open_dataset("toy", root))
    compress(root, algorithm)
    with pytest.raises(VlscaleError, match=r"only the compressed .* is there; set data\.cache"):
        open_dataset("toy", root)
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log")
    assert everything(cached) == expected
    assert set(counted(tmp_path / "log").values()) == {1}
    name = cached.texts.reader.index.shards[0].zip.basename
    assert not list(cached.root.glob(f"**/*{Path(name).suffix}"))
    (cached.root / "texts" / "shard.00000.mds").unlink()
    flip(root / "texts" / name)
    with pytest.raises(VlscaleError, match=r"shard\.00000\.mds\.\w+: damaged: its xxh64"):
        open_counting(root, tmp_path / "cache", tmp_path / "log").texts.row(0)


def test_what_streaming_writes_with_compression_is_read(tmp_path) -> None:
    from streaming import MDSWriter

    columns = {"a": "int", "b": "str"}
    with MDSWriter(
        out=str(tmp_path / "s"), columns=columns, compression="zstd:7", hashes=["xxh64"], size_limit=500
    ) as out:
        for row in range(50):
            out.write({"a": row, "b": "x" * row})
    cache = ShardCache(tmp_path / "cache", None)
    place = cache.folder / "key" / "store"
    place.mkdir(parents=True)
    shutil.copy(tmp_path / "s" / "index.json", place)
    index = read_index(place, columns, on_disk=False)
    assert len(index.shards) > 3
    reader = MdsReader(index, True, CachedFiles(index, tmp_path / "s", cache, fetch.Fetcher()))
    assert [reader.row(row) for row in range(50)] == [{"a": row, "b": "x" * row} for row in range(50)]


@pytest.mark.parametrize("algorithm", COMPRESSIONS)
def test_a_bomb_or_rubbish_is_refused_before_it_is_unpacked(algorithm) -> None:
    from streaming.base.compression import compress as theirs

    bomb = theirs(algorithm, bytes(50_000_000))
    with pytest.raises(ValueError, match=r"promises|come out"):
        mds.decompress(algorithm, bomb, 1000)
    assert mds.decompress(algorithm, theirs(algorithm, b"good" * 250), 1000) == b"good" * 250
    packed = theirs(algorithm, os.urandom(1000))
    for damaged in (b"", b"rubbish", packed[: len(packed) // 2], theirs(algorithm, bytes(999))):
        with pytest.raises(ValueError, match=r"."):
            mds.decompress(algorithm, damaged, 1000)


URLS = {
    "s3://bucket/data": "S3Downloader",
    "gs://bucket/data": "GCSDownloader",
    "azure://account/data": "AzureDownloader",
    "azure-dl://account/data": "AzureDataLakeDownloader",
    "oci://bucket@space/data": "OCIDownloader",
    "hf://datasets/org/name/data": "HFDownloader",
    "sftp://user@host/data": "SFTPDownloader",
    "dbfs:/data": "DBFSDownloader",
    "dbfs:/Volumes/data": "DatabricksUnityCatalogDownloader",
}


@pytest.mark.parametrize("url", URLS)
def test_each_kind_of_url_goes_to_streamings_downloader(url, root, tmp_path, monkeypatch) -> None:
    """The classes are streaming's; only what would open a connection is replaced."""
    from streaming.base.storage import download as theirs

    kind = getattr(theirs, URLS[url])
    asked = []

    def answer(self, remote: str, local: str, timeout: float) -> None:
        asked.append(timeout)
        assert remote.startswith(url + "/")
        source = root / remote.removeprefix(url + "/")
        if not source.exists():  # as streaming's downloaders tell it
            raise FileNotFoundError(f"Object {remote} not found.")
        shutil.copy(source, local)

    monkeypatch.setattr(kind, "__init__", lambda self: setattr(self, "_url", None))
    monkeypatch.setattr(kind, "_download_file_impl", answer)
    monkeypatch.setattr(mds, "_idle", {})
    settings = CacheSettings(tmp_path / "cache", timeout_s=7.0)
    found = open_dataset("toy", url, True, settings)
    assert everything(found) == everything(open_dataset("toy", root))
    assert set(asked) == {7.0}


def test_a_scheme_that_nobody_knows_lists_those_that_are(tmp_path) -> None:
    with pytest.raises(VlscaleError, match=r"ftp://.*no downloader is known for this scheme \(known: .*s3"):
        open_dataset("toy", "ftp://host/data", True, CacheSettings(tmp_path / "cache"))

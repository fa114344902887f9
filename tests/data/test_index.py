"""index.json and side files as an enemy would write them."""

from __future__ import annotations

import json
import os
import random
import shutil

import numpy as np
import pytest

from tests.helpers import make_dataset
from vlscale.data import index as index_module
from vlscale.data.index import Column, read_array, read_bytes, read_index
from vlscale.data.schema import TextsMeta, text_columns
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("index") / "data", classes=False) / "texts"


@pytest.fixture
def folder(source, tmp_path):
    """A private copy of a texts store."""
    return shutil.copytree(source, tmp_path / "texts")


@pytest.fixture(scope="module")
def columns(source):
    return text_columns(TextsMeta.model_validate_json((source / "meta.json").read_bytes()))


def change(folder, edit) -> None:
    path = folder / "index.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_good_index_gives_shards_in_order_and_columns_by_name(folder, columns) -> None:
    index = read_index(folder, columns)
    assert len(index.shards) > 1
    assert [shard.basename for shard in index.shards] == sorted(path.name for path in folder.glob("*.mds"))
    assert [column.name for column in index.columns] == sorted(columns)
    assert index.ends[0] == 0
    assert index.ends[-1] == 36
    assert all(shard.xxh64 for shard in index.shards)


def test_the_digest_follows_the_content_not_the_spelling(folder, columns) -> None:
    before = read_index(folder, columns).digest
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    assert read_index(folder, columns).digest == before
    change(folder, lambda content: content["shards"][0]["raw_data"]["hashes"].update(xxh64="0" * 16))
    assert read_index(folder, columns).digest != before


@pytest.mark.parametrize(
    "name", ["../x.mds", "/etc/passwd", "a/b.mds", "..", ".", "", "a\\b", "a\0b", ".hidden", "x" * 300]
)
def test_a_shard_name_that_is_not_a_plain_name_is_refused(folder, columns, name) -> None:
    change(folder, lambda content: content["shards"][1]["raw_data"].update(basename=name))
    with pytest.raises(VlscaleError, match="is not a plain file name inside the folder"):
        read_index(folder, columns)


def test_a_link_that_leaves_the_folder_is_refused_but_a_linked_folder_is_not(folder, columns, tmp_path) -> None:
    linked = tmp_path / "linked"
    linked.symlink_to(folder)
    assert len(read_index(linked, columns).shards) > 1
    shard = folder / "shard.00000.mds"
    shard.rename(tmp_path / "elsewhere.mds")
    shard.symlink_to(tmp_path / "elsewhere.mds")
    with pytest.raises(VlscaleError, match=r"shard.00000.mds: a link that leaves its folder"):
        read_index(folder, columns)


def test_a_link_loop_and_a_fifo_are_refused(folder, columns) -> None:
    shard = folder / "shard.00000.mds"
    shard.unlink()
    shard.symlink_to(shard)
    with pytest.raises(VlscaleError, match=r"shard\.00000\.mds"):
        read_index(folder, columns)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(VlscaleError, match="not a regular file"):
        read_index(folder, columns)


def test_missing_renamed_and_truncated_files_are_named(folder, columns) -> None:
    shard = folder / "shard.00001.mds"
    content = shard.read_bytes()
    shard.rename(folder / "shard.1.mds")
    with pytest.raises(VlscaleError, match=r"shard.00001.mds: which index.json lists, is missing"):
        read_index(folder, columns)
    shard.write_bytes(content[:-5])
    with pytest.raises(VlscaleError, match=f"shard.00001.mds: {len(content) - 5} bytes, expected {len(content)}"):
        read_index(folder, columns)
    (folder / "index.json").unlink()
    with pytest.raises(VlscaleError, match=r"index\.json: is missing"):
        read_index(folder, columns)


def first(content):
    return content["shards"][0]


def packed(content, name="shard.00000.mds.zstd"):
    return {**first(content)["raw_data"], "basename": name}


def test_a_compressed_shard_is_needed_uncompressed_unless_it_is_fetched(folder, columns) -> None:
    change(folder, lambda content: first(content).update(compression="zstd:3", zip_data=packed(content)))
    found = read_index(folder, columns).shards[0]
    assert found.zip is not None
    assert (found.zip.basename, found.zip.algorithm) == ("shard.00000.mds.zstd", "zstd:3")
    (folder / "shard.00000.mds").unlink()
    with pytest.raises(VlscaleError, match=r"only the compressed shard\.00000\.mds\.zstd is there; set data\.cache"):
        read_index(folder, columns)
    assert read_index(folder, columns, on_disk=False).shards[0] == found


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(version=3), "version"),
        (lambda c: c.pop("shards"), "shards"),
        (lambda c: c.update(shards={}), "shards"),
        (lambda c: first(c).update(format="xsv"), "format"),
        (lambda c: first(c).update(compression="zstd"), "compression and zip_data do not go together"),
        (lambda c: first(c).update(zip_data=packed(c)), "compression and zip_data do not go together"),
        (lambda c: first(c).update(zip_data=first(c)["raw_data"]), "listed twice"),
        (lambda c: first(c).update(compression="lzma", zip_data=packed(c)), "'lzma', which is not read here"),
        (lambda c: first(c).update(compression="zstd", zip_data=packed(c, "../x")), "not a plain file name"),
        (lambda c: first(c).update(samples=-1), "samples"),
        (lambda c: first(c).update(samples=True), "samples"),
        (lambda c: first(c).update(samples=10**9), "cannot hold 1000000000 rows"),
        (lambda c: first(c).update(samples=10**40), "samples"),
        (lambda c: first(c)["raw_data"].update(bytes=2**40), "bytes"),
        (lambda c: first(c)["raw_data"].update(bytes=2**31), "expected 2147483648 by index.json"),
        (lambda c: first(c)["raw_data"].update(hashes=None), "hashes"),
        (lambda c: first(c)["raw_data"].update(basename=["a"]), "basename"),
        (lambda c: first(c)["raw_data"].update(basename="shard.00001.mds"), "shard.00001.mds"),
        (lambda c: c["shards"].append(first(c)), "listed twice"),
        (lambda c: first(c)["column_encodings"].__setitem__(0, "pkl"), "column 'extra' has the encoding 'pkl'"),
        (lambda c: first(c)["column_encodings"].__setitem__(3, "ndarray:int64"), "column 'input_ids' has the encoding"),
        (
            lambda c: first(c)["column_names"].__setitem__(3, "ids"),
            r"columns \['extra', 'id', 'images', 'ids', 'text'\]",
        ),
        (lambda c: first(c)["column_names"].pop(), "differ in length"),
        (lambda c: first(c)["column_sizes"].__setitem__(0, 8), "column 'extra' has size 8, expected None"),
    ],
)
def test_each_lie_of_an_index_is_named(folder, columns, edit, message) -> None:
    change(folder, edit)
    with pytest.raises(VlscaleError, match=message) as caught:
        read_index(folder, columns)
    assert "index.json" in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "{", "null", '{"version": 2, "shards": [NaN]}', "[" * 200_000, '{"version": 2, ']
)
def test_what_is_not_an_index_is_refused(folder, columns, content) -> None:
    (folder / "index.json").write_text(content)
    with pytest.raises(VlscaleError, match=r"index\.json"):
        read_index(folder, columns)


def test_an_unbounded_number_in_a_field_that_is_not_read_is_refused(folder, columns) -> None:
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"size_limit": 2048', '"size_limit": ' + "9" * 10_000))
    with pytest.raises(VlscaleError, match=r"index\.json: .*JSON"):
        read_index(folder, columns)


def test_json_is_bounded(folder, columns, monkeypatch) -> None:
    monkeypatch.setattr(index_module, "MAX_JSON_BYTES", 100)
    with pytest.raises(VlscaleError, match="more than 100"):
        read_index(folder, columns)
    with pytest.raises(VlscaleError, match="missing"):
        read_bytes(folder / "index.json" / "below")


def test_random_damage_of_an_index_is_an_error_or_harmless(folder, columns) -> None:
    """Anything may stand in the file; the only exception that may come out is VlscaleError."""
    path = folder / "index.json"
    good = path.read_bytes()
    whole = read_index(folder, columns)
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(damaged))
            kind = rng.randrange(3)
            if kind == 0:
                damaged[at] = rng.randrange(256)
            elif kind == 1:
                del damaged[at : at + rng.randrange(1, 40)]
            else:
                damaged[at:at] = rng.choice(
                    (b"9" * 30, b"[", b'"', b"\xed\xa0\x80", b"\\ud800", b"null", b"-", b"1e999")
                )
        path.write_bytes(damaged)
        try:
            found = read_index(folder, columns)
        except VlscaleError as error:
            refused += 1
            assert "\n" not in str(error) or len(str(error)) < 600  # noqa: PT017
        else:
            assert found.columns == whole.columns
            assert all(shard.bytes == (folder / shard.basename).stat().st_size for shard in found.shards)
    assert refused > 200


@pytest.mark.parametrize(
    "encoding",
    [
        "pkl",
        "jpeg",
        "ndarray",
        "ndarray:object",
        "ndarray:float16:0",
        "ndarray:float16:-1",
        "ndarray:float16:2,3",
        "int ",
        "",
        "ndarray:float16:999999999999",
        "ndarray:float16:٣",
    ],
)
def test_encodings_outside_the_schema_are_unknown(encoding) -> None:
    with pytest.raises(VlscaleError, match="is not read here"):
        Column.parse("x", encoding)


def save(path, array) -> None:
    np.save(path, array)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: save(p, np.arange(35, dtype=np.int32)), "35 entries, expected 36"),
        (lambda p: save(p, np.arange(36, dtype=np.int64)), r"found int64 \[36\], expected one dimension of int32"),
        (lambda p: save(p, np.arange(36, dtype=">i4")), r"found >i4 \[36\]"),
        (lambda p: save(p, np.zeros((36, 1), np.int32)), r"found int32 \[36, 1\]"),
        (lambda p: save(p, np.int32(3)), r"found int32 \[\]"),
        (lambda p: np.save(p, np.array([{}] * 36, object), allow_pickle=True), "not a plain .npy array"),
        (lambda p: p.write_bytes(b"\x80\x04N."), "not a plain .npy array"),
        (lambda p: p.write_bytes(b""), "not a plain .npy array"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "not a plain .npy array"),
        (lambda p: p.unlink(), "lengths.npy: is missing"),
        (lambda p: (p.unlink(), p.mkdir()), "not a regular file"),
    ],
)
def test_a_side_file_of_another_kind_is_refused(folder, write, message) -> None:
    path = folder / "lengths.npy"
    write(path)
    with pytest.raises(VlscaleError, match=message) as caught:
        read_array(path, "int32", 36)
    assert "lengths.npy" in str(caught.value)


def test_an_archive_in_place_of_an_array_is_refused(folder) -> None:
    with open(folder / "lengths.npy", "wb") as stream:
        np.savez(stream, a=np.zeros(36, np.int32))
    with pytest.raises(VlscaleError, match=r"found NpzFile, expected one dimension of int32|not a plain .npy"):
        read_array(folder / "lengths.npy", "int32", 36)


@pytest.mark.parametrize(
    "shape", ["(99999999999999999999,)", "(2**60,)", "(-1,)", "(36,) * 9", "((((", "'a'", "(1.5,)", "(True,)", "None"]
)
def test_a_hostile_npy_header_is_refused(tmp_path, shape) -> None:
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    path = tmp_path / "lengths.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"\0" * 4)
    with pytest.raises(VlscaleError, match=r"lengths\.npy"):
        read_array(path, "int32", 36)


def test_random_damage_of_an_npy_header_is_an_error_or_harmless(folder) -> None:
    path = folder / "lengths.npy"
    good = path.read_bytes()
    rng = random.Random(1)
    refused = 0
    for _ in range(600):
        damaged = bytearray(good)
        for _ in range(rng.choice((1, 2, 4))):
            damaged[rng.randrange(128)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert read_array(path, "int32", 36).shape == (36,)
        except VlscaleError:
            refused += 1
    assert refused > 100

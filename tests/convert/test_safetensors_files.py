"""safetensors files and shards: read and written as the format's own library does, and no lie believed."""

from __future__ import annotations

import json
import math
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import load_torch_model, split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.convert.hostile import ReadRanges, random_tensors, read_all, refused, same_bits
from tests.golden_batches import golden_folder
from vlscale.convert import safetensors_files
from vlscale.convert.safetensors_files import (
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    open_source,
    recognise,
    write_safetensors,
)
from vlscale.convert.source import TensorInfo
from vlscale.errors import VlscaleError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, -2], dtype=torch.int64), "c.d": torch.ones(3)}
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__" and name.isprintable()
)


def _infos(tensors: dict[str, torch.Tensor]) -> list[tuple[str, TensorInfo]]:
    return [(name, TensorInfo(tensor.dtype, tuple(tensor.shape))) for name, tensor in tensors.items()]


def _write(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> tuple[Path, ...]:
    return write_safetensors(folder, _infos(tensors), tensors.__getitem__, **options)


@pytest.mark.golden
def test_golden_file_is_read_and_written_as_by_the_library(tmp_path):
    path = golden_folder("unimo") / "official" / "params.safetensors"
    expected = load_file(path)
    source = open_source(path)
    assert source.format == "safetensors"
    assert source.files == (path,)
    found = read_all(source)
    assert found.keys() == expected.keys()
    assert len(found) == 59
    assert all(same_bits(found[name], expected[name]) for name in expected)
    (written,) = write_safetensors(tmp_path / "new", source.tensors.items(), source.read)
    save_file(expected, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert written.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_opening_reads_the_header_and_reading_reads_one_range(tmp_path, monkeypatch):
    tensors = {"big": torch.zeros(1 << 18), "small": torch.ones(5), "none": torch.ones(0, 3)}
    (path,) = _write(tmp_path / "new", tensors)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    seen = ReadRanges(monkeypatch)
    source = open_source(path)
    assert seen.total() == header
    seen.ranges.clear()
    assert source.read("small").equal(tensors["small"])
    assert source.read("none").shape == (0, 3)
    assert seen.ranges == [(path, header + (1 << 20), 20)]
    assert header % 8 == 0


def test_metadata_is_kept(tmp_path):
    _write(tmp_path / "new", TENSORS, metadata={"format": "pt", "licence": "none"})
    assert open_source(tmp_path / "new").extra == {"metadata": {"format": "pt", "licence": "none"}}


@pytest.mark.parametrize("most", [1, 12, 24, 40, 52, 10**9])
def test_shards_are_those_of_the_hub_and_loadable(tmp_path, most):
    tensors = {**TENSORS, "e": torch.zeros(0), "f": torch.full((4,), float("nan")), "g": torch.ones(2).bool()}
    files = _write(tmp_path / "new", tensors, max_shard_bytes=most)
    plan = split_torch_state_dict_into_shards(tensors, max_shard_size=most)
    theirs = {file: set(names) for file, names in plan.filename_to_tensors.items()}
    assert {file.name: set(load_file(file)) for file in files if file.suffix == ".safetensors"} == theirs
    if plan.is_sharded:
        assert files[-1] == tmp_path / "new" / INDEX_FILE
        index = json.loads(files[-1].read_text())
        assert index == {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    source = open_source(tmp_path / "new")
    assert set(source.files) == set(files)
    assert recognise(tmp_path / "new")
    found = read_all(source)
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("most", [40, 10**9])
def test_written_folder_loads_into_a_module_by_the_hub(tmp_path, most):
    model, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    _write(tmp_path / "new", dict(model.state_dict()), max_shard_bytes=most)
    assert (tmp_path / "new" / INDEX_FILE).exists() == (most == 40)
    # Strict, the hub asks each shard for all names.
    assert not any(load_torch_model(other, tmp_path / "new", strict=most > 40))
    assert other.weight.equal(model.weight)
    assert other.bias.equal(model.bias)


def test_written_folder_loads_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertModel(config)
    config.save_pretrained(tmp_path / "new")
    _write(tmp_path / "new", dict(model.state_dict()), max_shard_bytes=2000)
    assert (tmp_path / "new" / INDEX_FILE).exists()
    loaded, report = transformers.BertModel.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, random_tensors(list(DTYPES.values())), max_size=5), st.integers(1, 200))
def test_round_trip_is_bit_exact(tensors, most):
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder) / "ours", tensors)
        loaded = load_file(Path(folder) / "ours" / WEIGHTS_FILE)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, Path(folder) / "theirs", {"format": "pt"})
        assert (Path(folder) / "ours" / WEIGHTS_FILE).read_bytes() == (Path(folder) / "theirs").read_bytes()
        _write(Path(folder) / "shards", tensors, max_shard_bytes=most)
        for found in (
            loaded,
            read_all(open_source(Path(folder) / "theirs")),
            read_all(open_source(Path(folder) / "shards")),
        ):
            assert found.keys() == tensors.keys()
            assert all(same_bits(found[name], tensors[name]) for name in tensors)


def test_nan_and_infinity_are_read(tmp_path):
    values = torch.tensor([math.nan, math.inf, -0.0])
    _write(tmp_path / "new", {"x": values})
    assert same_bits(open_source(tmp_path / "new").read("x"), values)


@pytest.mark.parametrize("change", ["cut", "grown", "replaced", "gone"])
def test_file_that_changes_is_noticed(tmp_path, change):
    (path,) = _write(tmp_path / "new", TENSORS)
    source = open_source(path)
    content = path.read_bytes()
    if change == "cut":
        os.truncate(path, len(content) - 4)
    elif change == "grown":
        path.write_bytes(content + b"1")
    else:
        path.rename(tmp_path / "old")
        if change == "replaced":
            path.write_bytes(content)
    with refused(path, "no such file" if change == "gone" else "has been changed"):
        source.read("a")


def _shards(folder: Path) -> dict[str, Any]:
    _write(folder, TENSORS, max_shard_bytes=28)
    return json.loads((folder / INDEX_FILE).read_text())


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", ".x.safetensors", "a\\b.safetensors"),
        *("x.bin", "x\n.safetensors", "x\0.safetensors", "n" * 250 + ".safetensors", 5, None, ["x.safetensors"]),
    ],
)
def test_index_that_leaves_the_folder_is_refused(tmp_path, name):
    index = _shards(tmp_path / "new")
    save_file(TENSORS, tmp_path / "x.safetensors")
    index["weight_map"]["a"] = name
    (tmp_path / "new" / INDEX_FILE).write_text(json.dumps(index))
    with refused("puts 'a' into", "of this folder"):
        open_source(tmp_path / "new")


def test_index_and_shards_must_agree(tmp_path):
    folder = tmp_path / "new"
    index = _shards(folder)
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 2

    def change(**names: str) -> None:
        (folder / INDEX_FILE).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **names}}))

    change(a=index["weight_map"]["b"])
    with refused("'a', which"):
        open_source(folder)
    change(more=files[0])
    with refused("lacks 'more'", "stands there by"):
        open_source(folder)
    less = {name: file for name, file in index["weight_map"].items() if name != "b"}
    (folder / INDEX_FILE).write_text(json.dumps({**index, "weight_map": less}))
    with refused("holds 'b'", "does not stand there"):
        open_source(folder)
    change(a="model-00009-of-00009.safetensors")
    with refused("model-00009-of-00009.safetensors: no such file"):
        open_source(folder)
    change()
    assert set(open_source(folder).tensors) == set(TENSORS)
    assert open_source(folder / INDEX_FILE).read("a").equal(TENSORS["a"])
    (folder / files[0]).unlink()
    with refused(files[0], "no such file"):
        open_source(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map":{}}', "has no weight_map"),
        ('{"weight_map":{"a":"x.safetensors","a":"x.safetensors"}}', "key 'a' stands twice"),
        ('{"weight_map":{"__metadata__":"x.safetensors"}}', "no name of a tensor"),
        ('{"weight_map":{"a":"x.safetensors"},"metadata":[]}', "metadata is no object"),
        ('{"weight_map":', "not valid JSON"),
        ('{"weight_map":{' + ",".join(f'"{i}":"x.safetensors"' for i in range(100_001)) + "}}", "more than 100000"),
        ('{"weight_map":{' + ",".join(f'"{i}":"{i}.safetensors"' for i in range(1001)) + "}}", "1001 shards"),
    ],
)
def test_damaged_index_is_refused(tmp_path, text, message):
    (tmp_path / INDEX_FILE).write_text(text)
    with refused(tmp_path / INDEX_FILE, message):
        open_source(tmp_path)


def test_folder_with_both_forms_or_neither_is_refused(tmp_path):
    with refused("neither of"):
        open_source(tmp_path)
    _shards(tmp_path / "new")
    save_file(TENSORS, tmp_path / "new" / WEIGHTS_FILE)
    with refused("both of"):
        open_source(tmp_path / "new")
    assert open_source(tmp_path / "new" / WEIGHTS_FILE).read("a").equal(TENSORS["a"])


def test_recognised_by_content(tmp_path):
    assert not recognise(tmp_path)
    assert not recognise(tmp_path / "missing")
    _write(tmp_path / "new", TENSORS)
    (tmp_path / "new" / WEIGHTS_FILE).rename(tmp_path / "pytorch_model.bin")
    assert recognise(tmp_path / "pytorch_model.bin")
    torch.save(TENSORS, tmp_path / WEIGHTS_FILE)
    assert not recognise(tmp_path / WEIGHTS_FILE)
    assert not recognise(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert not recognise(tmp_path / "pipe")
    with refused("not a plain one"):
        open_source(tmp_path / "pipe")


def test_writer_holds_one_tensor_and_no_copy_of_a_view(tmp_path):
    made: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        assert all(old() is None for old in made)
        made.append(weakref.ref(tensor := torch.full((1000,), float(name))))
        return tensor

    info = TensorInfo(torch.float32, (1000,))
    write_safetensors(tmp_path / "new", [(str(i), info) for i in range(9)], read, max_shard_bytes=12_000)
    assert len(made) == 9
    assert open_source(tmp_path / "new").read("7").unique().tolist() == [7.0]


@pytest.mark.parametrize("name", ["", "__metadata__", "a\nb", "\ud800", "n" * 1025])
def test_name_that_cannot_be_written_is_refused(tmp_path, name):
    with refused("cannot be the name of a tensor"):
        _write(tmp_path / "new", {"good": torch.ones(1), name: torch.ones(1)})
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_when_writing_fails(tmp_path):
    def read(name: str) -> torch.Tensor:
        if name == "b":
            raise VlscaleError("the source broke")
        return TENSORS[name]

    with refused("the source broke"):
        write_safetensors(tmp_path / "new", _infos(TENSORS), read, max_shard_bytes=24)
    assert list(tmp_path.iterdir()) == []
    with refused("torch.complex64 cannot be stored"):
        _write(tmp_path / "new", {"x": torch.ones(1, dtype=torch.complex64)})
    with refused("metadata must be strings"):
        _write(tmp_path / "new", TENSORS, metadata={"a": "\ud800"})
    with pytest.raises(ValueError, match="given twice"):
        write_safetensors(tmp_path / "new", _infos(TENSORS) * 2, TENSORS.__getitem__)
    with pytest.raises(ValueError, match="promised"):
        write_safetensors(tmp_path / "new", _infos(TENSORS), lambda name: torch.ones(7))
    with refused("its parent must exist"):
        _write(tmp_path / "missing" / "new", TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_what_a_folder_holds_is_neither_replaced_nor_deleted(tmp_path):
    (tmp_path / "model-00002-of-00002.safetensors").write_text("mine")
    with refused("model-00002-of-00002.safetensors: exists already"):
        _write(tmp_path, TENSORS, max_shard_bytes=36)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_files, "write_tensor", full)
    with refused("No space left on device"):
        _write(tmp_path / "new", TENSORS)
    assert list(tmp_path.iterdir()) == []

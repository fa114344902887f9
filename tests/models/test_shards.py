"""The index of shards: what it must be, and that the files must be what it says."""

from __future__ import annotations

import json
import os

import pytest

from tests.convert.hostile import refused
from vlscale.models import shards
from vlscale.models.shards import read_index

NAME = "model.safetensors.index.json"


def write(folder, content):
    path = folder / NAME
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_files_are_sorted_and_know_their_names(tmp_path):
    path = write(tmp_path, {"weight_map": {"x": "b.bin", "y": "a.bin", "z": "b.bin"}, "metadata": {"total_size": 3}})
    index = read_index(path, ".bin")
    assert index.files == (tmp_path / "a.bin", tmp_path / "b.bin")
    assert index.names_of == {"a.bin": {"y"}, "b.bin": {"x", "z"}}
    assert index.metadata == {"total_size": 3}
    index.check_shard(tmp_path / "b.bin", ["z", "x"])
    with refused("b.bin: lacks 'x', which stands there by", NAME, "fetch all files of one release"):
        index.check_shard(tmp_path / "b.bin", ["z"])
    with refused("b.bin: holds 'y', which does not stand there by", NAME):
        index.check_shard(tmp_path / "b.bin", ["x", "y", "z"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {"x": "../a.bin"}}, "puts 'x' into '../a.bin', expected a .bin file of this folder"),
        ({"weight_map": {"x": "a.safetensors"}}, "expected a .bin file of this folder"),
        ({"weight_map": {"x\n": "a.bin"}}, "is no name of a tensor"),
        ({"weight_map": {"": "a.bin"}}, "is no name of a tensor"),
        ({"weight_map": {str(i): f"{i}.bin" for i in range(1001)}}, "names 1001 shards"),
        ({"weight_map": {"x": "a.bin"}, "metadata": "x"}, "metadata is no object"),
        ('{"weight_map": {"x": "a.bin", "x": "b.bin"}}', "key 'x' stands twice"),
        ('{"weight_map": {"x": "a.bin"}, "more": [' + "{}," * 100 + "{}]}", "more than 100 objects"),
        ("{", "not valid JSON"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, content, message):
    with refused(tmp_path / NAME, message):
        read_index(write(tmp_path, content), ".bin")


def test_what_is_no_file_or_far_too_large_is_not_read(tmp_path):
    with refused("no such file"):
        read_index(tmp_path / NAME, ".bin")
    os.mkfifo(tmp_path / NAME)
    with refused("or not a plain one"):
        read_index(tmp_path / NAME, ".bin")
    os.unlink(tmp_path / NAME)
    with (tmp_path / NAME).open("wb") as file:
        file.truncate(shards.MOST_INDEX + 1)
    with refused("has 100000001 bytes, expected at most 100000000"):
        read_index(tmp_path / NAME, ".bin")

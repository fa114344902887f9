"""Training through a cache: damage there is mended, and a shard that stays bad is a decision that all ranks share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.multiprocess.launcher import run_together
from tests.multiprocess.recipes import recipe, write_data, write_ds_config, write_recipe

pytestmark = pytest.mark.multiprocess

WORKER = Path(__file__).with_name("remote_worker.py")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    for rank in (0, 1):
        shutil.copytree(tmp_path / "train", tmp_path / f"remote-{rank}")
    content = recipe(tmp_path, schedule={"warmup_steps": 0, "total_steps": 6})
    content["data"] |= {"validation": [], "download_retries": 1, "download_timeout_s": 5, "workers": 1}
    write_recipe(tmp_path / "small.yaml", content)
    write_ds_config(tmp_path / "small_cpu.json", 2)
    return tmp_path


def words(folder: Path) -> list[str]:
    files = ["--ds_config", folder / "small_cpu.json", "--recipe", folder / "small.yaml", "--run_dir", folder / "run"]
    return [str(folder), *map(str, files)]


def losses(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if "loss" in name} for row in rows]


@pytest.mark.parametrize("how", ["vanished", pytest.param("flipped", marks=pytest.mark.long)])
def test_a_shard_that_is_bad_for_one_rank_stops_both(folder: Path, how: str) -> None:
    for path in (folder / "remote-1" / "images").glob("*.mds"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        if how == "vanished":
            path.unlink()
    found = run_together(WORKER, *words(folder), processes=2, timeout=120)
    for done in found:
        assert done.status != 0, done.tail
        assert "Traceback" not in done.err, done.tail
    text = "".join(done.err for done in found)
    assert text.count("error: ") == 1, text
    expected = "damaged: its xxh64" if how == "flipped" else "cannot be fetched (FileNotFoundError"
    assert "[rank 1] " in text
    assert expected in text
    assert "(2 attempts)" in text


@pytest.mark.long
def test_a_damaged_cache_is_mended_and_losses_stay_the_same(folder: Path) -> None:
    found = run_together(WORKER, *words(folder), processes=2, timeout=120)
    assert [done.status for done in found] == [0, 0], found[0].tail
    expected = losses(folder / "run")
    assert len(expected) >= 6
    (folder / "run").rename(folder / "first")
    for path in folder.glob("cache-*/*/*/*.mds"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    found = run_together(WORKER, *words(folder), processes=2, timeout=120)
    assert [done.status for done in found] == [0, 0], found[0].tail
    assert losses(folder / "run") == expected

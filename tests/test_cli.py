"""The command line: what it prints, what it returns, and one line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tests.helpers import make_dataset
from vlscale.cli import main
from vlscale.data.index import record_side_files

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "tests/fixtures/demo/train"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset without a mistake."""
    return make_dataset(tmp_path_factory.mktemp("cli") / "toy", images=20, texts_without_image=3)


@pytest.fixture
def toy(whole: Path, tmp_path: Path) -> Path:
    """A copy to make a mistake in."""
    shutil.copytree(whole, tmp_path / "toy")
    return tmp_path / "toy"


def inspect_json(capsys: Capture, *arguments: object) -> Any:
    """The JSON object that ``vlscale inspect ARGUMENTS --json`` prints, which has to succeed."""
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys: Capture, *arguments: object) -> str:
    """The one line that is said about wrong arguments."""
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *map(str, arguments)])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vlscale inspect: error: ")
    assert err.count("\n") == 1, err
    return err


def test_what_verify_leaves_out_is_said(capsys: Capture, toy: Path) -> None:
    _truncate(toy / "texts/shard.00001.mds")
    assert main(["inspect", str(toy), "--verify", "--plan", "--budget", "100"]) == 1
    assert "not done because of the damage: --plan" in capsys.readouterr().err


def test_plan_options(capsys: Capture, toy: Path) -> None:
    assert "no effect without --rows or --plan" in complaint(capsys, toy, "--max-regions", 3)
    assert "padded needs --global-tokens" in complaint(capsys, toy, "--plan", "--budget", 100, "--mode", "padded")
    assert "at most 268435456" in complaint(capsys, toy, "--plan", "--budget", 99999999999)
    assert "micro-batches are more than" in complaint(capsys, toy, "--plan", "--budget", 60, "--world", 2000000)
    found = inspect_json(capsys, toy, "--plan", "--budget", 100, "--mode", "padded", "--global-tokens", 600)["plan"]
    assert found["mode"] == "padded"
    assert found["padding"] == found["padding_if_padded"] > 0
    half = inspect_json(capsys, toy, "--plan", "--budget", 100, "--world", 2, "--global-tokens", 200)["plan"]
    assert "% full" in half["advice"]
    assert "s3://b/x" in complaint(capsys, "s3://b/x", "--verify")


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments] if arguments else [sys.executable, "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | {"COLUMNS": "80"}
    )


def test_help_and_version(capsys: Capture) -> None:
    assert main([]) == 0
    assert "inspect" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vlscale ")


def test_help_of_a_command_names_its_options(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for option in ("--verify", "--rows", "--json", "--png", "--plan", "--budget"):
        assert option in said


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vlscale.cli import main\n"
        "try: main(['inspect', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_help_answers_in_under_a_second() -> None:
    """The time of the best of several starts: the others are the machine's."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        assert python("", "-m", "vlscale", "--help").returncode == 0
        taken.append(time.perf_counter() - start)
    assert min(taken) < 1.0


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["doctor", "--help"], ["plan", "--help"]], ids=" ".join)
def test_no_help_imports_torch_or_what_takes_long(words: list[str]) -> None:
    code = (
        "import sys; from vlscale.cli import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'pydantic', 'yaml', 'matplotlib', 'rich', 'deepspeed'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_inspect_needs_neither_deepspeed_nor_streaming(whole: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('deepspeed', 'streaming', 'transformers')))\n"
        "from vlscale.cli import main\n"
        f"words = ['inspect', {str(whole)!r}, '--verify', 'rows', '--rows', '0', '--plan', '--budget', '99']\n"
        "raise SystemExit(main(words))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_python_m_vlscale(whole: Path) -> None:
    done = python("", "-m", "vlscale", "inspect", str(whole))
    assert done.returncode == 0, done.stderr
    assert "ndarray:float16" in done.stdout
    assert python("", "-m", "vlscale", "inspect", "/nowhere").returncode == 2


def test_a_closed_pipe_is_no_error(whole: Path) -> None:
    command = f"{sys.executable} -m vlscale inspect {whole} --rows 0:60 --json | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stderr == ""


def test_output_that_the_terminal_cannot_show(toy: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlscale", "inspect", str(DEMO), "--rows", "0"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "####" in done.stdout


def test_the_text_shows_schema_counts_lengths_and_fingerprint(capsys: Capture) -> None:
    assert main(["inspect", str(DEMO)]) == 0
    said = capsys.readouterr().out
    schema = ["2,880 regions", "1,920", "ndarray:float16:32", "efficientnet_lite0", "vocabulary: 38 word pieces"]
    for expected in [*schema, "0 texts without image", "tokens per text", "regions per image", "tokens per example"]:
        assert expected in said, expected
    assert inspect_json(capsys, DEMO)["fingerprint"] in said


def test_a_single_store(capsys: Capture, whole: Path) -> None:
    for kind in ("texts", "images", "classes"):
        found = inspect_json(capsys, whole / kind, "--rows", "1")
        assert list(found["stores"]) == [kind]
        assert found["fingerprint"] is None
        assert main(["inspect", str(whole / kind), "--rows", "1:3"]) == 0
        assert " row 2" in capsys.readouterr().out


def test_a_remote_is_read_through_a_cache(capsys: Capture, whole: Path, tmp_path: Path) -> None:
    """A folder stands for a remote; nothing but what is looked at is fetched."""
    found = inspect_json(capsys, whole, "--cache", tmp_path / "cache", "--rows", "0")
    assert found["fingerprint"] == inspect_json(capsys, whole)["fingerprint"]
    assert found["rows"][0]["id"] == "text-0"
    fetched = list((tmp_path / "cache").rglob("*.mds"))
    assert 0 < len(fetched) < len(list(whole.rglob("*.mds")))


def test_the_text_of_rows(capsys: Capture, whole: Path) -> None:
    assert main(["inspect", str(whole), "--rows", "3:5"]) == 0
    said = capsys.readouterr().out
    for expected in ("text row 3: text-3", "image row 1: image-1", "word pieces:", "shown above", "conf"):
        assert expected in said, expected


def test_words_of_a_store_cannot_steer_the_terminal(capsys: Capture, tmp_path: Path) -> None:
    from vlscale.report.inspect_text import printable

    assert printable("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc"
    assert len(printable("x" * 10_000)) < 3000


def test_plan_in_text_and_json(capsys: Capture, whole: Path) -> None:
    asked = ("--plan", "--budget", "200", "--world", "2", "--gas", "2", "--seed", "7")
    plan = inspect_json(capsys, whole, *asked)["plan"]
    assert (plan["world_size"], plan["accumulation"]) == (2, 2)
    assert main(["inspect", str(whole), *asked]) == 0
    said = capsys.readouterr().out
    assert f"{plan['fill']:.2%}" in said
    assert f"{plan['straggler_mean']:.4f}" in said


def test_png(capsys: Capture, whole: Path, tmp_path: Path) -> None:
    main(["inspect", str(whole), "--png", str(tmp_path / "a.png")])
    main(["inspect", str(whole), "--png", str(tmp_path / "b.png"), "--plan", "--budget", "100"])
    heights = [imread(tmp_path / name).shape[0] for name in ("a.png", "b.png")]
    assert heights[1] > 1.5 * heights[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_verify_returns_1_and_lists_all_damage(capsys: Capture, toy: Path) -> None:
    shards = sorted((toy / "images").glob("shard.*"))
    for shard in (shards[0], shards[-1]):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    assert main(["inspect", str(toy), "--verify"]) == 1
    said = capsys.readouterr().out.replace("\n", "")
    assert str(shards[0]) in said
    assert str(shards[-1]) in said
    assert main(["inspect", "--verify", str(toy), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["verify"]["found"] == 2


def test_verify_of_a_whole_store(capsys: Capture, whole: Path) -> None:
    found = inspect_json(capsys, whole, "--verify", "rows")["verify"]
    assert found["found"] == 0
    assert found["stores"] == 3
    assert main(["inspect", str(whole), "--verify"]) == 0
    assert "no damage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/nowhere"], "/nowhere: is no folder"),
        ([], "which STORE?"),
        (["s3://bucket/set"], "is a remote; give --cache"),
        (["STORE", "--verify", "--cache", "x"], "--verify and --cache exclude each other"),
        (["STORE", "--rows", "x"], "--rows 'x': expected A, A:B"),
        (["STORE", "--rows", ""], "--rows ''"),
        (["STORE", "--rows", "63"], "has 63 rows, numbered 0 to 62"),
        (["STORE", "--rows", "5:5"], "has 63 rows"),
        (["STORE", "--rows", "9" * 30], "expected A, A:B"),
        (["STORE", "--rows", "-1"], "--rows '-1': expected A, A:B"),
        (["STORE", "--rows"], "see vlscale inspect --help"),
        (["STORE", "--verify", "everything"], "--verify everything"),
        (["STORE", "--budget", "10"], "--budget has no effect without --plan"),
        (["STORE", "--global-tokens", "10"], "--global-tokens has no effect without --plan"),
        (["STORE", "--plan"], "--plan needs --budget"),
        (["STORE", "--plan", "--budget", "8"], r"--budget 8 is smaller than the longest example"),
        (["STORE", "--plan", "--budget", "0"], "above 0"),
        (["STORE", "--plan", "--budget", "many"], "a whole number"),
        (["STORE", "--plan", "--budget", "99", "--gas", "2", "--global-tokens", "400"], "exclude each other"),
        (["STORE", "--plan", "--budget", "99", "--global-tokens", "5"], "--global-tokens 5 is smaller"),
        (["STORE", "--plan", "--budget", "25", "--world", "64"], "more processes than examples"),
        (["STORE", "--plan", "--budget", "99", "--task", "mlmm"], "did you mean 'mlm'?"),
        (["STORE", "--plan", "--budget", "99", "--task", "itm"], "has no image"),
        (["STORE", "--plan", "--budget", "99", "--max-text-tokens", "1"], "no text is left"),
        (["STORE/texts", "--plan", "--budget", "99"], "a plan needs texts and images"),
        (["STORE", "--png", "/nowhere/a.png"], "the folder /nowhere is not there"),
        (["STORE", "--png", "a.jpg"], "ends in .png"),
        (["STORE/classes", "--png", "a.png"], "neither texts nor images"),
        (["STORE", "--colour"], "--colour"),
        (["STORE", "STORE"], "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line(capsys: Capture, whole: Path, arguments: list[str], expected: str) -> None:
    line = complaint(capsys, *(word.replace("STORE", str(whole)) for word in arguments))
    assert expected in line


def test_unknown_command(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["inspekt"])
    assert caught.value.code == 2
    assert "did you mean 'inspect'?" in capsys.readouterr().err


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / "images/index.json").write_text("{"), "images/index.json"),
        (lambda root: (root / "images/meta.json").write_text("{}"), "images/meta.json"),
        (lambda root: (root / "texts/lengths.npy").unlink(), "texts/lengths.npy: is missing"),
        (lambda root: shutil.rmtree(root / "texts/../images"), "image"),
        (lambda root: _truncate(root / "texts/shard.00001.mds"), "texts/shard.00001.mds"),
        (lambda root: np.save(root / "images/lengths.npy", np.array([1 << 30] * 20, "<i4")), "more than"),
    ],
)
def test_a_damaged_store_is_one_line(capsys: Capture, toy: Path, damage: Callable[[Path], Any], expected: str) -> None:
    damage(toy)
    if "more than" in expected:
        record_side_files(toy / "images")
    shutil.rmtree(toy / "classes")
    if not (toy / "images").exists():
        (toy / "images").mkdir()
    assert expected in complaint(capsys, toy)


def test_a_folder_without_stores(capsys: Capture, tmp_path: Path) -> None:
    assert "neither a dataset" in complaint(capsys, tmp_path)
    (tmp_path / "meta.json").write_text('{"kind": "pickles"}')
    assert "is not of a store" in complaint(capsys, tmp_path)
    (tmp_path / "meta.json").unlink()
    (tmp_path / "index.json").write_text("{}")
    assert "meta.json" in complaint(capsys, tmp_path)


def test_a_damaged_row_is_one_line(capsys: Capture, toy: Path) -> None:
    shard = toy / "texts/shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "xxh64" in complaint(capsys, toy, "--rows", "0")

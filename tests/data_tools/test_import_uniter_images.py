"""UNITER's image databases, as the facts sheet describes them."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from data_tools.formats import FORMATS, lmdb_files, uniter_images
from data_tools.import_images import main as import_images_main
from data_tools.import_images import run as run_images
from data_tools.options import parse
from data_tools.records import BadRow
from tests.data_tools.uniter_files import (
    CLASSES,
    WIDTH,
    arrays_of,
    as_msgpack,
    as_npz,
    msgpack,
    write_images,
    write_lmdb,
)
from vlscale.data.store import ClassStore, ImageStore
from vlscale.errors import VlscaleError


def names_of(count):
    return [f"coco_val2014_{number:012d}.npz" for number in range(count)]


def assert_equal_to(root, expected, conf=True):
    store, classes = ImageStore(root / "images"), ClassStore(root / "classes")
    assert [store.row(row)["id"] for row in range(len(store))] == list(expected)
    for row, arrays in enumerate(expected.values()):
        found = store.row(row)
        assert found["features"].dtype == arrays["features"].dtype
        np.testing.assert_array_equal(found["features"], arrays["features"])
        np.testing.assert_array_equal(found["boxes"], arrays["norm_bb"][:, :4].astype(np.float32))
        np.testing.assert_array_equal(found["conf"], arrays["conf"].astype(np.float32))
        begin, count = int(store.region_ptr[row]), len(arrays["features"])
        probs = classes.probs(np.arange(begin, begin + count))
        np.testing.assert_array_equal(probs, arrays["soft_labels"].astype(np.float32))
        assert classes.meta.dtype == arrays["soft_labels"].dtype.name


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("folder", "pack"), [("feat_th0.2_max100_min10", as_msgpack), ("feat_numbb36", as_msgpack),
                                              ("feat_th0.2_max100_min10_compressed", as_npz)])  # fmt: skip
def test_image_databases_give_equal_arrays(tmp_path, folder, pack, dtype):
    expected = {name: arrays_of(number, 3 + number % 4, dtype) for number, name in enumerate(names_of(7))}
    write_images(tmp_path / "db" / folder, {name: pack(arrays) for name, arrays in expected.items()})
    counts = {name: len(arrays["features"]) for name, arrays in expected.items()}
    (tmp_path / "db/nbb_th0.2_max100_min10.json").write_text(json.dumps(counts))
    run_images(["uniter_images", str(tmp_path / "db"), "--out", str(tmp_path / "out")])
    assert_equal_to(tmp_path / "out", expected)


@pytest.mark.parametrize(("folder", "pack"), [("all", as_msgpack), ("all_compressed", as_npz)])
def test_all_is_cut_to_the_counts_or_by_confidence(tmp_path, folder, pack):
    whole = {name: arrays_of(number, 20) for number, name in enumerate(names_of(5))}
    write_images(tmp_path / "db" / folder, {name: pack(arrays) for name, arrays in whole.items()})
    counts = {name: 4 + number for number, name in enumerate(whole)}
    (tmp_path / "nbb.json").write_text(json.dumps(counts))
    arguments = ["uniter_images", str(tmp_path / "db"), "--out"]
    run_images([*arguments, str(tmp_path / "counted"), "--nbb", str(tmp_path / "nbb.json")])
    cut = {name: {key: array[: counts[name]] for key, array in whole[name].items()} for name in whole}
    assert_equal_to(tmp_path / "counted", cut)
    run_images([*arguments, str(tmp_path / "threshold"), "--min-confidence", "0.5", "--max-regions", "9",
                "--min-regions", "2"])  # fmt: skip
    kept = {name: min(max(int((each["conf"].astype(np.float32) > 0.5).sum()), 2), 9) for name, each in whole.items()}
    cut = {name: {key: array[: kept[name]] for key, array in whole[name].items()} for name in whole}
    assert_equal_to(tmp_path / "threshold", cut)


def test_several_parts_in_the_order_of_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(uniter_images, "PART_IMAGES", 3)
    expected = {name: arrays_of(number, 2) for number, name in enumerate(names_of(10))}
    folder = write_images(tmp_path / "db/all", {name: as_msgpack(arrays) for name, arrays in expected.items()})
    assert len(uniter_images.source_of([folder]).parts()) == 4
    run_images(["uniter-images", str(folder), "--out", str(tmp_path / "out")])
    assert_equal_to(tmp_path / "out", expected)


def _changed(**arrays):
    return as_msgpack({**arrays_of(1, 3), **arrays})


def _swapped():
    boxes = arrays_of(1, 3)["norm_bb"].copy()
    boxes[1, [0, 2]] = boxes[1, [2, 0]]
    return boxes


def _object():
    good = msgpack.unpackb(as_msgpack(arrays_of(1, 3)), raw=True)
    good[b"features"] = {b"nd": True, b"type": b"O", b"kind": b"O", b"shape": [3, 8], b"data": b"cos\nsystem\n."}
    return msgpack.packb(good)


BAD_RECORDS = {
    "features of another width": (_changed(features=np.zeros((3, 7), np.float16)), "features"),
    "fewer boxes": (_changed(norm_bb=arrays_of(1, 2)["norm_bb"]), "norm_bb"),
    "boxes of four numbers": (_changed(norm_bb=arrays_of(1, 3)["norm_bb"][:, :4]), "norm_bb"),
    "swapped boxes": (_changed(norm_bb=_swapped()), "norm_bb"),
    "negative boxes": (_changed(norm_bb=-arrays_of(1, 3)["norm_bb"]), "norm_bb"),
    "NaN": (_changed(features=np.full((3, WIDTH), np.nan, np.float16)), "features"),
    "integers": (_changed(features=np.zeros((3, WIDTH), np.int64)), "features"),
    "too many regions": (as_msgpack(arrays_of(1, 1025)), "features"),
    "no regions": (as_msgpack(arrays_of(1, 0)), "features"),
    "an object array": (_object(), "features"),
    "probabilities above 1": (_changed(soft_labels=np.full((3, CLASSES), 2, np.float16)), "class_probs"),
    "no features": (as_msgpack({"norm_bb": arrays_of(1, 3)["norm_bb"]}), "features"),
    "truncated msgpack": (as_msgpack(arrays_of(1, 3))[:-20], "record"),
    "truncated npz": (as_npz(arrays_of(1, 3))[:-20], "record"),
    "a pickle": (b"\x80\x04K\x01.", "record"),
    "nothing": (b"", "record"),
}


@pytest.mark.parametrize("fault", BAD_RECORDS)
def test_a_bad_record_names_file_key_and_field(tmp_path, capsys, fault):
    value, field = BAD_RECORDS[fault]
    names = names_of(3)
    values = {name: as_msgpack(arrays_of(number, 3)) for number, name in enumerate(names)}
    values[names[1]] = value
    write_images(tmp_path / "db/feat_numbb3", values)
    arguments = ["uniter_images", str(tmp_path / "db"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as raised:
        import_images_main(arguments)
    assert raised.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("import_images: error:")]
    assert len(lines) == 1
    assert "feat_numbb3" in lines[0]
    assert names[1] in lines[0]
    assert f": {field}" in lines[0]
    report = run_images([*arguments, "--on-error", "skip"])
    assert report["rows"] == 2
    assert sum(report["dropped"].values()) == 1


def test_a_count_that_does_not_fit_is_refused(tmp_path):
    (name,) = names_of(1)
    write_images(tmp_path / "db/feat_th0.2_max100_min10", {name: as_msgpack(arrays_of(0, 3))})
    for counts, message in (({name: 2}, "3 regions, expected 2"), ({name: 9}, "expected 9"), ({}, "does not have")):
        (tmp_path / "db/nbb_th0.2_max100_min10.json").write_text(json.dumps(counts))
        source = uniter_images.source_of([tmp_path / "db/feat_th0.2_max100_min10"])
        (row,) = [found for part in source.parts() for found in source.read(part)]
        assert isinstance(row, BadRow)
        assert message in row.why


def test_a_bomb_in_a_compressed_record_is_refused(tmp_path):
    arrays = {**arrays_of(0, 3), "features": np.zeros((1024, 1 << 16), np.float32), "conf": np.zeros(1 << 22)}
    folder = write_images(tmp_path / "all_compressed", {"a.npz": as_npz(arrays)})
    source = uniter_images.source_of([folder])
    (row,) = source.read(source.parts()[0])
    assert isinstance(row, BadRow)
    assert "more than is allowed" in row.why


def test_a_truncated_database_is_refused_before_it_is_read(tmp_path):
    folder = write_images(tmp_path / "all", {name: as_msgpack(arrays_of(1, 50)) for name in names_of(40)})
    data = (folder / "data.mdb").read_bytes()
    (folder / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(VlscaleError, match=r"data.mdb: truncated: \d+ bytes, expected \d+"):
        uniter_images.source_of([folder]).parts()
    (folder / "data.mdb").write_bytes(b"\0" * 100)
    with pytest.raises(VlscaleError, match="no LMDB database, or damaged"):
        lmdb_files.open_lmdb(folder)
    with pytest.raises(VlscaleError, match="is missing"):
        lmdb_files.open_lmdb(tmp_path / "nowhere")


@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\7"])
def test_a_damaged_page_is_one_line_wherever_it_is(tmp_path, fill):
    """In another process, because liblmdb aborts it at some of them unless the pages are looked at first."""
    folder = write_images(tmp_path / "all", {name: as_msgpack(arrays_of(1, 4)) for name in names_of(60)})
    data = (folder / "data.mdb").read_bytes()
    pages = len(data) // 4096
    assert pages > 6
    folders = []
    for page in range(2, pages):
        folders.append(tmp_path / f"{page}" / "all")
        folders[-1].mkdir(parents=True)
        (folders[-1] / "data.mdb").write_bytes(data[: page * 4096] + fill * 4096 + data[(page + 1) * 4096 :])
    code = (
        "import sys, pathlib\n"
        "from data_tools.formats import lmdb_files, uniter_images, vilbert_lmdb\n"
        "from vlscale.errors import VlscaleError\n"
        "for name in sys.argv[1:]:\n"
        "    path = pathlib.Path(name)\n"
        "    source, part = uniter_images.source_of([path]), {'folder': 0, 'count': 99}\n"
        "    part['first'] = 'coco_val2014_000000000000.npz'\n"
        "    reads = [source.layout, source.parts, lambda: list(source.read(part))]\n"
        "    reads += [lambda: lmdb_files.lmdb_parts([path], 5), lambda: list(vilbert_lmdb.records(path, part))]\n"
        "    for read in reads:\n"
        "        try:\n"
        "            read()\n"
        "        except VlscaleError as error:\n"
        "            assert 'damaged' in str(error), error\n"
        "            print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 5 * len(folders)


def test_what_lmdb_itself_finds_is_one_line(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "all", {name: as_msgpack(arrays_of(1, 4)) for name in names_of(60)})
    data = bytearray((folder / "data.mdb").read_bytes())
    key = names_of(1)[0].encode()
    (first,) = [at for at in range(8192, len(data), 4096) if data[at + 10] == 2 and key in data[at : at + 4096]]
    data[first : first + 4096] = bytes(4096)
    (folder / "data.mdb").write_bytes(data)
    monkeypatch.setattr(lmdb_files, "page_problem", lambda *_: "")
    source = uniter_images.source_of([folder])
    part = {"folder": 0, "first": names_of(1)[0], "count": 9}
    for read in (source.layout, source.parts, lambda: list(source.read(part))):
        with pytest.raises(VlscaleError, match=r"all: damaged .*; download it again"):
            read()


def test_databases_of_every_depth_pass_the_look_at_their_pages(tmp_path):
    for count in (0, 1, 100, 20_000):
        folder = write_lmdb(tmp_path / f"{count}", {f"{n:0200d}": b"x" * 20 for n in range(count)})
        assert lmdb_files.open_lmdb(folder).stat()["depth"] == {0: 0, 1: 1, 100: 2, 20_000: 4}[count]
        assert sum(part["count"] for part in lmdb_files.key_parts(folder, 7)) == count


def test_several_variants_have_to_be_chosen_from(tmp_path):
    for folder in ("all", "feat_numbb36"):
        write_images(tmp_path / folder, {"a.npz": as_msgpack(arrays_of(0, 3))})
    with pytest.raises(VlscaleError, match=r"--variant \(found: all, feat_numbb36\)"):
        uniter_images.find_lmdb(tmp_path, None)
    assert uniter_images.find_lmdb(tmp_path, "all").name == "all"
    assert uniter_images.find_lmdb(tmp_path / "all", None).name == "all"


@pytest.mark.parametrize(("arguments", "message"), [
    (["uniter_image", "x"], "did you mean 'uniter_images'"),
    (["uniter_texts", "x"], "import_texts"),
    (["uniter_images"], "SOURCE"),
    (["uniter_images", "x", "--out", "y", "--max-regions", "0"], "0"),
    (["uniter_images", "x", "--out", "y", "--max-region", "9"], "--max-region"),
    (["uniter_images", "x", "--out", "y", "--shard", "3/3"], "3/3"),
    (["uniter_images", "x", "--out", "y", "--min-regions", "3"], "--min-confidence"),
    (["uniter_images", "gone", "--out", "y"], "gone: no such file"),
    (["uniter_images", "x", "--out", "y"], "x"),
    (["uniter_images", "x", "--out", "y", "--vg-image-data", "x"], "--exclude-karpathy"),
])  # fmt: skip
def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(SystemExit) as raised:
        import_images_main(arguments)
    assert raised.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("import_images: error:")
    assert message in line


def test_every_format_of_the_registry_has_a_command_line():
    for name in FORMATS:
        module = importlib.import_module(FORMATS[name])
        with pytest.raises(SystemExit) as raised:
            parse(module.KIND, "", [name, "--help"], lambda parser: None)
        assert raised.value.code == 0

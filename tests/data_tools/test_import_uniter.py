"""UNITER's databases are written here as the facts sheet says: with lmdb, msgpack and lz4 directly."""

import importlib
import io
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from data_tools.formats import FORMATS, lmdb_files, uniter_images, uniter_texts
from data_tools.import_images import main as import_images_main
from data_tools.import_images import run as run_images
from data_tools.options import parse
from data_tools.parts import Run
from data_tools.records import BadRow
from data_tools.texts import import_texts
from tests.data_tools.toy_sources import ToyTokenizer
from vlscale.data.schema import Vocabulary
from vlscale.data.store import ClassStore, ImageStore, TextStore
from vlscale.errors import VlscaleError

lmdb = pytest.importorskip("lmdb")
lz4_frame = pytest.importorskip("lz4.frame")
msgpack = pytest.importorskip("msgpack")

WIDTH, CLASSES = 8, 5


def arrays_of(number, regions, dtype=np.float16):
    rng = np.random.default_rng(number)
    low = rng.uniform(0, 0.4, (regions, 2))
    size = rng.uniform(0.1, 0.5, (regions, 2))
    return {
        "features": rng.standard_normal((regions, WIDTH)).astype(dtype),
        "norm_bb": np.concatenate([low, low + size, size], 1).astype(dtype),
        "conf": np.linspace(0.95, 0.05, regions).astype(dtype),
        "soft_labels": (rng.random((regions, CLASSES)) / 2).astype(dtype),
    }


def as_msgpack(arrays):
    """msgpack-numpy's encoding: nd, type, kind, shape and data, keys as bytes."""
    encoded = {
        name: {
            b"nd": True,
            b"type": array.dtype.str,
            b"kind": b"",
            b"shape": list(array.shape),
            b"data": array.tobytes(),
        }
        for name, array in arrays.items()
    }
    return msgpack.packb(encoded, use_bin_type=True)


def as_npz(arrays):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays, allow_pickle=np.asarray(False))  # the public script's stray entry
    return stream.getvalue()


def write_lmdb(folder, items):
    folder.mkdir(parents=True)
    env = lmdb.open(str(folder), map_size=1 << 26)
    with env.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key.encode(), value)
    env.close()
    return folder


def write_images(folder, values):
    return write_lmdb(folder, {**values, "__keys__": json.dumps(list(values)).encode()})


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
        "from data_tools.formats import uniter_images, vilbert_lmdb\n"
        "from vlscale.errors import VlscaleError\n"
        "for name in sys.argv[1:]:\n"
        "    path = pathlib.Path(name)\n"
        "    source, part = uniter_images.source_of([path]), {'folder': 0, 'count': 99}\n"
        "    part['first'] = 'coco_val2014_000000000000.npz'\n"
        "    reads = [source.layout, source.parts, lambda: list(source.read(part))]\n"
        "    reads += [lambda: vilbert_lmdb.lmdb_parts([path], 5), lambda: list(vilbert_lmdb.records(path, part))]\n"
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


# ------------------------------------------------------------------------------------------------ texts


def write_texts(folder, rows, meta=None, **side):
    values = {name: lz4_frame.compress(msgpack.packb(row, use_bin_type=True)) for name, row in rows.items()}
    write_lmdb(folder, values)
    meta = meta or {"CLS": 2, "SEP": 3, "MASK": 4, "UNK": 1, "v_range": [5, 12], "bert": "toy"}
    (folder / "meta.json").write_text(json.dumps(meta))
    for name, value in side.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


TASKS = {
    "pretrain": {"input_ids": [5, 6], "img_fname": "a.npz"},
    "vqa": {"input_ids": [7], "img_fname": "b.npz", "question": "what is it?", "answers": {"yes": 1.0},
            "target": {"labels": [3, 8], "scores": [1.0, 0.3]}},
    "ve": {"input_ids": [7, 8], "img_fname": "c.npz", "target": {"labels": [1], "scores": [1.0]}},
    "nlvr2": {"input_ids": [9], "img_fname": ["a.npz", "b.npz"], "sentence": "two dogs", "target": 1},
    "vcr": {"input_ids": [5], "input_ids_as": [[5], [6], [7], [8]], "input_ids_rs": [[9], [9], [8], [7]],
            "qa_target": 2, "qar_target": -1, "img_fname": ["b.npz", "c.npz"]},
    "re": {"sent_id": 4, "sent": "the left one", "ref_id": 1, "ann_id": 77, "image_id": 12, "bbox": [1.5, 2.0, 30, 40],
           "input_ids": [6, 7, 8], "img_fname": "c.npz"},
}  # fmt: skip


def images_for_texts(root):
    values = {name: as_msgpack(arrays_of(1, 2)) for name in ("a.npz", "b.npz", "c.npz")}
    write_images(root / "db/all", values)
    run_images(["uniter_images", str(root / "db"), "--out", str(root / "out")])


def run_texts(root, source, **more):
    return import_texts(partial(uniter_texts.UniterTexts, source.folders), ToyTokenizer, {"format": "uniter_texts"},
                        Run(root / "out"), **more)  # fmt: skip


@pytest.mark.parametrize("key", ["bert", "toker", "tokenizer"])
def test_text_databases_of_all_tasks_round_trip(tmp_path, key):
    images_for_texts(tmp_path)
    meta = {"CLS": 2, "SEP": 3, "MASK": 4, "UNK": 1, "v_range": [5, 12], key: "toy"}
    folder = write_texts(tmp_path / "txt", TASKS, meta, id2len={name: 1 for name in TASKS})
    run_texts(tmp_path, uniter_texts.UniterTexts((folder,)))
    store = TextStore(tmp_path / "out/texts")
    found = {row["id"]: row for row in map(store.row, range(len(store)))}
    assert set(found) == set(TASKS)
    words = {"vqa": "question", "nlvr2": "sentence", "re": "sent"}
    for name, row in TASKS.items():
        images = row["img_fname"] if isinstance(row["img_fname"], list) else [row["img_fname"]]
        assert found[name]["images"] == images
        assert found[name]["input_ids"].tolist() == row["input_ids"]
        assert found[name]["text"] == row.get(words.get(name, ""), "")
        left_out = {"input_ids", "img_fname", words.get(name, "")}
        assert found[name]["extra"] == {field: value for field, value in row.items() if field not in left_out}


def test_the_command_line_imports_texts_with_a_vocabulary(tmp_path):
    pytest.importorskip("data_tools.tokenizers")
    from data_tools.import_texts import run

    images_for_texts(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]) + "\n")
    folder = write_texts(tmp_path / "txt", TASKS)
    arguments = [str(folder), "--out", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "vocab.txt")]
    assert run(["uniter-texts", *arguments])["rows"] == len(TASKS)
    assert TextStore(tmp_path / "out/texts").meta.vocabulary.tokens[5:] == tuple("abcdefg")


BERT = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused100]"]
LATER = [f"[unused{n}]" for n in range(101, 995)]
CASED = Vocabulary.from_tokens([*BERT, LATER[0], "!", *(f"Word{n}" for n in range(28_889))])
UNCASED = Vocabulary.from_tokens([*BERT, *LATER, "!", *(f"word{n}" for n in range(29_522))])


def test_berts_cased_and_uncased_vocabularies_are_told_apart_though_their_special_ids_are_equal(tmp_path):
    spans = {"cased": (CASED, [106, 28996]), "uncased": (UNCASED, [999, 30522])}
    for name, (vocabulary, span) in spans.items():
        assert [vocabulary.tokens.index("!"), vocabulary.size] == span
        meta = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": span, "bert": f"bert-base-{name}"}
        source = uniter_texts.UniterTexts((write_texts(tmp_path / name, {"x": {"input_ids": [200]}}, meta),))
        for other, (given, _) in spans.items():
            if other == name:
                source.check_vocabulary(given)
            else:
                with pytest.raises(VlscaleError, match=rf"v_range .* give the vocabulary of 'bert-base-{name}'"):
                    source.check_vocabulary(given)


@pytest.mark.parametrize(
    ("span", "why"),
    [
        ([106, 28990], "does not fit the 28996 word pieces"),
        ([106, 30000], "does not fit the 28996 word pieces"),
        ([105, 28996], "begins with '!' at 105, but --tokenizer has it at 106"),
        ([28996, 106], "does not fit"),
        ([-1, 28996], "does not fit"),
        ([106, 28996.0], "expected two integers"),
        ([False, 28996], "expected two integers"),
        ([0, 10**300], "does not fit"),
        ([106], "expected two integers"),
        (None, "expected two integers"),
    ],
)
def test_a_range_of_another_vocabulary_is_refused(tmp_path, span, why):
    meta = {"CLS": 101, "SEP": 102, "MASK": 103, "UNK": 100, "v_range": span, "toker": "bert-base-cased"}
    folder = write_texts(tmp_path / "txt", {"x": {"input_ids": [200]}}, meta)
    with pytest.raises(VlscaleError, match=r"meta\.json: v_range") as raised:
        uniter_texts.UniterTexts((folder,)).check_vocabulary(CASED)
    assert why in str(raised.value)
    assert len(str(raised.value)) < 400


def test_every_format_of_the_registry_has_a_command_line():
    for name in FORMATS:
        module = importlib.import_module(FORMATS[name])
        with pytest.raises(SystemExit) as raised:
            parse(module.KIND, "", [name, "--help"], lambda parser: None)
        assert raised.value.code == 0


def test_images_come_from_txt2img_where_a_record_has_none(tmp_path):
    rows = {"x": {"input_ids": [5]}, "y": {"input_ids": [6]}, "z": {"input_ids": [6]}}
    folder = write_texts(tmp_path / "txt", rows, txt2img={"x": "a.npz", "y": ["a.npz", "b.npz"]})
    source = uniter_texts.UniterTexts((folder,))
    x, y, z = source.read(source.parts()[0])
    assert x.images == ("a.npz",)
    assert y.images == ("a.npz", "b.npz")
    assert isinstance(z, BadRow)
    assert z.field == "img_fname"


def test_a_caption_without_its_image_is_an_error_or_listed(tmp_path):
    images_for_texts(tmp_path)
    rows = {"good": TASKS["pretrain"], "lost": {"input_ids": [5], "img_fname": "gone.npz"}}
    source = uniter_texts.UniterTexts((write_texts(tmp_path / "txt", rows),))
    with pytest.raises(VlscaleError, match=r"key lost: images: refers to image 'gone.npz'"):
        run_texts(tmp_path, source)
    report = run_texts(tmp_path, source, skip=True)
    assert (report["rows"], report["dropped"], report["images without texts"]) == (1, {"images": 1}, 2)


BAD_TEXTS = {
    "not lz4": (b"abc", "record"),
    "truncated lz4": (lz4_frame.compress(msgpack.packb(TASKS["vqa"]))[:-9], "record"),
    "a bomb": (lz4_frame.compress(msgpack.packb({"input_ids": [5], "img_fname": "a", "x": bytes(20 << 20)})), "record"),
    "not msgpack": (lz4_frame.compress(b"\xc1\xc1"), "record"),
    "a list": (lz4_frame.compress(msgpack.packb([1])), "record"),
    "no ids": (lz4_frame.compress(msgpack.packb({"img_fname": "a"})), "input_ids"),
    "a negative id": (lz4_frame.compress(msgpack.packb({"input_ids": [-1], "img_fname": "a"})), "input_ids"),
    "words as ids": (lz4_frame.compress(msgpack.packb({"input_ids": ["a"], "img_fname": "a"})), "input_ids"),
    "no image": (lz4_frame.compress(msgpack.packb({"input_ids": [5]})), "img_fname"),
    "not UTF-8": (lz4_frame.compress(msgpack.packb({"input_ids": [5], "img_fname": "a", "sent": b"\xff\xfe"})), "sent"),
    "an extension": (lz4_frame.compress(msgpack.packb({"input_ids": msgpack.ExtType(3, b"x")})), "record"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_TEXTS)
def test_a_bad_text_record_names_key_and_field(tmp_path, fault):
    value, field = BAD_TEXTS[fault]
    folder = write_lmdb(tmp_path / "txt", {"k": value})
    source = uniter_texts.UniterTexts((folder,))
    (row,) = source.read(source.parts()[0])
    assert isinstance(row, BadRow)
    assert row.field.startswith(field)
    assert "txt: key k" in row.where


def test_the_vocabulary_has_to_be_the_one_of_the_database(tmp_path):
    good = {"CLS": 2, "SEP": 3, "MASK": 4, "UNK": 1, "v_range": [5, 12], "toker": "toy"}
    source = uniter_texts.UniterTexts((write_texts(tmp_path / "txt", {}, good),))
    vocabulary = ToyTokenizer().vocabulary
    source.check_vocabulary(vocabulary)
    other = Vocabulary.from_tokens(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"])
    with pytest.raises(VlscaleError, match=r"special ids .* give the vocabulary of toy"):
        source.check_vocabulary(other)
    (tmp_path / "txt/meta.json").write_text(json.dumps({**good, "v_range": [106, 28996]}))
    with pytest.raises(VlscaleError, match=r"v_range \[106, 28996\] does not fit the 12 word pieces"):
        source.check_vocabulary(vocabulary)

"""UNITER's VCR databases, imported for its second stage of pre-training with the real commands."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from data_tools import import_images, import_texts
from data_tools.formats.uniter_texts import UniterTexts
from data_tools.formats.uniter_vcr_texts import VcrTexts
from data_tools.records import BadRow
from tests.data_tools.uniter_files import as_msgpack, write_images, write_texts
from tests.data_tools.vcr_files import ADDED, SEP, TOKENS, import_arguments, record, regions, write_vcr
from vlscale.data.dataset import open_dataset
from vlscale.data.schema import grown_fingerprint
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    root = tmp_path_factory.mktemp("vcr")
    rows = write_vcr(root)
    images, texts = import_arguments(root, root / "out")
    reports = import_images.run(images), import_texts.run(texts)
    return root, rows, reports, open_dataset("vcr", root / "out")


def test_ground_truth_boxes_come_first_and_detected_ones_behind(imported):
    _, _, (report, _), dataset = imported
    assert report["rows"] == len(dataset.images) == 11  # image 0 is in no text
    for row in range(len(dataset.images)):
        found, number = dataset.images.row(row), row + 1
        assert found["id"] == f"vcr_gt_m{number:03}.npz+vcr_m{number:03}.npz"
        parts = regions(number % 4, 1 + number % 3, number), regions(number % 4, 2 + number % 4, 500 + number)
        for name, expected in (("features", "features"), ("conf", "conf")):
            assert np.array_equal(found[name], np.concatenate([part[expected] for part in parts]))
        assert np.array_equal(found["boxes"], np.concatenate([part["norm_bb"][:, :4] for part in parts]))
        assert found["extra"] == {"ground_truth": 1 + number % 3}
        counts = np.asarray(dataset.images.counts_of(np.array([row]), 100))
        probs = dataset.classes.probs(dataset.images.region_rows(np.array([row]), counts))
        assert np.array_equal(probs, np.concatenate([part["soft_labels"] for part in parts]))


def test_texts_are_the_published_second_stage_ones(imported):
    _, rows, (_, report), dataset = imported
    assert report["rows"] == len(dataset) == 2 * len(rows)
    found = {row["id"]: row for row in map(dataset.texts.row, range(len(dataset)))}
    for name, row in rows.items():
        q, a, r = row["input_ids"], row["input_ids_as"][row["qa_target"]], row["input_ids_rs"][row["qar_target"]]
        # Published: [SEP] has the type of the segment before it; [CLS] and the last [SEP] are put around in the batch.
        expected = {
            "qa": ([*q, SEP, *a], [0] * (len(q) + 1) + [2] * len(a)),
            "qar": ([*q, SEP, *a, SEP, *r], [0] * (len(q) + 1) + [2] * (len(a) + 1) + [3] * len(r)),
        }
        for kind, (ids, types) in expected.items():
            text = found[f"{name}-{kind}"]
            assert text["input_ids"].tolist() == ids
            assert text["type_ids"].tolist() == types
            assert text["images"] == ["+".join(row["img_fname"])]
            assert text["extra"] == {"example": name, "row": kind}
    assert dataset.num_types == 4


def test_the_vocabulary_has_grown_by_what_the_texts_use(imported):
    root, _, _, dataset = imported
    vocabulary = dataset.vocabulary
    assert vocabulary.size == len(TOKENS) + ADDED
    assert vocabulary.random_range == (5, len(TOKENS))  # added word pieces are never drawn at random
    ids, _ = dataset.texts.input_ids(np.arange(len(dataset)))
    assert set(range(len(TOKENS), vocabulary.size)) <= set(ids.tolist())
    base = import_texts.load_grown(root / "vocab.txt", 0).vocabulary
    assert vocabulary.fingerprint == grown_fingerprint(base.fingerprint, ADDED)


@pytest.mark.parametrize(("rows", "per_record"), [("qa", 1), ("qar", 1), ("both", 2)])
def test_rows_chooses_the_texts(imported, tmp_path, rows, per_record):
    root, records, _, _ = imported
    images, texts = import_arguments(root, tmp_path)
    import_images.run(images)
    assert import_texts.run([*texts, "--rows", rows])["rows"] == per_record * len(records)
    kinds = {row["extra"]["row"] for row in map(open_dataset("vcr", tmp_path).texts.row, range(per_record))}
    assert kinds == ({"qa", "qar"} if rows == "both" else {rows})


def test_without_added_tokens_the_texts_do_not_fit_the_vocabulary(imported, tmp_path):
    root, *_ = imported
    images, texts = import_arguments(root, tmp_path)
    import_images.run(images)
    with pytest.raises(VlscaleError, match=r"key train-\d+: input_ids: ids span .* the vocabulary has 0\.\.29"):
        import_texts.run(texts[:-2])


@pytest.mark.parametrize("end", [len(TOKENS), len(TOKENS) + ADDED])
def test_meta_json_may_count_the_added_tokens_or_not(tmp_path, end):
    rows = write_vcr(tmp_path, images=3)
    images, texts = import_arguments(tmp_path, tmp_path / "out")
    meta = json.loads((tmp_path / "txt/meta.json").read_bytes())
    (tmp_path / "txt/meta.json").write_text(json.dumps({**meta, "v_range": [5, end]}))
    import_images.run(images)
    assert import_texts.run(texts)["rows"] == 2 * len(rows)


def test_the_test_split_has_no_answers_and_says_so(tmp_path):
    write_vcr(tmp_path, images=3, answered=False)
    images, texts = import_arguments(tmp_path, tmp_path / "out")
    import_images.run(images)
    with pytest.raises(
        VlscaleError, match="key train-3: qa_target: is -1: the test split has no answers; import the tr"
    ):
        import_texts.run(texts)
    assert not (tmp_path / "out/texts").exists()


BAD_TEXTS = {
    "qa_target": ({"qa_target": 4}, "qa_target"),
    "no target": ({"qa_target": None}, "qa_target"),
    "qar_target": ({"qar_target": -1}, "qar_target: is -1"),
    "no choices": ({"input_ids_as": None}, "input_ids_as: None is no list of choices"),
    "choices": ({"input_ids_rs": [[]] * 4}, r"input_ids_rs\[2\]: \[\] is no list of word pieces"),
    "pieces": ({"input_ids_as": [["a"]] * 4}, r"input_ids_as\[1\]\[0\]"),
    "question": ({"input_ids": []}, "input_ids: the question has no word pieces"),
    "one image": ({"img_fname": "vcr_m001.npz"}, "img_fname: .* are not the files of ground-truth and detected boxes"),
    "huge": ({"qa_target": (1 << 64) - 1}, "qa_target"),
}


@pytest.mark.parametrize("fault", BAD_TEXTS)
def test_a_bad_record_is_named_and_none_of_its_texts_is_kept(tmp_path, fault):
    changes, why = BAD_TEXTS[fault]
    meta = {"SEP": 3, "v_range": [5, 30]}
    folder = write_texts(tmp_path / "txt", {"k": {**record(1, "m001", 1), **changes}}, meta)
    source = VcrTexts(UniterTexts((folder,)))
    (row,) = source.read(source.parts()[0])
    assert isinstance(row, BadRow)
    assert re.search(why, str(row)), str(row)
    assert "key k" in row.where


def test_a_database_without_sep_is_refused(tmp_path):
    folder = write_texts(tmp_path / "txt", {"k": record(1, "m001", 1)}, {"CLS": 2})
    source = VcrTexts(UniterTexts((folder,)))
    with pytest.raises(VlscaleError, match=r"meta\.json: SEP: .*restore the database's side files"):
        list(source.read(source.parts()[0]))


@pytest.mark.parametrize(
    ("detected", "why"),
    [
        (
            "few",
            r"feat_numbb100: key vcr_gt_m002\.npz: img_fname: a text pairs it with 'vcr_m002\.npz', which .* does n",
        ),
        ("mixed", r"key vcr_gt_m002\.npz: features: float16 \[3, 8\] against float16 \[2, 16\] detected ones"),
        ("wide", r"cannot be joined: float16 \[8\], 5 classes float16 against float16 \[16\], 5 classes float16; give"),
        ("bad", r"key vcr_gt_m001\.npz: features: of 'vcr_m001\.npz': "),
    ],
)
def test_detected_boxes_that_are_missing_or_of_another_detector_are_named(tmp_path, detected, why):
    write_vcr(tmp_path, images=3)
    good = as_msgpack(regions(0, 2, 0))
    wide = regions(0, 2, 0)
    wide["features"] = np.concatenate([wide["features"]] * 2, 1)
    nan = regions(0, 2, 0)
    nan["features"][0, 0] = np.nan
    records = {
        "few": {"vcr_m001.npz": good},
        "mixed": {"vcr_m001.npz": good, "vcr_m002.npz": as_msgpack(wide)},
        "wide": {"vcr_m001.npz": as_msgpack(wide)},
        "bad": {"vcr_m001.npz": as_msgpack(nan), "vcr_m002.npz": good},
    }
    write_images(tmp_path / "other/all", records[detected])
    images, _ = import_arguments(tmp_path, tmp_path / "out")
    with pytest.raises(VlscaleError, match=why) as caught:
        import_images.run([*images[:2], str(tmp_path / "other"), *images[3:]])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/images").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda line: [*line[:2], *line[3:]], "1 sources, expected pairs"),
        (
            lambda line: [*line, "--min-confidence", "0.2"],
            "would count ground-truth boxes too: .* --variant feat_th0.2",
        ),
        (lambda line: [*line[:3], *line[5:]], "--texts"),
    ],
)
def test_wrong_command_lines_are_told_in_one_line(imported, tmp_path, change, why):
    images, _ = import_arguments(imported[0], tmp_path / "out")
    with pytest.raises(VlscaleError, match=why) as caught:
        import_images.run(change(images))
    assert "\n" not in str(caught.value)


def test_sub_folders_are_chosen_by_an_option_of_their_own(tmp_path):
    write_vcr(tmp_path, images=3)
    for folder in ("gt", "det"):
        write_images(tmp_path / folder / "all", {"other.npz": as_msgpack(regions(0, 1, 0))})
    images, _ = import_arguments(tmp_path, tmp_path / "out")
    with pytest.raises(
        VlscaleError, match=r"gt: name the sub-folder to read with --gt-variant \(found: all, feat_numbb"
    ):
        import_images.run(images)
    images += ["--gt-variant", "feat_numbb100"]
    with pytest.raises(VlscaleError, match=r"det: name the sub-folder to read with --variant \(found: all, feat_th"):
        import_images.run(images)
    report = import_images.run([*images, "--variant", "feat_th0.2_max100_min10_compressed"])
    assert report["rows"] == 2


def test_texts_that_pair_no_files_are_no_vcr(imported, tmp_path):
    texts = write_texts(tmp_path / "txt", {"k": {"input_ids": [5], "img_fname": "a.npz"}})
    images, _ = import_arguments(imported[0], tmp_path / "out")
    with pytest.raises(VlscaleError, match="no text names files of ground-truth and detected boxes; is it VCR's"):
        import_images.run([*images[:4], str(texts), *images[5:]])

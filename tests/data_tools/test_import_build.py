import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_tools.build import import_images
from data_tools.build_images import Choice
from data_tools.parts import Run, Work
from data_tools.texts import import_texts
from tests.data_tools.toy_sources import ToyImages, ToyTexts, ToyTokenizer, image, tree
from vlscale.data.store import ClassStore, ImageStore, TextStore
from vlscale.errors import VlscaleError

QUIET = Console(quiet=True)


def images_into(root, source=None, *, workers=1, shard=None, merge=False, skip=False, described=None, **more):
    source = source or ToyImages()
    run = Run(Path(root), workers, shard, merge)
    return import_images(partial(ToyImages, **vars(source)), described or {"format": "toy"}, run, skip=skip,
                         console=QUIET, **more)  # fmt: skip


def texts_into(root, source=None, *, workers=1, shard=None, merge=False, skip=False, **more):
    source = source or ToyTexts()
    run = Run(Path(root), workers, shard, merge)
    return import_texts(partial(ToyTexts, **vars(source)), ToyTokenizer, {"format": "toy"}, run, skip=skip,
                        console=QUIET, **more)  # fmt: skip


def assert_image(store, classes, row, number, kept=None):
    found, expected = store.row(row), image(number)
    for name in ("id", "width", "height"):
        assert found[name] == getattr(expected, name)
    for name in ("features", "boxes", "conf"):
        wanted = getattr(expected, name)[:kept]
        assert found[name].dtype == wanted.dtype
        np.testing.assert_array_equal(found[name], wanted)
    begin = store.region_ptr[row]
    probs = classes.probs(np.arange(begin, begin + len(expected.features[:kept])))
    np.testing.assert_array_equal(probs, expected.class_probs[:kept].astype(np.float32))
    assert found["extra"]["objects"] == expected.extra["objects"][:kept]


def test_images_of_all_parts_in_order_with_their_classes(tmp_path):
    report = images_into(tmp_path)
    store, classes = ImageStore(tmp_path / "images"), ClassStore(tmp_path / "classes")
    assert len(store) == report["rows"] == 24
    for number in range(24):
        assert_image(store, classes, number, number)
    assert report["regions histogram"] == {"1": 6, "2": 6, "3": 6, "4": 6}
    assert report["regions"] == len(classes) == 60
    assert report["bytes_images"] == sum(path.stat().st_size for path in (tmp_path / "images").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "classes", "dropped-images.jsonl", "images", "report-images.json"
    ]  # fmt: skip


def test_regions_are_chosen_as_uniter_does(tmp_path):
    images_into(tmp_path, choice=Choice(max_regions=3, min_confidence=0.7, min_regions=2))
    store, classes = ImageStore(tmp_path / "images"), ClassStore(tmp_path / "classes")
    for row in range(24):
        conf = image(row).conf
        kept = min(max(int((conf > 0.7).sum()), 2), 3, len(conf))
        assert store.lengths[row] == kept
        assert_image(store, classes, row, row, kept)


def test_excluded_images_are_counted_and_left_out(tmp_path):
    report = images_into(tmp_path, excluded=frozenset({"img3", "img20", "other"}))
    assert (report["rows"], report["excluded"]) == (22, 2)
    store = ImageStore(tmp_path / "images")
    assert {"img3", "img20"}.isdisjoint(store.row(row)["id"] for row in range(22))


@pytest.mark.parametrize("fault", ["bad", "width"])
def test_a_bad_row_stops_with_its_place_or_is_listed(tmp_path, fault):
    source = ToyImages(faults=((8, fault),))
    with pytest.raises(VlscaleError, match=r"toy: row 8: features"):
        images_into(tmp_path / "stop", source)
    assert not (tmp_path / "stop/images").exists()
    report = images_into(tmp_path / "skip", source, skip=True)
    assert (report["rows"], report["dropped"]) == (23, {"features": 1})
    (line,) = (tmp_path / "skip/dropped-images.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "toy: row 8"
    classes = ClassStore(tmp_path / "skip/classes")
    assert_image(ImageStore(tmp_path / "skip/images"), classes, 8, 9)


def test_a_repeated_id_names_both_rows_over_all_parts(tmp_path):
    source = ToyImages(faults=((9, "id:img1"), (10, "id:img7"), (21, "id:img1")))
    with pytest.raises(VlscaleError, match=r"toy: row 10: id: 'img7' is also that of toy: row 7"):
        images_into(tmp_path / "stop", source)
    with pytest.raises(VlscaleError, match=r"toy: row 9: id: 'img1' is also that of toy: row 1"):
        images_into(tmp_path / "stop, other parts", ToyImages(faults=source.faults[:1]))
    report = images_into(tmp_path / "skip", source, skip=True)
    assert (report["rows"], report["dropped"]) == (21, {"id": 3})
    listed = [json.loads(line) for line in (tmp_path / "skip/dropped-images.jsonl").read_text().splitlines()]
    assert sorted(row["where"] for row in listed) == ["toy: row 10", "toy: row 21", "toy: row 9"]
    store, classes = ImageStore(tmp_path / "skip/images"), ClassStore(tmp_path / "skip/classes")
    for row, number in enumerate(n for n in range(24) if n not in (9, 10, 21)):
        assert_image(store, classes, row, number)


def test_neither_workers_nor_shards_change_a_byte(tmp_path):
    source = ToyImages(faults=((9, "id:img1"), (13, "bad")))
    images_into(tmp_path / "one", source, skip=True)
    images_into(tmp_path / "workers", source, workers=2, skip=True)
    for share in (2, 0, 1):
        assert images_into(tmp_path / "shards", source, shard=(share, 3), skip=True) is None
    images_into(tmp_path / "shards", source, merge=True, skip=True)
    one = tree(tmp_path / "one")
    assert tree(tmp_path / "workers") == one
    assert tree(tmp_path / "shards") == one


def test_array_jobs_at_the_same_time_and_the_same_job_twice(tmp_path):
    source = ToyImages(count=12, rows=20)
    images_into(tmp_path / "one", source)
    context = multiprocessing.get_context("fork")
    jobs = [
        context.Process(target=images_into, args=(tmp_path / "jobs", source), kwargs={"shard": shard})
        for shard in ((0, 3), (1, 3), (2, 3), (1, 3))
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
        assert job.exitcode == 0
    images_into(tmp_path / "jobs", source, merge=True)
    assert tree(tmp_path / "jobs") == tree(tmp_path / "one")


def test_merge_says_which_part_is_missing(tmp_path):
    images_into(tmp_path, shard=(0, 2))
    with pytest.raises(VlscaleError, match=r"images-00001: this part and 1 more of 4 are not built yet"):
        images_into(tmp_path, merge=True)


def test_an_existing_store_is_not_overwritten(tmp_path):
    images_into(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(VlscaleError, match="exists already and is not overwritten"):
        images_into(tmp_path)
    assert tree(tmp_path) == before
    assert not (tmp_path / ".parts").exists()


def test_a_build_is_only_continued_with_the_same_options(tmp_path):
    images_into(tmp_path, shard=(0, 2), described={"max_regions": 36})
    with pytest.raises(VlscaleError, match=r"begun otherwise: build.max_regions was 36, now 100"):
        images_into(tmp_path, described={"max_regions": 100})
    with pytest.raises(VlscaleError, match="begun otherwise: parts"):
        images_into(tmp_path, ToyImages(rows=7), described={"max_regions": 36})


def test_rows_that_an_earlier_run_skipped_stop_a_run_that_does_not(tmp_path):
    source = ToyImages(faults=((8, "bad"),))
    images_into(tmp_path, source, shard=(1, 2), skip=True)
    with pytest.raises(VlscaleError, match="toy: row 8: features"):
        images_into(tmp_path, source)
    images_into(tmp_path, source, skip=True)


def test_the_report_says_how_far_a_lossy_codec_is_off(tmp_path):
    pytest.importorskip("vlscale.data.codec")
    report = images_into(tmp_path, choice=Choice(codec="uint8"))
    store, classes = ImageStore(tmp_path / "images"), ClassStore(tmp_path / "classes")
    assert len(store) == 24
    assert len(classes) == 60
    assert 0 < report["codec_mean_error"] <= report["codec_largest_error"] < 0.1
    assert "codec_mean_error" not in images_into(tmp_path / "lossless", choice=Choice(codec="lossless"))


def test_no_images_left_is_an_error(tmp_path):
    source = ToyImages(count=1, rows=2, faults=((0, "bad"), (1, "bad")))
    with pytest.raises(VlscaleError, match="no images are left"):
        images_into(tmp_path, source, skip=True)
    assert not (tmp_path / "images").exists()


def test_texts_come_in_the_order_of_their_images(tmp_path):
    images_into(tmp_path)
    report = texts_into(tmp_path, ToyTexts(faults=((3, "two"), (5, "none"))))
    store, images = TextStore(tmp_path / "texts"), ImageStore(tmp_path / "images")
    expected = [*sorted((number for number in range(24) if number != 5), key=lambda number: number * 7 % 24), 5]
    assert [store.row(row)["extra"]["n"] for row in range(24)] == expected
    for row, number in enumerate(expected):
        found = store.row(row)
        refs = store.image_refs[store.image_ptr[row] : store.image_ptr[row + 1]]
        assert [images.row(int(ref))["id"] for ref in refs] == found["images"]
        assert found["text"] == "abcdefg"[: 1 + number % 7]
        assert found["input_ids"].tolist() == list(range(5, 6 + number % 7))
    assert report["images without texts"] == 1  # 5 * 7 % 24 = 11; 3's second image is another's
    assert store.tokenizer_path is not None
    assert report["tokens"] == sum(1 + number % 7 for number in range(24))


def test_texts_whose_image_is_missing_stop_or_are_listed(tmp_path):
    images_into(tmp_path)
    source = ToyTexts(faults=((2, "missing"), (9, "empty"), (10, "id:txt1")))
    with pytest.raises(VlscaleError, match=r"toy: line 2: images: refers to image 'nowhere'"):
        texts_into(tmp_path, source)
    report = texts_into(tmp_path, source, skip=True)
    assert report["dropped"] == {"images": 1, "text": 1, "id": 1}
    wheres = [json.loads(line)["where"] for line in (tmp_path / "dropped-texts.jsonl").read_text().splitlines()]
    assert wheres == ["toy: line 2", "toy: line 9", "toy: line 10"]
    assert len(TextStore(tmp_path / "texts")) == 21


def test_repeated_text_ids_name_both_rows(tmp_path):
    images_into(tmp_path)
    with pytest.raises(VlscaleError, match=r"toy: line 20: id: 'txt1' is also that of toy: line 1"):
        texts_into(tmp_path, ToyTexts(faults=((20, "id:txt1"),)))


def test_texts_of_excluded_images_are_counted(tmp_path):
    images_into(tmp_path, excluded=frozenset({"img0", "img7"}))
    report = texts_into(tmp_path, excluded=frozenset({"img0", "img7"}))
    assert (report["rows"], report["excluded"], report["dropped"]) == (22, 2, {})


def test_texts_need_their_images_first(tmp_path):
    with pytest.raises(VlscaleError, match="import the images that the texts refer to first"):
        texts_into(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_texts_alone_keep_their_order(tmp_path, workers):
    report = texts_into(tmp_path, ToyTexts(paired=False), workers=workers)
    store = TextStore(tmp_path / "texts")
    assert [store.row(row)["extra"]["n"] for row in range(24)] == list(range(24))
    assert report["rows"] == 24
    assert store.image_ptr.tolist() == [0] * 25


def test_neither_workers_nor_shards_change_a_byte_of_texts(tmp_path):
    for name in ("one", "shards"):
        images_into(tmp_path / name)
    source = ToyTexts(faults=((4, "two"), (10, "id:txt1")))
    texts_into(tmp_path / "one", source, skip=True)
    for share in (1, 0):
        texts_into(tmp_path / "shards", source, shard=(share, 2), skip=True)
    texts_into(tmp_path / "shards", source, merge=True, skip=True)
    assert tree(tmp_path / "shards") == tree(tmp_path / "one")


# ------------------------------------------------------------------------------------------------ kill -9


WRITES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def _is_write(event, args):
    return event in WRITES or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))


def _counted(root, kill_at, events):
    """Run in a forked process: count what changes the disk, and die by SIGKILL before change number ``kill_at``."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if _is_write(event, args):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        _build_if_missing(root)
    finally:
        events.value = seen


def _build_if_missing(root):
    """The two commands, each given again until its store is there."""
    if not (root / "images").exists() or (root / ".parts/images-merged").exists():
        images_into(root, ToyImages(faults=((9, "id:img1"), (13, "bad"))), skip=True)
    if not (root / "texts").exists() or (root / ".parts/texts-merged").exists():
        texts_into(root, ToyTexts(faults=((4, "two"), (10, "id:txt1"), (9, "none"), (5, "missing"))), skip=True)


def _forked(root, kill_at=0, after=None):
    context = multiprocessing.get_context("fork")
    events = context.Value("i", 0)
    child = context.Process(target=_counted, args=(root, kill_at, events))
    child.start()
    if after is not None:
        time.sleep(after)
        child.kill()
    child.join(120)
    assert not child.is_alive()
    return child.exitcode, events.value


def _final(root):
    """What a finished dataset holds; the work folder may still be there if the very last removals were cut off."""
    return {name: data for name, data in tree(root).items() if not name.startswith(".parts/")}


def test_killed_before_any_change_to_the_disk_and_continued_gives_the_same_bytes(tmp_path):
    images_into(tmp_path / "loads what the children would load each")
    whole = tmp_path / "whole"
    code, events = _forked(whole)
    assert code == 0
    expected = tree(whole)
    assert events > 100
    assert not (whole / ".parts").exists()
    removals = range(events - 20, events + 1)  # the last changes: moving into place and clearing up
    points = sorted({*random.Random(0).sample(range(1, events - 20), 30), *removals})
    for point in points:
        root = tmp_path / f"killed-{point}"
        code, _ = _forked(root, kill_at=point)
        assert code == -signal.SIGKILL, point
        code, _ = _forked(root)
        assert code == 0, point
        assert _final(root) == expected, point


def test_killed_again_and_again_at_random_moments_gives_the_same_bytes(tmp_path):
    images_into(tmp_path / "loads what the children would load each")
    whole = tmp_path / "whole"
    begin = time.monotonic()
    _forked(whole)
    seconds = time.monotonic() - begin
    root, rng, killed = tmp_path / "killed", random.Random(1), 0
    for _ in range(12):
        code, _ = _forked(root, after=rng.uniform(0.1, 0.9) * seconds)
        killed += code == -signal.SIGKILL
        if code == 0:
            break
    code, _ = _forked(root)
    assert code == 0
    assert killed >= 1
    assert _final(root) == tree(whole)


SCRIPT = """
import sys
from pathlib import Path
from tests.data_tools.test_import_build import images_into
from tests.data_tools.toy_sources import ToyImages
if __name__ == "__main__":
    images_into(Path(sys.argv[1]), ToyImages(count=60, rows=40), workers=2)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_parent_and_the_next_run_finishes(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "killed")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.Popen(command, env=env)
    parts = Work(tmp_path / "killed", "images")
    deadline = time.monotonic() + 120
    while not parts.part(3).exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/images").exists()
    subprocess.run(command, env=env, check=True, timeout=300)
    images_into(tmp_path / "whole", ToyImages(count=60, rows=40))
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")

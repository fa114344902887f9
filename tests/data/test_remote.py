"""Datasets behind a cache: the same rows, fetched once, and every way in which a remote can fail."""

from __future__ import annotations

import errno
import multiprocessing
import pickle
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.remotes import counted, files_of, open_counting
from tests.helpers import make_dataset
from vlscale.data import fetch
from vlscale.data.dataset import open_dataset
from vlscale.data.remote import CacheSettings, open_root
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("remote") / "data", images=14)


@pytest.fixture
def root(source, tmp_path):
    return shutil.copytree(source, tmp_path / "data")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.0)
    monkeypatch.setattr(fetch, "_LOOK_S", 0.01)


def everything(dataset):
    """All rows of all stores."""
    stores = [dataset.texts, dataset.images, dataset.classes]
    return [repr(store.row(row)) for store in stores for row in range(len(store))]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_rows_fingerprint_and_pickles_are_those_of_the_source(source, tmp_path) -> None:
    plain = open_dataset("toy", source)
    cached = open_counting(source, tmp_path / "cache", tmp_path / "log")
    assert cached.fingerprint == plain.fingerprint
    assert not counted(tmp_path / "log")
    again = pickle.loads(pickle.dumps(cached))
    assert everything(again) == everything(plain)
    assert set(counted(tmp_path / "log").values()) == {1}
    shards = sum(len(files.index.shards) for files in files_of(cached).values())
    assert len(counted(tmp_path / "log")) == shards > 6
    assert everything(cached) == everything(plain)
    assert sum(counted(tmp_path / "log").values()) == shards
    assert cached.texts.tokenizer_path is None


def test_a_second_start_fetches_indexes_only(root, tmp_path, monkeypatch) -> None:
    everything(open_counting(root, tmp_path / "cache", tmp_path / "log"))
    fetched = []
    real = fetch._transfer
    monkeypatch.setattr(
        fetch, "_transfer", lambda source, *rest: (fetched.append(Path(source).name), real(source, *rest))
    )
    everything(open_counting(root, tmp_path / "cache", tmp_path / "log2"))
    assert set(fetched) == {"index.json", "meta.json"}


def test_a_newer_version_of_the_remote_never_meets_old_files(root, tmp_path) -> None:
    old = everything(open_counting(root, tmp_path / "cache", tmp_path / "log"))
    shutil.rmtree(root)
    make_dataset(root, images=14, seed=5)
    new = everything(open_counting(root, tmp_path / "cache", tmp_path / "log"))
    assert new != old
    assert new == everything(open_dataset("toy", root))


@pytest.mark.parametrize("name", ["lengths.npy", "image_refs.npy", "index.json", "meta.json"])
def test_a_side_file_damaged_in_the_cache_is_fetched_again(root, tmp_path, name) -> None:
    expected = everything(open_dataset("toy", root))
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log")
    flip(cached.root / "texts" / name)
    assert everything(open_counting(root, tmp_path / "cache", tmp_path / "log")) == expected
    (cached.root / "texts" / name).unlink()
    assert everything(open_counting(root, tmp_path / "cache", tmp_path / "log")) == expected


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "flipped":
        flip(path)
    elif how == "truncated":
        path.write_bytes(content[:-5])
    elif how == "longer":
        path.write_bytes(content + b"more")
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


REMOTE = {
    "flipped": r"damaged: its xxh64 is \w+, expected \w+ by index\.json \(3 attempts\); restore the file",
    "truncated": r"\d+ bytes, expected \d+ by index\.json \(3 attempts\); restore the file",
    "longer": r"\d+ bytes.* \(3 attempts\); restore the file",
    "empty": r"0 bytes, expected \d+ by index\.json",
    "vanished": r"cannot be fetched \(FileNotFoundError: .*\) \(3 attempts\); check that it is there",
}


@pytest.mark.parametrize("how", REMOTE)
def test_damage_at_the_remote_is_found_at_first_touch_and_fetching_is_bounded(root, tmp_path, how) -> None:
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log")
    damage(root / "texts" / "shard.00001.mds", how)
    first = np.arange(cached.texts.shard_ends[1])
    cached.texts.input_ids(first)
    with pytest.raises(VlscaleError, match=r"shard\.00001\.mds: " + REMOTE[how]) as caught:
        cached.texts.input_ids(first + 1)
    assert "\n" not in str(caught.value)
    assert counted(tmp_path / "log")["texts/shard.00001.mds"] == 3
    assert not list(cached.root.glob("**/.part-*"))
    assert not (cached.root / "texts" / "shard.00001.mds").exists()


def test_damage_that_passes_is_mended_by_another_attempt(root, tmp_path, monkeypatch) -> None:
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log")
    real, calls = fetch._transfer, []

    def shaky(source, target, timeout_s) -> None:
        calls.append(source)
        if len(calls) == 1:
            raise ConnectionResetError("reset by peer")
        real(source, target, timeout_s)
        if len(calls) == 2:
            flip(target)

    monkeypatch.setattr(fetch, "_transfer", shaky)
    cached.texts.input_ids(np.array([0]))
    assert len(calls) == 3


@pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "empty", "vanished"])
def test_damage_in_the_cache_is_mended_and_training_goes_on(root, tmp_path, how) -> None:
    expected = everything(open_dataset("toy", root))
    everything(open_counting(root, tmp_path / "cache", tmp_path / "log"))
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log2")
    damage(cached.root / "images" / "shard.00001.mds", how)
    assert everything(cached) == expected
    assert counted(tmp_path / "log2") == {"images/shard.00001.mds": 1}


@pytest.mark.parametrize("how", ["flipped", "truncated", "vanished"])
def test_damage_in_a_plain_folder_stops(root, how) -> None:
    dataset = open_dataset("toy", root)
    damage(root / "texts" / "shard.00001.mds", how)
    with pytest.raises(VlscaleError, match=r"shard\.00001\.mds: .*(restore the file|build the store)"):
        everything(dataset)


def test_a_remote_that_says_nothing_is_given_up(root, tmp_path, monkeypatch) -> None:
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log", retries=1, timeout_s=0.2)
    silent = threading.Event()
    monkeypatch.setattr(fetch, "_transfer", lambda *_: silent.wait(30))
    begin = time.monotonic()
    with pytest.raises(VlscaleError, match=r"nothing has arrived for 0\.2 s \(2 attempts\).*data\.download_timeout_s"):
        cached.texts.input_ids(np.array([0]))
    assert time.monotonic() - begin < 20
    silent.set()


def test_a_slow_remote_is_waited_for(root, tmp_path, monkeypatch) -> None:
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log", retries=0, timeout_s=1.0)

    def slow(source, target, timeout_s) -> None:
        content = Path(source).read_bytes()
        with open(target, "wb") as file:
            for part in np.array_split(np.frombuffer(content, np.uint8), 8):
                file.write(part.tobytes())
                file.flush()
                time.sleep(0.2)

    monkeypatch.setattr(fetch, "_transfer", slow)
    cached.texts.input_ids(np.array([0]))


def test_a_remote_that_refuses_is_named_without_its_password(tmp_path, monkeypatch) -> None:
    def refuse(source, target, timeout_s) -> None:
        raise PermissionError(f"403 Forbidden: {source}")

    monkeypatch.setattr(fetch, "_transfer", refuse)
    with pytest.raises(VlscaleError, match=r"sftp://me:\*\*\*@host/data/texts/index\.json: .*Forbidden") as caught:
        open_dataset("toy", "sftp://me:secret@host/data", True, CacheSettings(tmp_path / "cache"))
    assert "secret" not in str(caught.value)


def test_a_full_disk_first_evicts_and_then_stops(root, tmp_path, monkeypatch) -> None:
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log", retries=1)
    for row in range(len(cached.images)):
        cached.images.row(row)
    before = len(list(cached.root.glob("images/*.mds")))
    real, calls = fetch._transfer, []

    def full(source, target, timeout_s) -> None:
        calls.append(source)
        if len(list(cached.root.glob("images/*.mds"))) == before:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target, timeout_s)

    monkeypatch.setattr(fetch, "_transfer", full)
    cached.texts.input_ids(np.array([0]))
    assert len(calls) == 2
    monkeypatch.setattr(fetch, "_transfer", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(VlscaleError, match=r"the disk under .* is full .*lower data\.cache_limit"):
        cached.texts.input_ids(np.array([len(cached.texts) - 1]))


def test_a_remote_that_sends_far_too_much_is_cut_off(root, tmp_path, monkeypatch) -> None:
    cached = open_counting(root, tmp_path / "cache", tmp_path / "log", retries=0)

    def endless(source, target, timeout_s) -> None:
        with open(target, "wb") as file:
            for _ in range(200):
                file.write(b"x" * 100_000)
                file.flush()
                time.sleep(0.01)

    monkeypatch.setattr(fetch, "_transfer", endless)
    with pytest.raises(VlscaleError, match=r"more than the expected \d+ bytes arrive"):
        cached.texts.input_ids(np.array([0]))


def test_a_missing_store_is_named(root, tmp_path) -> None:
    shutil.rmtree(root / "images")
    with pytest.raises(VlscaleError, match="images is no folder"):
        open_counting(root, tmp_path / "cache", tmp_path / "log")
    with pytest.raises(VlscaleError, match=r"set data\.cache"):
        open_dataset("toy", "s3://bucket/data")


def test_a_store_without_classes_is_opened_without(tmp_path) -> None:
    root = make_dataset(tmp_path / "data", classes=False)
    assert open_counting(root, tmp_path / "cache", tmp_path / "log").classes is None


def test_an_optional_store_that_cannot_be_reached_is_an_error(root, tmp_path, monkeypatch) -> None:
    real = fetch._transfer

    def refuse(source, target, timeout_s) -> None:
        if "classes" in str(source):
            raise ConnectionResetError("reset by peer")
        real(source, target, timeout_s)

    monkeypatch.setattr(fetch, "_transfer", refuse)
    with pytest.raises(VlscaleError, match=r"classes/index\.json: cannot be fetched"):
        open_counting(root, tmp_path / "cache", tmp_path / "log")


def named(name: str, module: str, base: type[Exception] = Exception, **attributes) -> Exception:
    """An exception of a package that need not be installed."""
    return type(name, (base,), {"__module__": module, **attributes})("of some text: 404 not found, no such file")


def boto(code: str) -> Exception:
    return named("ClientError", "botocore.exceptions", response={"Error": {"Code": code}})


def caused(code: str) -> Exception:
    error = FileNotFoundError("Object s3://b/o not found")
    error.__cause__ = boto(code)
    return error


HTTP_404, HTTP_500 = SimpleNamespace(status_code=404), SimpleNamespace(status_code=500)
ANSWERS = [
    (FileNotFoundError("Object alipan://b/o not found."), True),
    (FileNotFoundError(errno.ENOENT, "No such file"), True),  # paramiko
    (FileNotFoundError(errno.ENOENT, "No such file", "/home/me/.aws/credentials"), False),
    (boto("404"), True),
    (boto("NoSuchKey"), True),
    (boto("403"), False),
    (boto("NoSuchBucket"), False),
    (caused("NoSuchKey"), True),
    (caused("403"), False),
    (named("ServiceError", "oci.exceptions", status=404, code="ObjectNotFound"), True),
    (named("ServiceError", "oci.exceptions", status=404, code="NotAuthorizedOrNotFound"), False),
    (named("NotFound", "google.api_core.exceptions"), True),
    (named("NotFound", "databricks.sdk.errors.platform"), True),
    (named("ResourceNotFoundError", "azure.core.exceptions"), True),
    (named("EntryNotFoundError", "huggingface_hub.errors"), True),
    (named("LocalEntryNotFoundError", "huggingface_hub.errors", FileNotFoundError), False),
    (named("RepositoryNotFoundError", "huggingface_hub.errors", response=HTTP_404), False),
    (named("HTTPError", "requests.exceptions", OSError, response=HTTP_404), True),
    (named("HTTPError", "requests.exceptions", OSError, response=HTTP_500), False),
    (ConnectionError("getaddrinfo: host not found"), False),
    (ValueError("the account does not exist"), False),
]


@pytest.mark.parametrize(("error", "missing"), ANSWERS, ids=lambda value: str(getattr(value, "args", value)))
def test_only_a_downloaders_own_word_for_it_says_that_a_file_is_missing(error, missing) -> None:
    assert fetch.is_missing(error, "s3://bucket/data/classes/index.json") is missing


@pytest.mark.parametrize(
    ("answers", "opened"),
    [
        ([FileNotFoundError("Object not found")] * 2, True),
        ([ConnectionError("getaddrinfo: host not found")] * 3, False),
        ([ConnectionError("reset")] * 2 + [FileNotFoundError("Object not found")], False),
        ([ConnectionError("reset")] + [FileNotFoundError("Object not found")] * 2, True),
    ],
)
def test_classes_are_absent_only_if_the_remote_says_so_twice(root, tmp_path, monkeypatch, answers, opened) -> None:
    real, left = fetch._transfer, list(answers)

    def answer(source, target, timeout_s) -> None:
        if "/classes/" in str(source):
            raise left.pop(0)
        real(source, target, timeout_s)

    monkeypatch.setattr(fetch, "_transfer", answer)
    if opened:
        assert open_counting(root, tmp_path / "cache", tmp_path / "log").classes is None
    else:
        with pytest.raises(VlscaleError, match=r"classes/index\.json: cannot be fetched .* \(3 attempts\)"):
            open_counting(root, tmp_path / "cache", tmp_path / "log")
    assert not left


def test_a_passing_absence_of_classes_is_not_believed(root, tmp_path, monkeypatch) -> None:
    real, asked = fetch._transfer, []

    def shaky(source, target, timeout_s) -> None:
        if "/classes/" in str(source):
            asked.append(source)
            if len(asked) == 1:
                raise FileNotFoundError("Object not found")
        real(source, target, timeout_s)

    monkeypatch.setattr(fetch, "_transfer", shaky)
    assert open_counting(root, tmp_path / "cache", tmp_path / "log").classes is not None


def test_a_foreign_folder_is_no_cache(root, tmp_path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("mine")
    with pytest.raises(VlscaleError, match=r"holds 'thesis\.tex'.*give an empty folder"):
        open_counting(root, tmp_path / "cache", tmp_path / "log")
    (tmp_path / "file").write_text("")
    with pytest.raises(VlscaleError, match=r"data\.cache .*file: cannot be used"):
        open_counting(root, tmp_path / "file", tmp_path / "log")


def read_all(root: Path, cache: Path, log: Path, ready, out) -> None:
    ready.wait()
    dataset = open_counting(root, cache, log)
    out.put(everything(dataset))


def test_two_processes_of_a_node_fetch_each_shard_once(root, tmp_path) -> None:
    context = multiprocessing.get_context("forkserver")
    ready, out = context.Barrier(2), context.Queue()
    arguments = (root, tmp_path / "cache", tmp_path / "log", ready, out)
    processes = [context.Process(target=read_all, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert found[0] == found[1] == everything(open_dataset("toy", root))
    assert set(counted(tmp_path / "log").values()) == {1}


def test_what_another_process_fetched_after_this_one_started_is_not_fetched_again(root, tmp_path, monkeypatch) -> None:
    settings = CacheSettings(tmp_path / "cache")
    open_root(root, settings)
    fetched = []
    real = fetch._transfer
    monkeypatch.setattr(fetch, "_transfer", lambda source, *rest: (fetched.append(source), real(source, *rest)))
    open_root(root, settings)
    assert fetched  # the same process asks again ...
    fetched.clear()
    monkeypatch.setattr("vlscale.data.remote._opened", {})  # ... one that has not asked yet does not
    open_root(root, settings)
    assert not fetched

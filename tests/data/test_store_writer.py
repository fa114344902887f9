"""Writers of the three stores: each mistake is named, and a store appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from tests.helpers import make_dataset, make_vocabulary
from vlscale.data.dataset import open_dataset
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter
from vlscale.errors import VlscaleError

BOX = [[0.1, 0.2, 0.5, 0.6]]


@pytest.fixture
def root(tmp_path):
    return make_dataset(tmp_path / "data")


def image(**change):
    return {"id": "x", "width": 4, "height": 4, "features": np.ones((1, 3)), "boxes": BOX, **change}


def write_images(root, *rows, meanwhile=lambda: None) -> None:
    """Write images of width 3; ``meanwhile`` runs before the writer closes."""
    with ImageWriter(root, 3) as writer:
        for row in rows:
            writer.write(**row)
        meanwhile()


def write_texts(root, *rows) -> None:
    """Write texts that may refer to the images a and b."""
    with TextWriter(root, make_vocabulary(), {"a": 0, "b": 1}) as writer:
        for row in rows:
            writer.write(*row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.ones((0, 3)), "boxes": np.ones((0, 4))}, "image 'x': no regions"),
        ({"features": []}, "no regions"),
        ({"features": np.ones((1, 4))}, r"features have shape \[1, 4\], expected \[1, 3\]"),
        ({"features": np.ones(3)}, r"features have shape \[3\]"),
        ({"features": [[1, 2, float("nan")]]}, "features contain NaN or infinity"),
        ({"features": [[1, 2, 1e6]]}, "exceed float16"),
        ({"features": [["a", "b", "c"]]}, "features are not numbers"),
        ({"features": [[1], [1, 2]]}, "features are not numbers"),
        ({"features": np.ones((1, 3), complex)}, "features are not numbers"),
        ({"boxes": [[0.1, 0.2, 1.1, 0.6]]}, r"box .* of region 0 is not x1 < x2"),
        ({"boxes": [[-0.1, 0.2, 0.9, 0.6]]}, "divide pixel coordinates by width and height"),
        ({"boxes": [[0.5, 0.2, 0.5, 0.6]]}, "is not x1 < x2"),
        ({"boxes": [[0.1, 0.6, 0.5, 0.2]]}, "is not x1 < x2"),
        ({"boxes": [[0.1, 0.6, 0.5, float("nan")]]}, "boxes contain NaN"),
        ({"boxes": BOX * 2}, r"boxes have shape \[2, 4\], expected \[1, 4\]"),
        ({"conf": [0.5, 0.5]}, r"conf have shape \[2\]"),
        ({"width": 0}, "size 0 x 4"),
        ({"id": ""}, "non-empty"),
        ({"id": "first"}, "no other image has"),
        ({"extra": {"a": {1, 2}}}, "extra is not JSON"),
        ({"extra": {"a": float("nan")}}, "extra is not JSON"),
    ],
)
def test_a_bad_image_is_refused_and_nothing_is_left(tmp_path, change, message) -> None:
    with pytest.raises(VlscaleError, match=message):
        write_images(tmp_path, image(id="first"), image(**change))
    assert list(tmp_path.iterdir()) == []


def test_boxes_out_by_rounding_are_clipped(tmp_path) -> None:
    with ImageWriter(tmp_path, 3) as writer:
        writer.write(**image(boxes=[[-1e-6, 0, 1 + 1e-6, 1]]))
    with TextWriter(tmp_path, make_vocabulary(), writer.rows):
        pass
    assert open_dataset("d", tmp_path).images.regions(np.array([0]), 1)[1].tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("t", "", []), "text 't': no tokens"),
        (("t", "", [[5, 6], [7, 8]]), r"input_ids have shape \[2, 2\], expected \[4\]"),
        (("t", "\ud800", [5]), "row 1: its id or text is not Unicode"),
        (("t", "", [5, 64]), r"input_ids span 5..64, expected 0..63"),
        (("t", "", [-1]), "input_ids span -1..-1"),
        (("t", "", [1.5]), "dtype float64, expected integers"),
        (("t", "", ["a"]), "expected integers"),
        (("t", "", [[1], [1, 2]]), "not one row of integers"),
        (("t", "", [5], ["nowhere"]), "refers to image 'nowhere', which the images store does not have"),
        (("t", "", [5], ["b", "b"]), "different image ids"),
        (("t", "", [5], "b"), "must be a list"),
        (("t", "", [5], ["a"]), "its first image is row 0, after a text of row 1; write texts sorted"),
        (("t", "", [5], ["b"], {"x": object()}), "extra is not JSON"),
    ],
)
def test_a_bad_text_is_refused_and_nothing_is_left(tmp_path, arguments, message) -> None:
    with pytest.raises(VlscaleError, match=message):
        write_texts(tmp_path, ("first", "", [5], ["b", "a"]), arguments)
    assert list(tmp_path.iterdir()) == []


def test_texts_without_images_come_last(tmp_path) -> None:
    with pytest.raises(VlscaleError, match="after a text of no image; write texts sorted"):
        write_texts(tmp_path, ("first", "", [5], ["a"]), ("second", "", [5]), ("third", "", [5]), ("4", "", [5], ["b"]))


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (np.ones((1, 4)) / 4, r"probs have shape \[1, 4\], expected \[1, 3\]"),
        (np.ones(3) / 3, r"probs have shape \[3\]"),
        ([[0.5, 0.5, float("nan")]], "probs contain NaN"),
        ([[2.0, -1.0, 0.0]], r"probs span -1.0..2.0, expected 0..1; apply the softmax"),
    ],
)
def test_bad_probabilities_are_refused_and_nothing_is_left(tmp_path, probs, message) -> None:
    with pytest.raises(VlscaleError, match=message), ClassWriter(tmp_path, 3) as writer:
        writer.write(probs)
    assert list(tmp_path.iterdir()) == []


def test_classes_that_do_not_match_the_images_are_refused(root) -> None:
    shutil.rmtree(root / "classes")
    with pytest.raises(VlscaleError, match=r"1 rows, but the images have \d+ regions"), ClassWriter(root, 3) as writer:
        writer.write(np.ones((1, 3)) / 3)
    assert sorted(path.name for path in root.iterdir()) == ["images", "texts"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: ImageWriter(root, 0), "feature_dim"),
        (lambda root: ImageWriter(root, 3, "float64"), "feature_dtype"),  # type: ignore[arg-type]
        (lambda root: ClassWriter(root, 3, class_names=["a"]), "num_classes is 3, but there are 1 class_names"),
        (lambda root: ImageWriter(root, 3, shard_bytes=0).__enter__(), "shard_bytes"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, make, message) -> None:
    with pytest.raises(VlscaleError, match=message):
        make(tmp_path)


def test_an_existing_store_is_kept(root) -> None:
    before = open_dataset("d", root).fingerprint
    for writer in (ImageWriter(root, 3), TextWriter(root, make_vocabulary(), {}), ClassWriter(root, 3)):
        with pytest.raises(VlscaleError, match="exists already and is not overwritten; remove it"), writer:
            pass
    assert open_dataset("d", root).fingerprint == before


def test_a_folder_that_appears_while_writing_is_kept(tmp_path) -> None:
    with pytest.raises(VlscaleError, match="exists already"):
        write_images(tmp_path, image(), meanwhile=(tmp_path / "images").mkdir)
    assert os.listdir(tmp_path) == ["images"]
    assert os.listdir(tmp_path / "images") == []


def test_nothing_stands_under_the_name_before_the_end(tmp_path) -> None:
    stale = tmp_path / f".images.tmp-{os.getpid()}"
    stale.mkdir()
    (stale / "left").touch()
    with ImageWriter(tmp_path, 3, shard_bytes=300) as writer:
        for number in range(5):
            writer.write(**image(id=str(number)))
        assert [path.name for path in tmp_path.iterdir()] == [stale.name]
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert not (tmp_path / "images" / "left").exists()
    assert len(list((tmp_path / "images").glob("*.mds"))) > 1


def test_an_interrupt_leaves_nothing(tmp_path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_images(tmp_path, image(), meanwhile=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VlscaleError, match=r"file/images: cannot be written"), ImageWriter(tmp_path / "file", 3):
        pass


def test_writing_outside_the_block_is_a_bug(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="with statement"):
        ImageWriter(tmp_path, 3).write(**image())


@pytest.mark.parametrize("least", [0, 1 << 20])
def test_a_shard_of_texts_ends_where_a_shard_of_images_does(tmp_path, monkeypatch, least):
    """Unless it would be tiny: a window of text shards then needs no more images than it must."""
    monkeypatch.setattr("vlscale.data.store_writer.LEAST_SHARD_BYTES", least)
    dataset = open_dataset("a", make_dataset(tmp_path / "a", images=60, shard_bytes=1 << 12))
    shards = json.loads((tmp_path / "a" / "images" / "index.json").read_text())["shards"]
    ends = np.cumsum([shard["samples"] for shard in shards])
    first = dataset.texts.image_refs[dataset.texts.image_ptr[:-1]]
    image_shard = np.searchsorted(ends, first, "right")
    begins = np.append(0, dataset.texts.shard_ends[:-1])
    crossing = [
        len(set(image_shard[begin:end])) > 1 for begin, end in zip(begins, dataset.texts.shard_ends, strict=True)
    ]
    assert len(ends) > 3
    assert len(begins) > 1
    assert any(crossing) is (least > 0)  # where only a full shard ends, it ends anywhere

import json

import pytest

from data_tools.exclusion import excluded_ids, is_excluded
from vlscale.errors import VlscaleError


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.fixture
def coco(tmp_path):
    images = [
        {"cocoid": 42, "split": "val", "filename": "COCO_val2014_000000000042.jpg"},
        {"cocoid": 43, "split": "test", "filename": "COCO_val2014_000000000043.jpg"},
        {"cocoid": 44, "split": "restval", "filename": "COCO_val2014_000000000044.jpg"},
        {"cocoid": 45, "split": "train", "filename": "COCO_train2014_000000000045.jpg"},
    ]
    return write(tmp_path / "dataset_coco.json", {"dataset": "coco", "images": images})


@pytest.fixture
def flickr(tmp_path):
    images = [{"filename": f"{number}.jpg", "split": split} for number, split in ((9001, "train"), (9002, "test"))]
    return write(tmp_path / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})


def test_ids_of_a_list_are_taken_literally(tmp_path):
    path = write(tmp_path / "ids.txt", "a.jpg\n\n 42 \nCOCO_x\n")
    assert excluded_ids([path]) == {"a.jpg", "42", "COCO_x"}


@pytest.mark.parametrize(
    "spelling",
    [
        "42",
        "000000000042",
        "COCO_val2014_000000000042",
        "COCO_val2014_000000000042.jpg",
        "coco_val2014_000000000042.npz",
        "COCO_train2014_000000000043.jpg",
    ],
)
def test_karpathys_val_and_test_images_in_every_spelling(coco, spelling):
    assert spelling in excluded_ids([], [coco])


@pytest.mark.parametrize("folder", ["val2014/", "coco/images/", "a b/"])
@pytest.mark.parametrize("name", ["COCO_val2014_000000000042", "COCO_val2014_000000000043.jpg", "000000000042"])
def test_folders_before_an_id_do_not_hide_an_evaluation_image(coco, folder, name):
    excluded = excluded_ids([], [coco])
    assert is_excluded(folder + name, excluded)
    assert is_excluded(name, excluded)
    assert not is_excluded(f"{folder}COCO_val2014_000000000044", excluded)
    assert not is_excluded(f"{name}/44", excluded)


def test_a_listed_id_with_folders_is_meant_there_alone(tmp_path):
    excluded = excluded_ids([write(tmp_path / "ids.txt", "a/1\n2\n")])
    assert is_excluded("a/1", excluded)
    assert is_excluded("b/2", excluded)
    assert not is_excluded("b/1", excluded)
    assert not is_excluded("1", excluded)


@pytest.mark.parametrize("spelling", ["44", "45", "COCO_train2014_000000000045.jpg", "coco_val2014_000000000044.npz"])
def test_karpathys_train_and_restval_images_stay(coco, spelling):
    assert spelling not in excluded_ids([], [coco])


def test_every_flickr30k_image_goes(flickr):
    found = excluded_ids([], [flickr])
    assert {"9001", "9001.jpg", "9002", "flickr30k_000000009002.npz"} <= found


def test_visual_genomes_copies_are_found_by_coco_and_flickr_id(tmp_path, coco, flickr):
    vg = write(tmp_path / "image_data.json", [
        {"image_id": 1, "coco_id": 42, "flickr_id": None},
        {"image_id": 2, "coco_id": None, "flickr_id": 9001},
        {"image_id": 42, "coco_id": 45, "flickr_id": 77},
        {"id": 43, "coco_id": None, "flickr_id": None},
    ])  # fmt: skip
    found = excluded_ids([], [coco, flickr], vg)
    assert {"1", "1.jpg", "vg_1.npz", "2"} <= found
    assert {"42", "43", "COCO_val2014_000000000042.jpg"}.isdisjoint(found)  # bare numbers are Visual Genome's here


def test_coco_images_that_flickr30k_holds_too(tmp_path, flickr):
    images = [
        {"id": 7, "flickr_url": "http://farm9.staticflickr.com/8186/9001_4e622c8349_z.jpg"},
        {"id": 8, "flickr_url": "http://farm9.staticflickr.com/8186/9003_4e622c8349_z.jpg"},
    ]
    annotations = write(tmp_path / "instances.json", {"images": images})
    found = excluded_ids([], [flickr], coco=[annotations])
    assert "COCO_train2014_000000000007.jpg" in found
    assert "COCO_train2014_000000000008.jpg" not in found


@pytest.mark.parametrize(("content", "message"), [
    ("{", "cannot be read as JSON"),
    ([], "dataset is None"),
    ({"dataset": "imagenet"}, "dataset is 'imagenet'"),
    ({"dataset": "coco"}, "images is no list"),
    ({"dataset": "coco", "images": [{"split": "val"}]}, r"images\[0\]: KeyError 'cocoid'"),
    ({"dataset": "coco", "images": [{"split": "val", "cocoid": "x"}]}, r"images\[0\]: ValueError"),
    ({"dataset": "coco", "images": [3]}, r"images\[0\]: TypeError"),
])  # fmt: skip
def test_other_files_are_refused_in_one_line(tmp_path, content, message):
    path = write(tmp_path / "file.json", content)
    with pytest.raises(VlscaleError, match=message) as raised:
        excluded_ids([], [path])
    assert "\n" not in str(raised.value)


def test_mappings_alone_exclude_nothing_and_are_refused(tmp_path):
    with pytest.raises(VlscaleError, match="add --exclude-karpathy FILE"):
        excluded_ids([], [], tmp_path / "image_data.json")
    with pytest.raises(VlscaleError, match="cannot be read"):
        excluded_ids([tmp_path / "missing.txt"])

"""COCO, Karpathy and Visual Genome, written as their pages describe them."""

import json

import pytest

from data_tools.formats.json_stream import read_elements
from tests.data_tools.feature_files import good, only_bad, read_all
from tests.data_tools.text_sources import open_format, write_json
from vlscale.errors import VlscaleError


def coco(captions, images=(42, 318556)):
    return {
        "info": {"year": 2014, "description": "COCO"},
        "images": [
            {"license": 5, "file_name": f"COCO_train2014_{n:012d}.jpg", "id": n, "height": 480, "width": 640}
            for n in images
        ],
        "licenses": [{"id": 1, "name": "x"}],
        "annotations": captions,
    }


CAPTIONS = [
    {"image_id": 318556, "id": 48, "caption": "A very clean and well decorated empty bathroom"},
    {"image_id": 42, "id": 49, "caption": " Ein Hund läuft. \n"},
    {"image_id": 318556, "id": 50, "caption": 'A "quoted" \\ caption 😀'},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_coco_captions_come_back(tmp_path, indent, ascii_only):
    path = write_json(tmp_path / "captions_train2014.json", coco(CAPTIONS), indent=indent, ensure_ascii=ascii_only)
    found = good(open_format("coco_captions", path))
    assert [(text.id, text.images, text.text) for text in found] == [
        (str(each["id"]), (str(each["image_id"]),), each["caption"].strip()) for each in CAPTIONS
    ]


@pytest.mark.parametrize(
    ("template", "image"),
    [
        ("coco_train2014_{id:012d}.npz", "coco_train2014_000000000042.npz"),
        ("{stem}", "COCO_train2014_000000000042"),
        ("{file}", "COCO_train2014_000000000042.jpg"),
        ("{source}/{id:6d}", "captions_train2014/    42"),
    ],
)
def test_images_are_called_as_the_images_store_calls_them(tmp_path, template, image):
    path = write_json(tmp_path / "captions_train2014.json", coco(CAPTIONS[1:2]))
    assert good(open_format("coco_captions", path, "--image-id", template))[0].images == (image,)


@pytest.mark.parametrize("template", ["{id!r}", "{id.__class__}", "{id:>99}", "{0}", "{other}", "x", "{", "{id[0]}"])
def test_other_templates_are_refused(tmp_path, template):
    with pytest.raises(VlscaleError, match=r"--image-id .*use \{id\}"):
        open_format("coco_captions", tmp_path, "--image-id", template)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"image_id": 42, "id": 1, "caption": "  "}, "annotations[1]: caption: is empty"),
        ({"image_id": 42, "id": 1, "caption": None}, "annotations[1]: caption: None is not a text"),
        ({"image_id": 42, "id": 1}, "annotations[1]: caption: is missing"),
        ({"id": 1, "caption": "x"}, "annotations[1]: image_id: is missing"),
        ({"image_id": 42, "caption": "x"}, "annotations[1]: id: is missing"),
        ({"image_id": 42, "id": "x" * 600, "caption": "x"}, "annotations[1]: id: "),
        ({"image_id": 42, "id": 1, "caption": "\ud800"}, "annotations[1]: caption: holds half a surrogate pair"),
        ({"image_id": 42, "id": 1, "caption": "x" * (1 << 20 | 1)}, "annotations[1]: caption: has 1048577 bytes"),
        ([1], "annotations[1]: [1] is not a JSON object"),
    ],
)
def test_bad_coco_rows_name_file_row_and_field(tmp_path, row, why):
    path = write_json(tmp_path / "c.json", coco([CAPTIONS[0], row, CAPTIONS[1]]))
    source = open_format("coco_captions", path)
    assert only_bad(source).startswith(f"c.json: {why}")
    assert len(read_all(source)) == 3


def test_bytes_that_are_no_utf8_make_one_bad_row(tmp_path):
    path = write_json(tmp_path / "c.json", coco(CAPTIONS), ensure_ascii=False)
    path.write_bytes(path.read_bytes().replace("läuft".encode(), b"l\xe4uft"))
    assert only_bad(open_format("coco_captions", path)) == (
        "c.json: annotations[1]: caption: is not UTF-8 at character 11 (byte 0xe4)"
    )


def test_an_image_without_a_file_name_is_a_bad_row_where_the_name_is_needed(tmp_path):
    path = write_json(tmp_path / "c.json", coco([{"image_id": 7, "id": 1, "caption": "x"}]))
    assert only_bad(open_format("coco_captions", path, "--image-id", "{stem}")) == (
        "c.json: annotations[0]: image_id: {stem} is not known for this image"
    )


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_lists_are_read_element_by_element_whatever_is_read_at_a_time(tmp_path, piece):
    value = {
        "a": 1,
        "list": [{"x": [1, {"y": 'ä\\"]'}]}, 12345, "s", None, [1]],
        "empty": [],
        "map": {"k": [2]},
        "n": 99,
    }
    for indent in (None, 3):
        path = write_json(tmp_path / "x.json", value, indent=indent)
        assert list(read_elements(path, piece)) == [
            ("a", -1, 1),
            *(("list", index, element) for index, element in enumerate(value["list"])),
            ("map", -1, {"k": [2]}),
            ("n", -1, 99),
        ]
    for whole, expected in (([], []), ({}, []), ([[1], 2], [("", 0, [1]), ("", 1, 2)])):
        assert list(read_elements(write_json(path, whole), piece)) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"annotations": [{"id": 1} ', "is cut off at character 27"),
        ('{"annotations": [{"id": 1', "is not JSON, or is cut off, at character 17"),
        ('{"annotations": [{"id": 1} {"id": 2}]}', r"is not JSON: has '{', expected ',' or '\]', at character 27"),
        ('{"annotations": []} x', "is not JSON: goes on at character 20"),
        ("12", "is not JSON: has '1', expected '{'"),
        ("{3: 4}", "has the key 3, expected text"),
        ('{"a": ' + "[" * 100_000, "is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        ("", "is empty"),
    ],
)
def test_damaged_json_is_one_line_that_names_the_file(tmp_path, text, why):
    (tmp_path / "c.json").write_text(text)
    for piece in (9, 1 << 20):
        with pytest.raises(VlscaleError, match=rf"c\.json: {why}"):
            list(read_elements(tmp_path / "c.json", piece))


def test_a_json_list_is_read_in_bounded_memory(tmp_path):
    import tracemalloc

    with (tmp_path / "c.json").open("w") as file:
        file.write('{"annotations": [')
        file.writelines(
            ("" if n == 0 else ",") + json.dumps({"image_id": n, "id": n, "caption": "a dog " * 20})
            for n in range(150_000)
        )
        file.write("]}")
    tracemalloc.start()
    assert sum(1 for _ in open_format("coco_captions", tmp_path / "c.json").read({"file": 0})) == 150_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "c.json").stat().st_size > 20_000_000
    assert peak < 12_000_000


def test_what_is_no_caption_file_is_refused(tmp_path):
    path = write_json(tmp_path / "instances.json", {"images": []})
    for name in ("coco_captions", "karpathy"):
        with pytest.raises(VlscaleError, match=r"instances\.json: has no list of|no list"):
            list(open_format(name, write_json(path, {"other": []})).read({"file": 0}))
    with pytest.raises(VlscaleError, match=r"instances\.json: is a map with the key 'images'"):
        list(open_format("visual_genome", write_json(path, {"images": [1]})).read({"file": 0}))
    with pytest.raises(VlscaleError, match="missing"):
        open_format("coco_captions", tmp_path / "missing.json").parts()


def karpathy_image(number, split, name, cocoid=None, folder="train2014"):
    image = {
        "sentids": [number * 2, number * 2 + 1],
        "imgid": number,
        "sentences": [
            {"tokens": ["a", "dog"], "raw": f"A dog {number}.", "imgid": number, "sentid": number * 2},
            {"tokens": ["a", "cat"], "raw": f"A cat {number}.", "imgid": number, "sentid": number * 2 + 1},
        ],
        "split": split,
        "filename": name,
    }
    return image if cocoid is None else {**image, "cocoid": cocoid, "filepath": folder}


def test_karpathys_coco_comes_back_with_its_splits(tmp_path):
    splits = ("train", "restval", "val", "test")
    images = [karpathy_image(n, split, f"COCO_train2014_{n:012d}.jpg", n + 100) for n, split in enumerate(splits)]
    path = write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    found = good(open_format("karpathy", path))
    assert [(text.id, text.images[0], text.text, text.extra["split"]) for text in found] == [
        (str(2 * n + k), str(n + 100), f"A {what} {n}.", split)
        for n, split in enumerate(splits)
        for k, what in enumerate(("dog", "cat"))
    ]
    options = ("--split", "train", "--split", "restval", "--image-id", "coco_{folder}_{id:012d}.npz")
    found = good(open_format("karpathy", path, *options))
    assert [text.images[0] for text in found[::2]] == [f"coco_train2014_{n:012d}.npz" for n in (100, 101)]


def test_karpathys_flickr30k_is_named_by_its_files(tmp_path):
    images = [karpathy_image(0, "train", "1000092795.jpg")]
    path = write_json(tmp_path / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    assert good(open_format("karpathy", path))[0].images == ("1000092795",)
    found = good(open_format("karpathy", path, "--image-id", "flickr30k_{id:012d}.npz"))
    assert found[0].images == ("flickr30k_001000092795.npz",)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"split": "dev"}, "images[1]: split: 'dev' is none of"),
        ({"sentences": 3}, "images[1]: sentences: 3 is not a list"),
        ({"sentences": [{"raw": "", "sentid": 9}]}, "images[1].sentences[0]: raw: is empty"),
        ({"sentences": [{"raw": "x"}]}, "images[1].sentences[0]: sentid: is missing"),
        ({"filename": None}, "images[1]: filename: None is not a text"),
    ],
)
def test_bad_karpathy_rows(tmp_path, change, why):
    images = [karpathy_image(0, "train", "1.jpg"), {**karpathy_image(1, "train", "2.jpg"), **change}]
    path = write_json(tmp_path / "d.json", {"images": images, "dataset": "flickr30k"})
    assert only_bad(open_format("karpathy", path)).startswith(f"d.json: {why}")


def region(number, image, phrase, **other):
    row = {"region_id": number, "width": 82, "height": 139, "image_id": image, "phrase": phrase, "y": 57, "x": -1}
    return {**row, **other}


GENOME = [
    {
        "regions": [region(1382, 1, "the clock is green in colour"), region(1383, 1, " shade is along the street ")],
        "id": 1,
    },
    {"regions": [], "id": 2},
    {"regions": [region(7, 3, "a man")], "id": 3},
]


def test_visual_genomes_regions_come_back(tmp_path):
    path = write_json(tmp_path / "region_descriptions.json", GENOME)
    found = good(open_format("visual_genome", path, "--image-id", "vg_{id}"))
    assert [(text.id, text.images, text.text) for text in found] == [
        ("1382", ("vg_1",), "the clock is green in colour"),
        ("1383", ("vg_1",), "shade is along the street"),
        ("7", ("vg_3",), "a man"),
    ]
    assert found[0].extra == {"box_xywh": [-1, 57, 82, 139]}


def test_visual_genomes_image_sizes_are_put_beside_the_boxes(tmp_path):
    path = write_json(tmp_path / "region_descriptions.json", GENOME)
    data = [
        {"width": 800, "height": 600, "image_id": n, "url": "x", "coco_id": None, "flickr_id": None} for n in (3, 1)
    ]
    sizes = write_json(tmp_path / "image_data.json", data)
    found = good(open_format("visual_genome", path, "--image-data", sizes))
    assert [text.extra["image_size"] for text in found] == [[800, 600]] * 3
    sizes = write_json(tmp_path / "image_data.json", data[1:])
    assert only_bad(open_format("visual_genome", path, "--image-data", sizes)) == (
        "region_descriptions.json: entry 3: regions[0]: image_id: image 3 is not in image_data.json"
    )
    bad = write_json(tmp_path / "image_data.json", [{"image_id": 1, "width": 0, "height": 3}])
    with pytest.raises(VlscaleError, match=r"image_data\.json: \[0\]: width: 0 lies outside"):
        read_all(open_format("visual_genome", path, "--image-data", bad))


def test_the_first_version_of_visual_genome_is_read_too(tmp_path):
    old = [{"id": 5, "regions": [{"id": 9, "image": 5, "phrase": "x", "x": 1, "y": 2, "width": 3, "height": 4}]}]
    found = good(open_format("visual_genome", write_json(tmp_path / "r.json", old)))
    assert (found[0].id, found[0].images) == ("9", ("5",))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (region(8, 1, ""), "phrase: is empty"),
        (region(8, 1, 5), "phrase: 5 is not a text"),
        (region(8, "x", "y"), "image_id: 'x' is not a whole number"),
        (region(8, 1, "x", width=None), "width: None is not a whole number"),
        ({"phrase": "x"}, "id: is missing"),
        ("x", "'x' is not a JSON object"),
    ],
)
def test_bad_visual_genome_rows(tmp_path, row, why):
    path = write_json(tmp_path / "r.json", [*GENOME, {"id": 4, "regions": [region(11, 4, "good"), row]}])
    assert only_bad(open_format("visual_genome", path)) == f"r.json: entry 4: regions[1]: {why}"

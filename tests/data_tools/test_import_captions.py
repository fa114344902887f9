"""COCO, Karpathy, Visual Genome, Conceptual Captions, SBU and Flickr30k, written as their pages describe them."""

import json

import pytest

from data_tools.formats.conceptual_captions import ConceptualCaptions
from data_tools.formats.json_stream import read_elements
from data_tools.formats.numbered_lines import NameMap, numbered_parts, row_starts
from data_tools.formats.sbu import Sbu
from data_tools.formats.urls import UrlNames
from data_tools.records import BadRow
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


ROWS = [
    (
        "a very typical bus station",
        "http://lh6.ggpht.com/-IvRtNLNcG8o/TpFyrudaT6I/AAAAAAAAM6o/_11MuAAKalQ/IMG_3422.JPG",
    ),
    ("sierra looked stunning in this top and this skirt", "http://78.media.tumblr.com/3b133294bdc7/tumblr_o.jpg"),
    ("junge Leute", "https://media.gettyimages.com/photos/x-id1?s=612x612"),
]


def write_gcc(path, rows=ROWS, end="\n"):
    path.write_bytes("".join(f"{text}\t{url}{end}" for text, url in rows).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_conceptual_captions_are_named_by_their_rows(tmp_path, end):
    path = write_gcc(tmp_path / "Train_GCC-training.tsv", end=end)
    found = good(open_format("conceptual_captions", path))
    assert [(text.id, text.images, text.text) for text in found] == [
        (f"Train_GCC-training-{n}", (str(n),), text) for n, (text, _) in enumerate(ROWS)
    ]
    found = good(open_format("conceptual_captions", path, "--image-id", "{id:09d}"))
    assert [text.images[0] for text in found] == ["000000000", "000000001", "000000002"]
    found = read_all(open_format("conceptual_captions", path, "--image-id", "{stem}"))
    assert [text.images[0] for text in found[:2]] == ["IMG_3422", "tumblr_o"]


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_rows_keep_their_numbers_in_every_part(tmp_path, every):
    rows = [(f"caption {n}", f"http://x.org/{n}.jpg") for n in range(23)]
    path = write_gcc(tmp_path / "cc.tsv", rows)
    source = ConceptualCaptions([path], UrlNames("{id}", None, [path]), rows_per_part=every)
    assert len(source.parts()) == -(-23 // every)
    assert [(text.text, text.images[0]) for text in good(source)] == [(f"caption {n}", str(n)) for n in range(23)]


def test_rows_are_counted_with_and_without_a_last_line_feed(tmp_path):
    path = tmp_path / "x"
    for text, count, starts in (
        (b"a\nb\nc", 3, [0, 4]),
        (b"a\nb\nc\nd\n", 4, [0, 4]),
        (b"a", 1, [0]),
        (b"\n\n\nd", 4, [0, 2]),
    ):
        path.write_bytes(text)
        assert row_starts(path, 2) == (starts, count)
    parts = numbered_parts([path], 2)
    assert [part["row"] for part in parts] == [1, 3]


def test_an_image_map_names_the_images_that_were_downloaded(tmp_path):
    path = write_gcc(tmp_path / "cc.tsv")
    names = tmp_path / "map.tsv"
    names.write_text(f"{ROWS[2][1]}\tc.jpg\n{ROWS[0][1]}\ta.jpg\n")
    source = open_format("conceptual_captions", path, "--image-map", names)
    assert [text.images[0] for text in read_all(source) if not isinstance(text, BadRow)] == ["a.jpg", "c.jpg"]
    assert only_bad(source).startswith(
        "cc.tsv: row 2: url: 'http://78.media.tumblr.com/3b133294bdc7/tumblr_o.jpg' is not in"
    )


def test_image_maps_are_strict(tmp_path):
    path = tmp_path / "m.tsv"
    for text, why in (
        ("a\n", "row 1: has 1 fields, expected 2"),
        ("a\tb\na\tc\n", "'a' stands there for"),
        ("a\t\n", "row 1: image id"),
    ):
        path.write_text(text)
        with pytest.raises(VlscaleError, match=rf"m\.tsv: {why}"):
            NameMap(path)
    path.write_text("".join(f"name {n}\timage {n * 7}\n" for n in range(1000)) + "name 5\timage 35\n")
    found = NameMap(path)
    assert all(found.get(f"name {n}") == f"image {n * 7}" for n in range(1000))
    assert found.get("name 1000") is None


def test_cc12m_has_its_address_first(tmp_path):
    path = tmp_path / "cc12m.tsv"
    path.write_text("https://x.org/a.jpg\ta caption\n")
    assert good(open_format("conceptual_captions", path, "--columns", "url,caption"))[0].text == "a caption"
    assert only_bad(open_format("conceptual_captions", path)) == "cc12m.tsv: row 1: url: 'a caption' is not an address"


def test_two_files_need_names_that_tell_their_rows_apart(tmp_path):
    paths = [write_gcc(tmp_path / name) for name in ("train.tsv", "val.tsv")]
    with pytest.raises(VlscaleError, match=r"rows of 2 files have the same numbers; use {source}"):
        open_format("conceptual_captions", paths)
    found = good(open_format("conceptual_captions", paths, "--image-id", "{source}_{id}"))
    assert [text.images[0] for text in found] == [f"{name}_{n}" for name in ("train", "val") for n in range(3)]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"only a caption", "row 2: has 1 fields, expected 2 (caption, url)"),
        (b"a\tb\thttp://x.org/", "row 2: has 3 fields"),
        (b" \thttp://x.org/", "row 2: caption: is empty"),
        (b"a\t", "row 2: url: '' is not an address"),
        (b"a\tftp:x", "row 2: url: 'ftp:x' is not an address"),
        (b"gr\xfcn\thttp://x.org/", "row 2: caption: is not UTF-8 at byte 2"),
        (b"a\thttp://[::1/", "row 2: url: "),
        (b"x" * (1 << 20), "row 2: is longer than"),
    ],
)
def test_bad_conceptual_captions(tmp_path, row, why):
    path = tmp_path / "cc.tsv"
    path.write_bytes(b"good\thttp://x.org/1.jpg\n" + row + b"\ngood\thttp://x.org/2.jpg\n")
    source = open_format("conceptual_captions", path)
    assert only_bad(source).startswith(f"cc.tsv: {why}")
    assert [text.images[0] for text in read_all(source) if not isinstance(text, BadRow)] == ["0", "2"]


def write_sbu(folder, rows, captions="SBU_captioned_photo_dataset_captions.txt"):
    path = folder / captions
    path.write_text("".join(f"{text}\n" for text, _ in rows), encoding="utf-8")
    path.with_name(captions.replace("captions", "urls")).write_text("".join(f"{url}\n" for _, url in rows))
    return path


SBU = [(f"Caption {n} é", f"http://static.flickr.com/2723/43850589{n:02d}_b0f291553e.jpg") for n in range(17)]


@pytest.mark.parametrize("every", [1, 4, 1000])
def test_sbus_two_files_come_back(tmp_path, every):
    path = write_sbu(tmp_path, SBU)
    found = good(Sbu([path], UrlNames("{stem}", None, [path]), every))
    assert [(text.text, text.images[0]) for text in found] == [
        (text, f"43850589{n:02d}_b0f291553e") for n, (text, _) in enumerate(SBU)
    ]
    assert [text.id.rpartition("-")[2] for text in found] == [str(n) for n in range(17)]


def test_sbus_json_comes_back(tmp_path):
    value = {
        "image_urls": [url for _, url in SBU],
        "user_ids": ["47889917@N08"] * 17,
        "captions": [text for text, _ in SBU],
    }
    path = write_json(tmp_path / "sbu-captions-all.json", value)
    assert [(text.text, text.images[0]) for text in good(open_format("sbu", path))] == [
        (text, str(n)) for n, (text, _) in enumerate(SBU)
    ]
    for change in ({"captions": value["captions"][:-1]}, {"image_urls": value["image_urls"][:5]}):
        write_json(path, {**value, **change})
        with pytest.raises(VlscaleError, match="not equally many entries"):
            read_all(open_format("sbu", path))
    with pytest.raises(VlscaleError, match="has no lists captions and image_urls"):
        read_all(open_format("sbu", write_json(path, {"a": []})))


def test_blank_rows_of_sbu_do_not_shift_the_others(tmp_path):
    rows = list(SBU)
    rows[3] = ("", rows[3][1])
    rows[9] = (rows[9][0], "")
    path = write_sbu(tmp_path, rows)
    for every in (2, 1000):
        found = read_all(Sbu([path], UrlNames("{id}", None, [path]), every))
        bad = [str(row) for row in found if isinstance(row, BadRow)]
        assert [each.partition(": ")[2] for each in bad] == [
            "row 4: caption: is empty",
            "row 10: url: '' is not an address",
        ]
        good_rows = [(text.text, text.images[0]) for text in found if not isinstance(text, BadRow)]
        assert good_rows == [(text, str(n)) for n, (text, _) in enumerate(SBU) if n not in (3, 9)]


def test_sbus_files_must_belong_together(tmp_path):
    path = write_sbu(tmp_path, SBU)
    urls = tmp_path / "SBU_captioned_photo_dataset_urls.txt"
    urls.write_text("".join(f"{url}\n" for _, url in SBU[:-1]))
    with pytest.raises(VlscaleError, match=r"captions\.txt: has 17 rows, but .*urls\.txt has 16"):
        open_format("sbu", path).parts()
    urls.unlink()
    with pytest.raises(VlscaleError, match=r"urls\.txt"):
        open_format("sbu", path).parts()
    with pytest.raises(VlscaleError, match=r"expected \.\.\._captions\.txt"):
        open_format("sbu", write_gcc(tmp_path / "x.txt")).parts()


FLICKR = [("1000092795.jpg", n, f"Two young guys {n} .") for n in range(5)] + [("10002456.jpg", 0, "Several men .")]


@pytest.mark.parametrize("csv", [False, True])
def test_flickr30ks_captions_come_back(tmp_path, csv):
    path = tmp_path / ("results.csv" if csv else "results_20130124.token")
    rows = [f"{file}| {n}| {text}" if csv else f"{file}#{n}\t{text}" for file, n, text in FLICKR]
    path.write_text("".join(f"{row}\n" for row in ["image_name| comment_number| comment"] * csv + rows))
    found = good(open_format("flickr30k", path))
    assert [(text.id, text.images, text.text) for text in found] == [
        (f"{file}#{n}", (file.removesuffix(".jpg"),), text) for file, n, text in FLICKR
    ]
    found = good(open_format("flickr30k", path, "--image-id", "flickr30k_{id:012d}.npz"))
    assert found[0].images == ("flickr30k_001000092795.npz",)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"1.jpg\ta caption", "row 2: image: '1.jpg' is not of the form 1000092795.jpg#0"),
        (b"1.jpg#0", "row 2: has 1 fields, expected 2"),
        (b"1.jpg#0\t ", "row 2: caption: is empty"),
        (b"1.jpg#x\ta", "row 2: number: "),
        (b"#0\ta", "row 2: image: "),
        (b"1.jpg#0\t\xff", "row 2: caption: is not UTF-8"),
    ],
)
def test_bad_flickr30k_rows(tmp_path, row, why):
    path = tmp_path / "results.token"
    path.write_bytes(b"1.jpg#0\tgood\n" + row + b"\n")
    assert only_bad(open_format("flickr30k", path)).startswith(f"results.token: {why}")

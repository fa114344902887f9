"""Conceptual Captions, SBU and Flickr30k, written as their pages describe them."""

import pytest

from data_tools.formats.conceptual_captions import ConceptualCaptions
from data_tools.formats.numbered_lines import NameMap, numbered_parts, row_starts
from data_tools.formats.sbu import Sbu
from data_tools.formats.urls import UrlNames
from data_tools.records import BadRow
from tests.data_tools.feature_files import good, only_bad, read_all
from tests.data_tools.text_sources import open_format, write_json
from vlscale.errors import VlscaleError

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

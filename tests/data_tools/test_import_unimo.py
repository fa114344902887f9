import argparse
import base64
import gzip
import tracemalloc

import numpy as np
import pytest

from data_tools.formats import unimo_images, unimo_texts
from data_tools.formats.unimo_images import UnimoImages
from data_tools.formats.unimo_index import FirstRows, SeenImages, read_rows
from data_tools.import_images import run
from data_tools.records import BadRow, ImageLayout
from tests.data_tools.feature_files import Picture, assert_same, b64, good, only_bad, read_all, write_lines
from tests.golden_batches import golden_folder, load_golden
from vlscale.errors import VlscaleError

PICTURES = [Picture(f"{500 + number}", 640, 480 - number, 2 + number % 4, seed=number) for number in range(12)]
TOKENS = {"token_ids": "0 17 4 9 2", "sent_ids": "0 0 0 0 0", "pos_ids": "2 3 4 5 6"}


def coco_row(picture, caption, **other):
    """16 fields; the id has nine characters more than the image's."""
    fields = {
        "image_id": "COCOIMGS_" + picture.id,
        "caption_id": caption,
        **TOKENS,
        "seg_labels": "0 0 0 0 0",
        "node_attr_begin": "0",
        "node_attr_end": "0",
        "image_h": str(picture.height),
        "image_w": str(picture.width),
        "number_box": str(picture.regions),
        "boxes": b64(picture.boxes),
        "probs": b64(picture.probs),
        "attr_probs": b64(picture.probs[:, :3]),
        "image_embeddings": b64(picture.features),
        "label": "1",
    }
    return ";".join({**fields, **other}.values())


def snli_row(picture, name, label="1", **other):
    fields = {
        "image_id": picture.id + ".jpg",
        "data_id": name,
        "label": label,
        **TOKENS,
        "unused": "-",
        "image_w": str(picture.width),
        "image_h": str(picture.height),
        "number_box": str(picture.regions),
        "boxes": b64(picture.boxes),
        "image_embeddings": b64(picture.features),
        "unused 2": "-",
        "unused 3": "-",
    }
    return ";".join({**fields, **other}.values())


def flickr_row(picture, **other):
    fields = {
        "image_id": picture.id,
        "image_w": str(picture.width),
        "image_h": str(picture.height),
        "number_box": str(picture.regions),
        "boxes": b64(picture.boxes),
        "image_embeddings": b64(picture.features),
        "probs": b64(picture.probs),
    }
    return "\t".join({**fields, **other}.values())


def open_source(module, paths, *options):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = parser.parse_args(list(options))
    arguments.sources = list(paths)
    return module.open_source(arguments)


def images_of(path, rows, *options):
    return open_source(unimo_images, [write_lines(path / "part0.txt", rows)], *options)


def texts_of(path, rows, *options):
    return open_source(unimo_texts, [write_lines(path / "part0.txt", rows)], *options)


def test_coco_images_come_once_although_each_caption_repeats_them(tmp_path):
    rows = [coco_row(picture, f"{picture.id}{caption}") for caption in range(3) for picture in PICTURES]
    paths = [write_lines(tmp_path / f"part{number}", rows[number::2]) for number in (0, 1)]
    source = open_source(unimo_images, paths)
    source.rows_per_part = 5
    assert source.layout() == ImageLayout(16, "float32", 7, "float32")
    assert len(source.parts()) == 4
    records = {record.id: record for record in good(source)}
    assert sorted(records) == [picture.id for picture in PICTURES]
    for picture in PICTURES:
        assert_same(records[picture.id], picture)
        np.testing.assert_array_equal(records[picture.id].class_probs, picture.probs)


def test_snli_ve_images_come_once(tmp_path):
    rows = [snli_row(picture, f"d{picture.id}-{number}") for picture in PICTURES for number in range(3)]
    for record, picture in zip(good(images_of(tmp_path, rows)), PICTURES, strict=True):
        assert record.id == picture.id + ".jpg"
        np.testing.assert_array_equal(record.features, picture.features)
        np.testing.assert_array_equal(record.boxes, picture.unit_boxes)


@pytest.mark.parametrize("packed", [True, False])
def test_flickr_features_come_back_equal(tmp_path, packed):
    path = write_lines(tmp_path / "part0.tsv", map(flickr_row, PICTURES))
    if packed:
        other = tmp_path / "part0.tsv.gz"
        other.write_bytes(gzip.compress(path.read_bytes()))
        path = other
    for record, picture in zip(good(open_source(unimo_images, [path])), PICTURES, strict=True):
        assert_same(record, picture)
        np.testing.assert_array_equal(record.class_probs, picture.probs)


def test_a_filelist_names_the_files_beside_it(tmp_path):
    write_lines(tmp_path / "b", map(flickr_row, PICTURES[:5]))
    write_lines(tmp_path / "a", map(flickr_row, PICTURES[5:]))
    listing = write_lines(tmp_path / "filelist", ["b", "a"])
    found = good(open_source(unimo_images, [listing], "--filelist"))
    assert [record.id for record in found] == [picture.id for picture in PICTURES]
    for name in ("/etc/passwd", "../b", "x/../../b"):
        write_lines(listing, ["b", name])
        with pytest.raises(VlscaleError, match=r"filelist: row 2: .* leaves the list's folder"):
            open_source(unimo_images, [listing], "--filelist")


def write_ids(path, rows):
    path.write_text("".join(f"{name}\t{number}\n" for name, number in rows))
    return path


def test_unimos_numbers_of_the_images_are_put_beside_their_names(tmp_path):
    ids = write_ids(tmp_path / "img_id.tsv", [(picture.id, 70 - n) for n, picture in enumerate(PICTURES)])
    rows = list(map(flickr_row, PICTURES))
    found = good(images_of(tmp_path, rows, "--img-id", str(ids)))
    assert {each.id: each.extra["img_id"] for each in found} == {each.id: 70 - n for n, each in enumerate(PICTURES)}
    assert not good(images_of(tmp_path, rows))[0].extra
    write_ids(ids, [(picture.id, n) for n, picture in enumerate(PICTURES[1:])])
    assert "image_id: '500' is not in --img-id" in only_bad(images_of(tmp_path, rows, "--img-id", str(ids)))
    with pytest.raises(VlscaleError, match="is for Flickr feature files, but the source is snli_ve"):
        images_of(tmp_path, [snli_row(PICTURES[0], "d")], "--img-id", str(ids))


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([("1", 2), ("1", 3)], "row 2: name: stands on an earlier row too"),
        ([("1", 2), ("3", 2)], "row 2: number: stands on an earlier row too"),
        ([("1", "x")], "row 1: number: 'x' is not a whole number"),
        ([("", 2)], "row 1: name: '' is not a name"),
        ([("1\t2", 2)], "row 1: has 3 fields, expected 2"),
        ([], "is empty"),
    ],
)
def test_bad_files_of_numbers_are_one_line(tmp_path, rows, why):
    with pytest.raises(VlscaleError, match=rf"img_id\.tsv: {why}"):
        unimo_images.read_img_ids(write_ids(tmp_path / "img_id.tsv", rows))


def test_that_attr_probs_are_not_kept_is_said_once(tmp_path, capsys):
    source = images_of(tmp_path, [coco_row(P, "c")])
    source.parts()
    assert capsys.readouterr().err.splitlines() == ["unimo_images: attr_probs of the COCO caption parts are not kept"]
    assert "attr_probs" in unimo_images.HELP


def test_what_is_kept_of_the_images_while_the_first_rows_are_found_is_small():
    seen, rows, names = SeenImages(), FirstRows(), [f"image {n}".encode() for n in range(50_000)]
    tracemalloc.start()
    for n, name in enumerate(names):
        assert seen.add(name, name) is None
        rows.add(n << 20, n + 1)
    parts = list(rows.spell(2048))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 100 * len(names)
    assert len(seen) == len(names)
    assert [seen.add(name, name) for name in names[::100]] == [True] * 500
    assert seen.add(names[7], b"other") is False
    assert [row for part in parts for row in read_rows(part)] == [(n << 20, n + 1) for n in range(50_000)]


def test_the_files_are_searched_once_for_all_jobs_of_a_build(tmp_path, monkeypatch):
    rows = [coco_row(picture, f"{picture.id}{caption}") for caption in range(3) for picture in PICTURES]
    path = write_lines(tmp_path / "part0.txt", rows)
    monkeypatch.setattr(unimo_images, "ROWS_PER_PART", 5)
    arguments = ["unimo_images", str(path), "--out", str(tmp_path / "out")]
    run([*arguments, "--shard", "0/2"])
    monkeypatch.setattr(UnimoImages, "_first_seen", None)  # fails if it is called
    run([*arguments, "--shard", "1/2"])
    with pytest.raises(VlscaleError, match=r"begun otherwise: build\.boxes"):
        run([*arguments, "--shard", "1/2", "--boxes", "xywh"])
    assert run([*arguments, "--merge"])["rows"] == len(PICTURES)


P = Picture("9", regions=3)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (coco_row(P, "c", image_embeddings=b64(P.features[:2])), "image_embeddings: has 128 bytes, expected 192"),
        (coco_row(P, "c", image_embeddings=b64(P.features[:, :9])), "image_embeddings: has 108 bytes, expected 192"),
        (coco_row(P, "c", number_box="2"), "image_embeddings: has 192 bytes, expected 128"),
        (coco_row(P, "c", probs=b64(P.probs[:, :5])), "probs: has 60 bytes, expected 84"),
        (coco_row(P, "c", boxes=b64(P.boxes[:, [2, 3, 0, 1]])), "boxes[0]: "),
        (coco_row(P, "c", image_id="COCOIMGS_"), "image_id: "),
        (coco_row(P, "c", image_h="0"), "image_h: 0 lies outside"),
        (coco_row(P, "c").rsplit(";", 2)[0], "has 14 fields, expected 16; a row that was cut off?"),
        (coco_row(PICTURES[3], "c", image_embeddings=b64(PICTURES[3].features + 1)), "differ from an earlier row"),
    ],
)
def test_bad_image_rows_are_refused_where_unimo_resizes_them(tmp_path, row, why):
    rows = [*(coco_row(picture, picture.id) for picture in PICTURES), row]
    source = images_of(tmp_path, rows)
    message = only_bad(source)
    assert message.startswith("part0.txt: row 13: ")
    assert why in message
    assert sum(not isinstance(each, BadRow) for each in read_all(source)) == len(PICTURES)


def test_sides_in_the_other_order_are_noticed_and_an_option_reads_them(tmp_path):
    rows = [flickr_row(each, image_w=str(each.height), image_h=str(each.width)) for each in PICTURES]
    bad = [str(row) for row in read_all(images_of(tmp_path, rows)) if isinstance(row, BadRow)]
    assert bad
    assert all("leaves the image" in each for each in bad)
    for record, picture in zip(good(images_of(tmp_path, rows, "--size-order", "hw")), PICTURES, strict=True):
        assert_same(record, picture)


def test_rows_of_no_known_kind_are_refused(tmp_path):
    with pytest.raises(VlscaleError, match=r"part0\.txt: row 1: no kind of UNIMO file"):
        images_of(tmp_path, ["a;b;c"])
    with pytest.raises(VlscaleError, match="no kind of UNIMO file"):
        texts_of(tmp_path, [flickr_row(P)])


def test_coco_captions_are_word_pieces_without_their_frame(tmp_path):
    rows = [coco_row(picture, f"c{picture.id}") for picture in PICTURES]
    rows.insert(3, coco_row(PICTURES[0], "none", token_ids="", sent_ids="", pos_ids=""))  # an image without a text
    found = good(texts_of(tmp_path, rows))
    assert [(text.id, text.images) for text in found] == [(f"c{each.id}", (each.id,)) for each in PICTURES]
    assert {tuple(text.input_ids) for text in found} == {(17, 4, 9)}
    assert found[0].text == ""
    assert tuple(good(texts_of(tmp_path, rows, "--cls-id", "5", "--sep-id", "9"))[0].input_ids) == (0, 17, 4, 9, 2)


def test_snli_ve_texts_have_labels_and_their_images_ids(tmp_path):
    found = good(texts_of(tmp_path, [snli_row(picture, f"d{picture.id}", "2") for picture in PICTURES]))
    assert [text.images for text in found] == [(each.id + ".jpg",) for each in PICTURES]
    assert found[0].extra == {"label": 2}
    assert found[0].id == "d500"


def test_flickr_captions_and_object_tags(tmp_path):
    caption = good(texts_of(tmp_path, ["0 5 6 2;0 0 0 0;2 3 4 5;500;12"]))[0]
    assert (caption.id, caption.images, list(caption.input_ids)) == ("12", ("500",), [5, 6])
    tags = good(texts_of(tmp_path, ["500;5 6 7;0 0 0;2 3 4"]))[0]
    assert (tags.id, tags.images, list(tags.input_ids), tags.extra) == (
        "500-tags",
        ("500",),
        [5, 6, 7],
        {"kind": "tags"},
    )


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("0 5 x 2;0 0 0 0;2 3 4 5;500;12", "token_ids[2]: 'x' is not a whole number"),
        ("0 5 -6 2;0 0 0 0;2 3 4 5;500;12", "token_ids[2]: -6 lies outside"),
        ("0 5 6 2;0 0 0;2 3 4 5;500;12", "sent_ids: has 3 numbers for 4 token_ids"),
        ("0 2;0 0;2 3;500;12", "token_ids: has nothing between"),
        ("0 5 2;0 0 0;2 3 4;;12", "image_id: '' is not a name"),
        ("0 5 2;0 0 0;2 3 4;500", "has 4 fields, expected 5"),
    ],
)
def test_bad_text_rows(tmp_path, row, why):
    message = only_bad(texts_of(tmp_path, ["0 5 6 2;0 0 0 0;2 3 4 5;500;11", row], "--kind", "flickr_captions"))
    assert message.startswith("part0.txt: row 2: ")
    assert why in message


# ------------------------------------------------------------- files that UNIMO's own readers have read


OFFICIAL = golden_folder("unimo") / "official"
FILES = OFFICIAL / "feature_files"


def decoded(text, rows):
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(rows, -1)


def assert_as_read(record, features, locations, begin=1):
    """Compare with UNIMO's batch: [R, D] features, and (x1, y1, x2, y2, area) of the boxes, after the image's mean."""
    count = len(record.features)
    np.testing.assert_array_equal(record.features, features[begin : begin + count])
    np.testing.assert_allclose(record.boxes, locations[begin : begin + count, :4], rtol=0, atol=1e-6)
    np.testing.assert_allclose(record.features.mean(0), features[0], atol=1e-6)
    assert not features[begin + count :].any()


@pytest.mark.golden
def test_golden_coco_part_is_read_exactly():
    source = open_source(unimo_images, [FILES / "coco_part0.txt"])
    golden = load_golden("img2txt", "unimo/official")
    records = good(source)
    for index, (record, row) in enumerate(
        zip(records, (FILES / "coco_part0.txt").read_text().split("\n"), strict=False)
    ):
        fields = row.split(";")
        assert (record.id, record.height, record.width) == (fields[0][9:], int(fields[8]), int(fields[9]))
        np.testing.assert_array_equal(record.class_probs, decoded(fields[12], int(fields[10])))
        assert_as_read(record, golden["in.image_embedding"][index].numpy(), golden["in.image_loc"][index].numpy())
    texts = good(open_source(unimo_texts, [FILES / "coco_part0.txt"]))
    for index, text in enumerate(texts):
        np.testing.assert_array_equal(golden["in.tok_ids"][index, 1 : 1 + len(text.input_ids), 0], text.input_ids)
    assert len(records) == len(texts) == len(golden["in.image_embedding"])


@pytest.mark.golden
def test_golden_snli_ve_file_is_read_exactly():
    golden = load_golden("reader_snli_ve", "unimo/official")
    images = good(open_source(unimo_images, [FILES / "filelist"], "--filelist"))
    texts = good(open_source(unimo_texts, [FILES / "filelist"], "--filelist"))
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        assert text.images == (image.id,)
        assert text.extra["label"] == golden["out.labels"][index]
        np.testing.assert_array_equal(golden["out.src_ids"][index, 1 : 1 + len(text.input_ids), 0], text.input_ids)
        assert_as_read(image, golden["out.image_embedding"][index].numpy(), golden["out.image_loc"][index].numpy())
    assert len(images) == len(golden["out.labels"])


@pytest.mark.golden
def test_golden_flickr_features_are_read_exactly_with_the_training_readers_sizes():
    golden = load_golden("reader_retrieval", "unimo/official")
    options = ("--img-id", str(FILES / "img_id.tsv"))
    images = good(open_source(unimo_images, [FILES / "flickr_feats" / "part0.tsv"], *options))
    assert {image.id: image.extra["img_id"] for image in images} == {"101": 0, "102": 1}
    for image in images:
        assert_as_read(image, golden[f"out.feat_{image.id}"].numpy(), golden[f"out.train_loc_{image.id}"].numpy())
    texts = good(open_source(unimo_texts, [FILES / "flickr_caption.txt"]))
    assert {text.images[0] for text in texts} == {image.id for image in images}
    tags = good(open_source(unimo_texts, [FILES / "coco_object.ids"]))
    rows = [row.split(";") for row in (FILES / "coco_object.ids").read_text().splitlines()]
    assert [" ".join(map(str, each.input_ids)) for each in tags] == [row[1] for row in rows]
    assert [each.images for each in tags] == [(row[0],) for row in rows]


@pytest.mark.golden
def test_golden_locations_of_the_testing_reader_are_those_of_swapped_sizes():
    golden = load_golden("reader_retrieval", "unimo/official")
    options = ("--size-order", "hw", "--fix-boxes", "clip")
    for image in good(open_source(unimo_images, [FILES / "flickr_feats" / "part0.tsv"], *options)):
        other = golden[f"out.test_loc_{image.id}"].numpy()[1 : 1 + len(image.boxes), :4]
        np.testing.assert_allclose(image.boxes, other.clip(0, 1), atol=1e-6)

"""WebDataset tars, folders with JSON lines, and folders of one npz per image; hostile members among them."""

import io
import itertools
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from data_tools import import_images, unpack_images
from data_tools.formats.tar_files import read_members
from data_tools.formats.webdataset import safe_name
from data_tools.records import BadRow, ImageLayout
from tests.data_tools.feature_files import Picture, good, only_bad, read_all
from tests.data_tools.text_sources import open_format, write_json
from vlscale.errors import VlscaleError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def write_tar(path, members, kind=tarfile.PAX_FORMAT, mode="w"):
    """Members are (name, content) or TarInfo."""
    with tarfile.open(path, mode, format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def sample(key, text, suffix="jpg"):
    return [(f"{key}.{suffix}", f"picture {key}".encode()), (f"{key}.txt", text.encode())]


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("kind", FORMATS)
def test_samples_come_back_from_every_kind_of_tar(tmp_path, kind):
    names = ["000", "a/b/001", "./c/002", "x" * 90 + "/" + "y" * 60 + "/3"]
    path = write_tar(tmp_path / "00000.tar", itertools.chain(*(sample(n, f"Text {n[:9]} é") for n in names)), kind)
    found = good(open_format("webdataset", path))
    keys = [name.removeprefix("./") for name in names]
    assert [(text.id, text.images, text.text) for text in found] == [
        (f"{key}-0", (key,), f"Text {name[:9]} é") for key, name in zip(keys, names, strict=True)
    ]


def test_names_beyond_ascii_and_suffixes_in_capitals(tmp_path):
    path = write_tar(
        tmp_path / "x.tar", [("größe.JPG", b"1"), ("größe.txt", b"t"), ("README", b"no sample"), (".x", b"")]
    )
    assert good(open_format("webdataset", path))[0].images == ("größe",)


def test_captions_in_json(tmp_path):
    def members(value):
        return [("1.jpg", b"x"), ("1.json", json.dumps(value).encode())]

    path = write_tar(tmp_path / "x.tar", members({"caption": "one", "url": "u"}))
    assert [text.text for text in good(open_format("webdataset", path))] == ["one"]
    write_tar(path, members({"texts": ["one", "two"]}))
    assert [text.id for text in good(open_format("webdataset", path, "--field", "texts"))] == ["1-0", "1-1"]
    for value, why in (
        ({}, "caption: is missing"),
        ([], "json: [] is not a JSON object"),
        ({"caption": 3}, "caption: 3"),
    ):
        write_tar(path, members(value))
        assert only_bad(open_format("webdataset", path)).startswith(f"x.tar: sample '1': {why}")


def test_ids_may_have_the_tars_name(tmp_path):
    paths = [write_tar(tmp_path / f"{n}.tar", sample("a/7", "text")) for n in range(2)]
    found = good(open_format("webdataset", paths, "--image-id", "{source}_{stem}"))
    assert [text.images[0] for text in found] == ["0_7", "1_7"]


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("../evil.jpg", b"x")], "member '../evil.jpg': name: is not a plain path inside the folder"),
        ([("a/../../evil.jpg", b"x")], "member 'a/../../evil.jpg': name: is not a plain path"),
        ([("/etc/evil.jpg", b"x")], "member '/etc/evil.jpg': name: is not a relative path"),
        ([("C:\\evil.jpg", b"x")], r"member 'C:\\evil.jpg': name: is not a relative path"),
        ([special("l.jpg", tarfile.SYMTYPE, "/etc/passwd")], "member 'l.jpg': is a symbolic link"),
        ([special("l.jpg", tarfile.LNKTYPE, "0.jpg")], "member 'l.jpg': is a hard link"),
        ([special("d.jpg", tarfile.CHRTYPE)], "member 'd.jpg': is a device"),
        ([special("d.jpg", tarfile.BLKTYPE)], "member 'd.jpg': is a device"),
        ([special("p.jpg", tarfile.FIFOTYPE)], "member 'p.jpg': is a pipe"),
        ([special("s.jpg", tarfile.GNUTYPE_SPARSE)], "member 's.jpg': is of a special kind"),
        ([("1.txt", b"a caption")], "sample '1': image: there is no picture with it"),
        ([("1.jpg", b"x")], "sample '1': caption: there is no .txt and no .json with it"),
        ([("1.jpg", b"x"), ("1.txt", b"\xff")], "sample '1': txt: is not UTF-8"),
        ([("1.jpg", b"x"), ("1.txt", b" ")], "sample '1': txt: is empty"),
        ([("1.jpg", b"x"), ("1.txt", b"x" * (1 << 20 | 1))], "sample '1': txt: has 1048577 bytes, at most"),
        ([("1.jpg", b"x"), ("1.txt", b"t"), ("1.txt", b"u")], "member '1.txt': name: stands there twice"),
        ([("1.jpg", b"x"), ("1.json", b"[" * 50_000)], "sample '1': json: is not JSON"),
        ([("a\nb.jpg", b"x")], "member 'a\\nb.jpg': name: is not a plain path"),
    ],
)
def test_members_that_cannot_be_used(tmp_path, members, why):
    path = write_tar(tmp_path / "x.tar", [*sample("0", "good"), *members, *sample("9", "good")])
    source = open_format("webdataset", path)
    assert only_bad(source).startswith(f"x.tar: {why}")
    images = [text.images[0] for text in read_all(source) if not isinstance(text, BadRow)]
    assert images[0] == "0"
    assert images[-1] == "9"


def test_damaged_tars_are_one_error(tmp_path):
    path = write_tar(tmp_path / "x.tar", itertools.chain(*(sample(str(n), "text") for n in range(9))))
    data = path.read_bytes()
    for damaged, why in (
        (data[:5000], "cut off"),
        (data[:4096], "cut off"),
        (data[: 9 * 2048], "end mark"),
        (data[:600], "cut off|end mark"),
        (b"no tar " * 300, "no tar header at byte 0"),
        (data[:2048] + b"x" * 512 + data[2560:], "no tar header at byte 2048"),
        (b"", "is empty"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(VlscaleError, match=rf"x\.tar: .*({why})"):
            read_all(open_format("webdataset", path))
    for mode in ("w:gz", "w:bz2", "w:xz"):
        write_tar(path, sample("1", "t"), mode=mode)
        with pytest.raises(VlscaleError, match="is compressed; unpack it"):
            read_all(open_format("webdataset", path))


def test_sizes_that_are_lies_are_errors_and_take_no_memory(tmp_path):
    for size in (1 << 40, 8**11 - 1):
        info = tarfile.TarInfo("1.jpg")
        info.size = size
        path = tmp_path / "x.tar"
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        with pytest.raises(VlscaleError, match="cut off: the member at byte 0 has"):
            read_all(open_format("webdataset", path))
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 20
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 21))
    with pytest.raises(VlscaleError, match="the header at byte 0 has 1048576 bytes, too many"):
        read_all(open_format("webdataset", path))


def test_any_flipped_byte_of_a_tar_is_an_error_a_bad_row_or_nothing(tmp_path):
    path = write_tar(tmp_path / "x.tar", [*sample("0" * 120, "ä"), *sample("1", "b")])
    data = path.read_bytes()
    for place in range(0, len(data), 5):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1 :])
        try:
            with path.open("rb") as stream:
                for member in read_members(path, stream):
                    assert isinstance(member, BadRow) or ".." not in member.name
        except VlscaleError as error:
            assert "\n" not in str(error)  # noqa: PT017 most changes are not noticed


def test_pictures_are_unpacked_once_and_under_their_ids(tmp_path, capsys):
    path = write_tar(tmp_path / "x.tar", [*sample("a/0", "good", "PNG"), *sample("1", "good")])
    out = tmp_path / "pictures"
    for _ in range(2):
        assert unpack_images.run([str(path), "--out", str(out)]) == 2
    assert {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()} == {
        "a/0.png": b"picture a/0",
        "1.jpg": b"picture 1",
    }
    other = write_tar(tmp_path / "y.tar", [("1.jpg", b"another")])
    with pytest.raises(
        VlscaleError, match=r"y\.tar: sample '1': image id: 1\.jpg is there already, with another picture"
    ):
        unpack_images.run([str(other), "--out", str(out)])
    assert unpack_images.run([str(other), "--out", str(out), "--image-id", "{source}_{key}"]) == 1


def test_nothing_is_ever_written_outside_the_folder(tmp_path):
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (out / "link").symlink_to(outside)
    (out / "2.jpg").symlink_to(outside / "2.jpg")
    evil = [("../outside/0.jpg", b"x"), ("link/1.jpg", b"x"), ("2.jpg", b"x"), ("..jpg", b"x"), (".hidden/1.jpg", b"x")]
    path = write_tar(tmp_path / "x.tar", [*evil, ("3.jpg", b"good"), special("4.jpg", tarfile.SYMTYPE, "3.jpg")])
    with pytest.raises(VlscaleError, match=r"x\.tar: member '\.\./outside/0\.jpg'"):
        unpack_images.run([str(path), "--out", str(out)])
    assert unpack_images.run([str(path), "--out", str(out), "--on-error", "skip"]) == 1
    assert not list(outside.iterdir())
    assert sorted(p.name for p in out.iterdir() if not p.is_symlink()) == ["3.jpg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "outside", "x.tar"]
    assert safe_name("a/b") == "a/b"


ROWS = [
    {"image": "a/1.jpg", "text": "One."},
    {"file_name": "2.tar.png", "caption": ["Two.", "Zwei."], "id": "two"},
    {"images": ["a/1.jpg", "2.tar.png"], "text": "Both.", "id": 3},
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_lines_beside_pictures_come_back(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.jpg", "2.tar.png"):
        (tmp_path / name).touch()
    path = write_rows(tmp_path / "metadata.jsonl", ROWS)
    found = good(open_format("image_folder", path, "--images", tmp_path))
    assert [(text.id, text.images, text.text) for text in found] == [
        ("metadata-0", ("a/1",), "One."),
        ("two-0", ("2.tar",), "Two."),
        ("two-1", ("2.tar",), "Zwei."),
        ("3", ("a/1", "2.tar"), "Both."),
    ]
    (tmp_path / "2.tar.png").unlink()
    bad = [
        str(row) for row in read_all(open_format("image_folder", path, "--images", tmp_path)) if isinstance(row, BadRow)
    ]
    assert bad == [
        f"{path}: row 2: file_name: there is no picture '2.tar.png' in {tmp_path}",
        f"{path}: row 3: images[1]: there is no picture '2.tar.png' in {tmp_path}",
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "x"}, "image: is missing (nor is there images or file_name)"),
        ({"image": "1.jpg"}, "text: is missing"),
        ({"image": "../1.jpg", "text": "x"}, "image: '../1.jpg' is not a plain path"),
        ({"image": "/1.jpg", "text": "x"}, "image: '/1.jpg' is not a plain path"),
        ({"image": [], "text": "x"}, "image: has 0 entries, expected 1 to 64"),
        ({"image": "1.jpg", "text": ["x", ""]}, "text[1]: is empty"),
        ({"image": "1.jpg", "text": 5}, "text: 5 is not a text"),
        ({"image": {}, "text": "x"}, "image: {} is not a text"),
        ({"image": "1.jpg", "text": "x", "id": None}, "id: None is not a text"),
        ([], "[] is not a JSON object"),
    ],
)
def test_bad_rows_beside_pictures(tmp_path, row, why):
    path = write_rows(tmp_path / "m.jsonl", [{"image": "1.jpg", "text": "x"}, row])
    assert only_bad(open_format("image_folder", path)).startswith(f"m.jsonl: row 2: {why}")


PICTURES = [Picture(f"{n:03d}", 300 + n, 200, 2 + n % 3, seed=n) for n in range(7)]


def unit_arrays(picture, dtype="f2"):
    """As UNITER's detector scripts leave them."""
    box = picture.unit_boxes
    six = np.concatenate([box, box[:, 2:] - box[:, :2]], 1)
    conf = np.linspace(0.9, 0.3, picture.regions)
    arrays = {"features": picture.features, "norm_bb": six, "conf": conf, "soft_labels": picture.probs}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def pixel_arrays(picture):
    sizes = {"image_w": np.array(picture.width), "image_h": np.array(picture.height)}
    return {"x": picture.features, "bbox": picture.boxes, **sizes}


def write_npz(folder, arrays=unit_arrays, save=np.savez):
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        save(folder / ("sub" if int(picture.id) % 2 else "") / f"{picture.id}.npz", **arrays(picture))
    return folder


def ids():
    return sorted(("sub/" if int(picture.id) % 2 else "") + picture.id for picture in PICTURES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_files_of_uniters_detector_come_back_equal(tmp_path, save, dtype):
    source = open_format("image_only", write_npz(tmp_path, lambda picture: unit_arrays(picture, dtype), save))
    assert source.layout() == ImageLayout(16, np.dtype(dtype).name, 7, np.dtype(dtype).name)
    found = {record.id: record for record in good(source)}
    assert list(found) == ids()
    for picture in PICTURES:
        record, arrays = found[("sub/" if int(picture.id) % 2 else "") + picture.id], unit_arrays(picture, dtype)
        assert record.features.dtype == record.class_probs.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(record.features, arrays["features"])
        np.testing.assert_array_equal(record.class_probs, arrays["soft_labels"])
        np.testing.assert_array_equal(record.boxes, arrays["norm_bb"][:, :4].astype("f4"))
        np.testing.assert_array_equal(record.conf, arrays["conf"].astype("f4"))


def test_files_with_boxes_in_pixels_come_back_equal(tmp_path):
    source = open_format("image_only", write_npz(tmp_path, pixel_arrays))
    assert source.layout() == ImageLayout(16, "float32")
    found = {record.id.rpartition("/")[2]: record for record in good(source)}
    for picture in PICTURES:
        record = found[picture.id]
        assert (record.width, record.height, record.conf) == (picture.width, picture.height, None)
        np.testing.assert_array_equal(record.features, picture.features)
        np.testing.assert_allclose(record.boxes, picture.unit_boxes, rtol=0, atol=1e-7)


def test_lists_choose_the_images(tmp_path):
    folder = write_npz(tmp_path / "npz", pixel_arrays)
    csv = tmp_path / "train-images.csv"
    csv.write_text('ImageID,Subset,Author\n004,train,"A, B"\n000,train,C\n')
    coco = write_json(
        tmp_path / "image_info_unlabeled2017.json", {"info": {}, "images": [{"id": 2, "file_name": "002.jpg"}]}
    )
    plain = tmp_path / "ids.txt"
    plain.write_text("006\n999\n")

    def chosen(*options):
        return [getattr(row, "id", str(row)) for row in read_all(open_format("image_only", folder, *options))]

    assert chosen("--list", csv) == ["000", "004"]
    assert chosen("--list", coco, "--image-id", "{stem}") == ["002"]
    assert chosen("--list", coco, "--image-id", "{id:03d}") == ["002"]
    assert chosen("--list", plain) == ["006", "999: id: is listed, but there is no 999.npz"]
    for text, why in (("", "is empty"), ("a,b\n", "row 1: has 2 fields"), ("ImageID\n", "names no images")):
        plain.write_text(text)
        with pytest.raises(VlscaleError, match=rf"ids\.txt: {why}"):
            chosen("--list", plain)


class Call:
    def __reduce__(self):
        return (print, ("called",))


P = PICTURES[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": P.features[:1]}, "bbox: has shape 2 x 4, expected 1 x 4"),
        ({"x": P.features[0]}, "x: has "),
        ({"x": P.features.astype("f8")}, "x: is <f8, expected float16 or float32"),
        ({"x": np.full_like(P.features, np.nan)}, "x: has nan at [0, 0]"),
        ({"x": np.zeros((2000, 16), "f4")}, "x: has 2000 regions"),
        ({"x": np.array([[Call()] * 16] * 2, object)}, "npz.x: has the dtype"),
        ({"bbox": P.boxes[:, [2, 3, 0, 1]]}, "bbox[0]: "),
        ({"bbox": -P.boxes}, "bbox[0]: "),
        ({"bbox": P.boxes * 9}, "bbox[0]: "),
        ({"image_w": np.array(0)}, "image_w: 0 lies outside"),
        ({"image_w": np.array([3, 4])}, "image_w: has shape (2,)"),
        ({"conf": np.ones(5, "f4")}, "conf: has shape 5, expected 2"),
        ({"soft_labels": np.ones((3, 7), "f4")}, "soft_labels: has shape 3 x 7"),
    ],
)
def test_bad_npz_name_file_image_and_field(tmp_path, capsys, change, why):
    folder = write_npz(tmp_path, pixel_arrays)
    np.savez(folder / "bad.npz", **{**pixel_arrays(P), **change})
    assert only_bad(open_format("image_only", folder)).startswith(f"bad.npz: image 'bad': {why}")
    assert "called" not in capsys.readouterr().out


def test_files_that_are_no_npz_or_bombs_are_bad_rows(tmp_path):
    folder = write_npz(tmp_path, pixel_arrays)
    bomb = io.BytesIO()
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(300):
            file.write(bytes(1 << 20))
    whole = (folder / "000.npz").read_bytes()
    for content, why in (
        (bomb.getvalue(), "npz: unpacks to more than is allowed"),
        (whole[:-30], "npz: is not an intact npz file"),
        (pickle.dumps(Call()), "npz: is not an intact npz file"),
        (b"", "npz: is not an intact npz file"),
    ):
        (folder / "bad.npz").write_bytes(content)
        assert only_bad(open_format("image_only", folder)).startswith(f"bad.npz: image 'bad': {why}")


def test_an_image_in_two_folders_and_a_folder_without_files_are_errors(tmp_path):
    folders = [write_npz(tmp_path / name, pixel_arrays) for name in "ab"]
    with pytest.raises(VlscaleError, match=r"b/000\.npz: image '000' is also in"):
        open_format("image_only", folders).parts()
    (tmp_path / "c").mkdir()
    with pytest.raises(VlscaleError, match=r"c: no \.npz in it or below"):
        open_format("image_only", tmp_path / "c").parts()
    with pytest.raises(VlscaleError, match="d: no such folder"):
        open_format("image_only", tmp_path / "d").parts()


def test_images_without_texts_become_a_store(tmp_path):
    folder = write_npz(tmp_path / "npz")
    report = import_images.run(["image_only", str(folder), "--out", str(tmp_path / "out")])
    assert report["rows"] == 7
    assert (tmp_path / "out/images/index.json").exists()
    assert (tmp_path / "out/classes/index.json").exists()

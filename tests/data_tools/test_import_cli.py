"""From a published file to a store of texts, through the command line tool, for every format of texts."""

import json

import numpy as np
import pytest

from data_tools.formats import FORMATS, find_format
from data_tools.import_texts import main
from data_tools.tokenizers import load_tokenizer
from tests.data_tools.test_import_captions_json import CAPTIONS, GENOME, coco, karpathy_image
from tests.data_tools.test_import_captions_lines import write_gcc, write_sbu
from tests.data_tools.test_import_corpora import write_jsonl, write_parquet, write_plain
from tests.data_tools.test_import_folders import sample, write_rows, write_tar
from tests.data_tools.test_import_vilbert import captions_lmdb
from tests.data_tools.text_sources import ENGLISH, small_tokenizer, write_json
from vlscale.data.store import TextStore
from vlscale.data.store_writer import ImageWriter
from vlscale.errors import VlscaleError

URL = "http://x.org/{}.jpg"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), "wordpiece")


def write_images(root, names):
    with ImageWriter(root, 4, "float32") as writer:
        for name in names:
            writer.write(name, 10, 10, np.ones((1, 4), np.float32), np.array([[0, 0, 1, 1]], np.float32))


def coco_captions(path):
    source = write_json(path / "captions.json", coco(CAPTIONS))
    return source, {str(row["id"]): (row["caption"].strip(), [str(row["image_id"])]) for row in CAPTIONS}


def karpathy(path):
    images = [karpathy_image(n, "train", f"{n}.jpg", n + 100) for n in range(3)]
    source = write_json(path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    texts = {
        str(each["sentid"]): (each["raw"], [str(image["cocoid"])]) for image in images for each in image["sentences"]
    }
    return source, texts


def visual_genome(path):
    texts = {
        str(region["region_id"]): (region["phrase"].strip(), [str(image["id"])])
        for image in GENOME
        for region in image["regions"]
    }
    return write_json(path / "region_descriptions.json", GENOME), texts


def conceptual_captions(path):
    source = write_gcc(path / "gcc.tsv", [(text, URL.format(n)) for n, text in enumerate(ENGLISH)])
    return source, {f"gcc-{n}": (text, [str(n)]) for n, text in enumerate(ENGLISH)}


def sbu(path):
    source = write_sbu(path, [(text, URL.format(n)) for n, text in enumerate(ENGLISH)], "sbu_captions.txt")
    return source, {f"sbu_captions-{n}": (text, [str(n)]) for n, text in enumerate(ENGLISH)}


def flickr30k(path):
    source = path / "results.token"
    source.write_text("".join(f"{n % 3}.jpg#{n}\t{text}\n" for n, text in enumerate(ENGLISH)))
    return source, {f"{n % 3}.jpg#{n}": (text, [str(n % 3)]) for n, text in enumerate(ENGLISH)}


def webdataset(path):
    members = [member for n, text in enumerate(ENGLISH) for member in sample(f"{n:03d}", text)]
    return write_tar(path / "00000.tar", members), {f"{n:03d}-0": (t, [f"{n:03d}"]) for n, t in enumerate(ENGLISH)}


def image_folder(path):
    rows = [{"file_name": f"{n}.jpg", "text": text} for n, text in enumerate(ENGLISH)]
    for row in rows:
        (path / row["file_name"]).touch()
    source = write_rows(path / "metadata.jsonl", rows)
    begins = np.cumsum([0, *(len(line) + 1 for line in source.read_bytes().split(b"\n"))])  # which name the texts
    return source, {f"metadata-{begins[n]}": (text, [str(n)]) for n, text in enumerate(ENGLISH)}


def vilbert_captions(path):
    items = [[{}, {}, {}, 1, 10, 10, str(n), text] for n, text in enumerate(ENGLISH)]
    arrays = {b"nd": True, b"type": "<f4", b"kind": b"", b"shape": [1, 4], b"data": bytes(16)}
    items = [[arrays, arrays, arrays, *item[3:]] for item in items]
    source = captions_lmdb(path / "training_feat_all.lmdb", items)
    return source, {f"{n}-0": (text, [str(n)]) for n, text in enumerate(ENGLISH)}


def unimo_texts(path):
    source = path / "flickr_caption.txt"
    source.write_text("".join(f"0 {9 + n} 7 2;0 0 0 0;2 3 4 5;{n % 3};{n}\n" for n in range(6)))
    return source, {str(n): ([9 + n, 7], [str(n % 3)]) for n in range(6)}


def uniter_meta(path):
    vocabulary = load_tokenizer(path / "tokenizer").vocabulary
    meta = {"CLS": vocabulary.cls, "SEP": vocabulary.sep, "MASK": vocabulary.mask, "UNK": vocabulary.unk}
    return meta | {"v_range": [vocabulary.tokens.index("!"), vocabulary.size], "toker": "small"}


def uniter_texts(path):
    pytest.importorskip("lmdb")
    from tests.data_tools.uniter_files import write_texts

    rows = {f"t{n}": {"input_ids": [9 + n, 7], "img_fname": f"{n % 3}.npz"} for n in range(6)}
    source = write_texts(path / "db", rows, uniter_meta(path))
    return source, {name: (row["input_ids"], [row["img_fname"]]) for name, row in rows.items()}


def uniter_vcr_texts(path):
    pytest.importorskip("lmdb")
    from tests.data_tools.uniter_files import write_texts

    choices = {"input_ids_as": [[8], [9]], "input_ids_rs": [[10, 11], [12]], "qa_target": 1, "qar_target": 0}
    rows = {f"t{n}": {"input_ids": [9 + n, 7], "img_fname": [f"g{n % 3}", f"{n % 3}"], **choices} for n in range(6)}
    meta = uniter_meta(path)
    source = write_texts(path / "db", rows, meta)
    told = {"qa": [meta["SEP"], 9], "qar": [meta["SEP"], 9, meta["SEP"], 10, 11]}
    return source, {
        f"{name}-{kind}": ([*row["input_ids"], *rest], ["+".join(row["img_fname"])])
        for name, row in rows.items()
        for kind, rest in told.items()
    }


PAIRED = (
    *(coco_captions, karpathy, visual_genome, conceptual_captions, sbu, flickr30k, webdataset, image_folder),
    *(vilbert_captions, unimo_texts, uniter_texts, uniter_vcr_texts),
)
CORPORA = {
    "plain_text": (write_plain, "a.txt"),
    "jsonl_texts": (write_jsonl, "a.jsonl"),
    "parquet_texts": (write_parquet, "a.parquet"),
}


@pytest.mark.parametrize("write", PAIRED, ids=lambda write: write.__name__)
def test_the_store_holds_the_sources_texts(tmp_path, tokenizer, write):
    (tmp_path / "tokenizer").symlink_to(tokenizer)
    source, texts = write(tmp_path)
    root = tmp_path / "out"
    names = sorted({image for _, images in texts.values() for image in images}, reverse=True)
    write_images(root, names)
    main([write.__name__, str(source), "--out", str(root), "--tokenizer", str(tmp_path / "tokenizer")])
    store, encode = TextStore(root / "texts"), load_tokenizer(tokenizer).encode
    rows = [store.row(number) for number in range(len(store))]
    assert {row["id"]: row["images"] for row in rows} == {name: images for name, (_, images) in texts.items()}
    order = [names.index(row["images"][0]) for row in rows]
    assert order == sorted(order)
    for row in rows:
        told = texts[row["id"]][0]
        assert row["text"] == (told if isinstance(told, str) else "")
        assert row["input_ids"].tolist() == (encode(told) if isinstance(told, str) else told)
    assert store.meta.vocabulary == load_tokenizer(tokenizer).vocabulary
    assert json.loads((root / "report-texts.json").read_bytes())["rows"] == len(texts)


@pytest.mark.parametrize("name", CORPORA)
def test_the_store_holds_a_corpus_row_by_row(tmp_path, tokenizer, name):
    write, file = CORPORA[name]
    source, root = write(tmp_path / file), tmp_path / "out"
    arguments = [name.replace("_", "-"), str(source), "--out", str(root), "--tokenizer", str(tokenizer)]
    main([*arguments, "--pack", "document"])
    store, loaded = TextStore(root / "texts"), load_tokenizer(tokenizer)
    found = " ".join(store.row(number)["text"] for number in range(len(store)))
    assert [text for text in ENGLISH if text not in found] == []
    for number in range(len(store)):
        row = store.row(number)
        assert row["images"] == []
        assert row["input_ids"].tolist() == [index for line in row["text"].split("\n") for index in loaded.encode(line)]


def test_every_format_of_texts_is_among_them():
    texts = set()
    for name in FORMATS:
        try:
            find_format(name, "texts")
        except VlscaleError:
            continue
        texts.add(name)
    assert texts == {write.__name__ for write in PAIRED} | set(CORPORA)


def test_no_format_stands_twice_in_the_registry():
    import inspect

    from data_tools import formats

    listed = inspect.getsource(formats)
    assert [name for name in FORMATS if listed.count(f'"{name}"') != 1] == []

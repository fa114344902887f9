"""find_units and rewrite_captions: truth on the demo corpus, shares, kills, paraphrases and bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from data_tools import find_units, rewrite_captions
from data_tools.demo_tokenizer import train_wordpieces
from data_tools.retrieval.detected import Detections
from data_tools.rewriting import building
from data_tools.rewriting import captions as captions_module
from data_tools.rewriting.back_translation import Translation
from data_tools.rewriting.captions import lemmas_of, names_something_else
from data_tools.rewriting.chunker import analyse
from data_tools.rewriting.neighbours import TermIndex
from data_tools.rewriting.reading import decode_rows
from data_tools.rewriting.replacing import known_of, normalised
from tests.data_tools.rewriting_captions import CAPTIONS, write_texts
from tests.data_tools.toy_sources import tree
from vlscale.data.companions import RewriteStore, UnitStore
from vlscale.data.store import ImageStore, TextStore
from vlscale.data.store_writer import ClassWriter, ImageWriter, TextWriter
from vlscale.errors import VlscaleError

FIXTURE = Path(__file__).parents[1] / "fixtures/demo"
PAIRED = [(text, f"image{number // 2}") for number, text in enumerate(CAPTIONS)]


def build(root, *options) -> dict:
    """Both tools; the report of the second."""
    find_units.run([str(root)])
    return rewrite_captions.run([str(root), *options])


def rewrites_of(root) -> list[tuple[str, list[str], list]]:
    """Text, its images and its rewrites, of all texts."""
    texts, store = TextStore(root / "texts"), RewriteStore(root / "rewrites")
    assert len(texts) == len(store)
    return [(texts.row(row)["text"], texts.row(row)["images"], store.rewrites(row)) for row in range(len(texts))]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    for name in ("texts", "images"):
        shutil.copytree(FIXTURE / "val" / name, root / name)
    report = build(root, "--per-kind", "6", "--sentences", "3")
    return root, report


def is_true(text: str, extra: dict) -> bool:
    """Whether a caption of the demo's grammar is true of a scene; written independently of the rewriting."""
    boxes = {
        thing: np.asarray(box) * [384, 256, 384, 256]
        for thing, box in zip(extra["things"], extra["boxes_true"], strict=True)
        if thing is not None
    }
    nouns = re.findall(r"\ban? (?!photo of|picture of)(\w+)", text)
    assert nouns, text
    if not set(nouns) <= set(boxes):
        return False
    first = nouns[0]
    for mention, (phrase, noun) in enumerate(
        re.findall(r"(left of|right of|above|over|below|under|on|next to|in|near) an? (\w+)", text)
    ):
        subject = nouns[2] if mention and len(nouns) == 4 else first
        if noun in boxes and not holds(phrase, boxes[subject], boxes[noun]):
            return False
    return True


def holds(phrase: str, a: np.ndarray, b: np.ndarray) -> bool:
    dx, dy = (a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2
    sideways = abs(dx) >= abs(dy)
    truth = {"left of": sideways and dx < 0, "right of": sideways and dx >= 0, "next to": sideways}
    for word in ("above", "over"):
        truth[word] = not sideways and dy < 0
    for word in ("below", "under"):
        truth[word] = not sideways and dy >= 0
    return truth[phrase]


def test_no_negative_is_true_of_its_scene(demo) -> None:
    root, report = demo
    images = ImageStore(root / "images")
    extras = {images.row(row)["id"]: images.row(row)["extra"] for row in range(len(images))}
    checked = dict.fromkeys(("object", "relation", "sentence"), 0)
    for text, (image,), several in rewrites_of(root):
        name = image if isinstance(image, str) else list(extras)[image]
        prefix = re.sub(r"^(in this picture is|this is a photo of|there is|here is|a photo of|a picture of) ", "", text)
        assert is_true(prefix, extras[name]), text
        for rewrite, ids in several:
            new = re.sub(r"^(in this picture is|this is a photo of|there is|here is|a photo of|a picture of) ", "",
                         rewrite.text)  # fmt: skip
            assert not rewrite.positive
            assert len(ids)
            assert not is_true(new, extras[name]), (text, rewrite.text)
            checked[rewrite.kind] += 1
    assert min(checked.values()) > 100, checked
    assert report["rows"] == len(TextStore(root / "texts"))
    assert sum(report["rewrites"].values()) == sum(checked.values())


def test_word_pieces_are_those_of_the_new_text_and_units_cover_the_old(demo) -> None:
    root, _ = demo
    texts, units = TextStore(root / "texts"), UnitStore(root / "units")
    tokenizer = Tokenizer.from_file(str(texts.tokenizer_path))
    for row, (text, _, several) in enumerate(rewrites_of(root)):
        own = tokenizer.encode(text, add_special_tokens=False).ids
        for rewrite, ids in several:
            assert tokenizer.encode(rewrite.text, add_special_tokens=False).ids == ids.tolist() != own
        found = units.row(row)["units"]
        assert found[:, 0].tolist() == [0, *found[:-1, 1].tolist()]
        assert found[-1, 1] == len(own)
        assert units.lengths[row] == len(found)


def test_shares_and_processes_and_kills_change_no_byte(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(building, "PART_ROWS", 16)
    for name in ("one", "two"):
        write_texts(tmp_path / name, PAIRED)
    build(tmp_path / "one")
    root = tmp_path / "two"
    for share in ("1/2", "0/2"):
        assert find_units.run([str(root), "--shard", share]) is None
    with pytest.raises(VlscaleError, match="units"):
        rewrite_captions.run([str(root), "--shard", "0/2"])
    find_units.run([str(root), "--merge"])
    rewrite_captions.run([str(root), "--shard", "1/2"])
    with pytest.raises(VlscaleError, match="not built yet"):
        rewrite_captions.run([str(root), "--merge"])
    with pytest.raises(VlscaleError, match="seed was 0, now 4"):
        rewrite_captions.run([str(root), "--seed", "4"])
    left = root / ".parts" / ".rewrites-00000.tmp-somewhere-1"
    left.mkdir()
    (left / "half").write_text("a killed process wrote this")
    rewrite_captions.run([str(root), "--workers", "2"])
    for name in ("units", "rewrites"):
        assert tree(tmp_path / "one" / name) == tree(root / name)
    assert not (root / ".parts").exists()
    with pytest.raises(VlscaleError, match="exists already"):
        rewrite_captions.run([str(root)])


def test_captions_of_the_same_image_are_never_negatives(tmp_path) -> None:
    captions = [("a dog", "x"), ("a cat and a dog", "x"), ("a cat", "x"), ("a bird", "y"), ("a pig", "y")]
    write_texts(tmp_path, captions)
    report = build(tmp_path, "--sentences", "50", "--per-kind", "50")
    for text, _, several in rewrites_of(tmp_path):
        mine = (
            {"a dog", "a cat and a dog", "a cat"}
            if text in {c for c, i in captions if i == "x"}
            else {"a bird", "a pig"}
        )
        assert not {rewrite.text for rewrite, _ in several} & mine
        assert several
    assert report["told"]["captions with fewer sentences than asked for"] == 5  # k is larger than the collection


def test_captions_without_a_unit_are_counted_and_stay_empty(tmp_path) -> None:
    write_texts(tmp_path, [("of and the", "x"), ("...", "y"), ("a dog near a tree", "z"), ("a man not on a bus", "w")])
    units = find_units.run([str(tmp_path)])
    assert units["texts"]["without objects, attributes and relations"] == 2
    report = rewrite_captions.run([str(tmp_path), "--sentences", "0"])
    assert report["told"]["captions without objects, attributes and relations"] == 2
    assert report["told"]["captions without any rewrite"] >= 2
    assert [len(several) for _, _, several in rewrites_of(tmp_path)][:2] == [0, 0]


def test_a_corpus_without_images_has_units_but_no_index_of_sentences(tmp_path) -> None:
    write_texts(tmp_path, [(text, None) for text in CAPTIONS[:8]])
    find_units.run([str(tmp_path)])
    with pytest.raises(VlscaleError, match="index of terms"):
        rewrite_captions.run([str(tmp_path)])
    assert rewrite_captions.run([str(tmp_path), "--sentences", "0"])["rewrites"]["negative object"] > 8


def test_texts_that_keep_no_tokenizer_get_whole_words(tmp_path) -> None:
    write_texts(tmp_path, PAIRED[:6], keep_tokenizer=False)
    report = find_units.run([str(tmp_path)])
    assert report["texts"]["not aligned with their word pieces: whole words instead"] == 6
    with pytest.raises(VlscaleError, match="--tokenizer"):
        rewrite_captions.run([str(tmp_path)])


def test_mistakes_are_one_line(tmp_path, capsys) -> None:
    with pytest.raises(VlscaleError, match="texts: is missing"):
        find_units.run([str(tmp_path)])
    write_texts(tmp_path / "empty", [])
    with pytest.raises(VlscaleError, match="no texts"):
        find_units.run([str(tmp_path / "empty")])
    write_texts(tmp_path / "good", PAIRED[:4])
    root = str(tmp_path / "good")
    with pytest.raises(VlscaleError, match="find_units first"):
        rewrite_captions.run([root])
    with pytest.raises(SystemExit) as stopped:
        rewrite_captions.main([root, "--per-kind", "-1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(VlscaleError, match="belong together"):
        rewrite_captions.run([root, "--translator", root])
    with pytest.raises(VlscaleError, match="nothing would be rewritten"):
        rewrite_captions.run([root, "--per-kind", "0", "--sentences", "0"])
    find_units.run([root])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(VlscaleError, match=r"bad\.json"):
        rewrite_captions.run([root, "--vocabulary", str(tmp_path / "bad.json")])
    with pytest.raises(VlscaleError, match=r"config\.json"):
        rewrite_captions.run([root, "--translator", root, "--back-translator", root])


def test_units_of_other_texts_are_refused(tmp_path) -> None:
    for name, captions in (("one", PAIRED[:6]), ("two", PAIRED[:4])):
        write_texts(tmp_path / name, captions)
        find_units.run([str(tmp_path / name)])
    shutil.rmtree(tmp_path / "one" / "units")
    shutil.copytree(tmp_path / "two" / "units", tmp_path / "one" / "units")
    with pytest.raises(VlscaleError, match=r"data_tools\.find_units again"):
        rewrite_captions.run([str(tmp_path / "one")])


def test_nearest_captions_are_those_of_plain_tf_idf(tmp_path) -> None:
    write_texts(tmp_path, PAIRED)
    find_units.run([str(tmp_path)])
    words = [re.findall(r"\w\w+", text.lower()) for text in CAPTIONS]
    known = sorted({word for several in words for word in several})
    counts = np.asarray([[several.count(word) for word in known] for several in words], np.float64)
    weights = counts * (np.log((1 + len(CAPTIONS)) / (1 + (counts > 0).sum(0))) + 1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    index = TermIndex(tmp_path / "units", len(CAPTIONS))
    for row, text in enumerate(CAPTIONS):
        found = index.nearest(text, 10)
        cosines = weights @ weights[row]
        assert found[0][0] == row
        assert found[0][1] == pytest.approx(1, abs=1e-5)
        best = np.sort(cosines[cosines > 0])[::-1][:10]
        np.testing.assert_allclose([cosine for _, cosine in found], best, atol=1e-5)
        for other, cosine in found:
            assert cosine == pytest.approx(cosines[other], abs=1e-5)
    assert len(index.nearest("a man", 10_000)) <= len(CAPTIONS)
    assert index.nearest("xylophone", 3) == []
    few = TermIndex(tmp_path / "units", len(CAPTIONS), most_postings=2)
    assert 0 < len(few.nearest("man", 10, start=40)) <= 2


def test_the_index_forgets_one_query_before_the_next(tmp_path) -> None:
    write_texts(tmp_path, PAIRED)
    find_units.run([str(tmp_path)])
    index = TermIndex(tmp_path / "units", len(CAPTIONS))
    alone = [TermIndex(tmp_path / "units", len(CAPTIONS)).nearest(text, 12) for text in CAPTIONS]
    assert [index.nearest(text, 12) for text in CAPTIONS] == alone
    for text in CAPTIONS[:10]:
        assert index.nearest(text, 5) == index.nearest(text, 1000)[:5]


def test_rows_that_are_decoded_together_are_those_of_the_stores(demo) -> None:
    root, _ = demo
    for store in (TextStore(root / "texts"), UnitStore(root / "units"), RewriteStore(root / "rewrites")):
        rows = np.random.default_rng(0).integers(0, len(store), 40).tolist()
        for found, row in zip(decode_rows(store, rows), rows, strict=True):
            expected = store.row(row)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert np.array_equal(found[name], value), name
                assert not isinstance(value, np.ndarray) or found[name].dtype == value.dtype
    images = ImageStore(root / "images")
    assert decode_rows(images, [3, 1], ("extra", "width")) == [
        {name: images.row(row)[name] for name in ("extra", "width")} for row in (3, 1)
    ]


def test_what_is_remembered_or_read_ahead_changes_no_byte(demo, tmp_path, monkeypatch) -> None:
    root, _ = demo
    for name in ("texts", "images", "units"):
        shutil.copytree(root / name, tmp_path / name)
    monkeypatch.setattr(captions_module, "_REMEMBERED", 60)
    monkeypatch.setattr(captions_module, "_AHEAD", 0)
    monkeypatch.setattr(building, "CHUNK_ROWS", 50)
    rewrite_captions.run([str(tmp_path), "--per-kind", "6", "--sentences", "3"])
    assert tree(tmp_path / "rewrites") == tree(root / "rewrites")


def write_regions(root: Path, objects: list[list]) -> None:
    """Two images with a caption each, and what a detector saw in them."""
    with ImageWriter(root, 4, codec="none") as images:
        for number, names in enumerate(objects):
            count = max(1, len(names))
            boxes = np.tile([0.1, 0.1, 0.5, 0.5], (count, 1))
            images.write(f"i{number}", 9, 9, np.ones((count, 4)), boxes, np.ones(count), {"objects": names})
    captions = [f"a {noun} on the grass" for noun in ("dog", "boat", "clock", "horse", "kite", "cup")]
    pieces = train_wordpieces(captions)
    with TextWriter(root, pieces.vocabulary, images.rows, pieces.json) as texts:
        for number, (text, (ids, _)) in enumerate(zip(captions, pieces.encode(captions), strict=True)):
            texts.write(f"t{number}", text, ids, [f"i{number // 3}"])
    find_units.run([str(root)])


def test_no_rewrite_names_what_a_detector_saw(tmp_path) -> None:
    write_regions(tmp_path / "some", [["Horse", "street sign", "kites,flags"], []])
    shutil.copytree(tmp_path / "some", tmp_path / "ignored")
    options = ["--per-kind", "40", "--sentences", "9"]
    report = rewrite_captions.run([str(tmp_path / "some"), *options])
    ignoring = rewrite_captions.run([str(tmp_path / "ignored"), *options, "--ignore-regions"])
    assert report["told"]["captions whose regions have known classes"] == 3
    assert "captions whose regions have known classes" not in ignoring["told"]

    def new(root: Path) -> list[set[str]]:
        return [{rewrite.text.split()[1] for rewrite, _ in several} for _, _, several in rewrites_of(root)]

    for named in new(tmp_path / "ignored")[:3]:
        assert {"horse", "kite", "cup"} <= named
    for named in new(tmp_path / "some")[:3]:
        assert "cup" in named
        assert not named & {"horse", "kite"}
    assert new(tmp_path / "some")[3:] == new(tmp_path / "ignored")[3:]


def test_classes_of_a_detector_are_known_if_they_are_probable_enough(tmp_path) -> None:
    write_regions(tmp_path, [["x"], []])
    shutil.rmtree(tmp_path / "images")
    with ImageWriter(tmp_path, 4, codec="none") as writer:
        for row in range(2):
            writer.write(f"i{row}", 9, 9, np.ones((2, 4)), np.tile([0.1, 0.1, 0.5, 0.5], (2, 1)))
    probs = [[0.6, 0.3, 0.1], [0.1, 0.15, 0.14], [0.1, 0.1, 0.8], [0.1, 0.3, 0.6]]
    with ClassWriter(tmp_path, 3, class_names=["horse", "kite", "background"]) as classes:
        classes.write(probs)
    assert Detections(tmp_path).open().classes([0, 1]) == [["horse"], ["background"]]
    assert Detections(tmp_path, probability=0.15).open().classes([0]) == [["horse", "kite"]]
    told = rewrite_captions.run([str(tmp_path), "--sentences", "0"])["told"]
    assert told["captions whose regions have known classes"] == 6
    assert sorted(lemmas_of(["Pots,pan", "street signs", " "])) == ["pan", "pot", "street sign"]


def test_a_sentence_that_names_nothing_else_is_no_negative() -> None:
    known = known_of([(text, analyse(text)) for text in ("a man on a horse", "a dog")])
    assert not names_something_else(analyse("a dog next to a man"), known)
    assert not names_something_else(analyse("a person and an animal"), known)
    assert names_something_else(analyse("a dog and a bus"), known)


def seq2seq_model(folder: Path) -> Path:
    """A random BART of a few thousand parameters with a word tokenizer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    words = sorted({word for text in CAPTIONS for word in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {word: number for number, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=len(vocabulary), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, init_std=1.0,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_back_translations_are_positives(tmp_path) -> None:
    model = str(seq2seq_model(tmp_path / "model"))
    write_texts(tmp_path / "data", PAIRED[:4])
    report = build(tmp_path / "data", "--translator", model, "--back-translator", model, "--paraphrases", "2")
    for text, _, several in rewrites_of(tmp_path / "data"):
        positives = [rewrite for rewrite, _ in several if rewrite.positive]
        assert len(positives) <= 2
        assert all(rewrite.kind == "sentence" and rewrite.new == "back-translation" for rewrite in positives)
        assert all(normalised(rewrite.text) != normalised(text) for rewrite in positives)
    assert report["rewrites"]["positive sentence"] >= 4
    same = Translation(Path(model), Path(model), 2, batch=3).load().paraphrase(CAPTIONS[:7])
    assert same == Translation(Path(model), Path(model), 2, batch=7).load().paraphrase(CAPTIONS[:7])


def test_a_damaged_row_of_rewrites_is_named(tmp_path) -> None:
    write_texts(tmp_path, PAIRED[:4])
    build(tmp_path)
    store = RewriteStore(tmp_path / "rewrites")
    store.__dict__["lengths"] = store.lengths + 1
    with pytest.raises(VlscaleError, match="row 2: views are not"):
        store.rewrites(2)
    report = json.loads((tmp_path / "report-rewrites.json").read_text())
    assert report["rows"] == 4

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer

from data_tools.tokenizers import MAX_BYTES, load_tokenizer
from data_tools.train_tokenizer import main, train_bpe, train_sentencepiece, train_wordpiece, training_texts
from tests.data_tools.text_sources import ENGLISH, small_tokenizer
from vlscale.data.detokenizer import Detokenizer
from vlscale.data.store import TextStore
from vlscale.data.store_writer import TextWriter
from vlscale.errors import VlscaleError

KINDS = ("wordpiece", "bpe", "sentencepiece")
BERT_HEAD = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT_CASED = [*BERT_HEAD, "[unused100]", "[unused101]", "!", '"', "A", "dog", "##s", "run", "Z", "é"]


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    return load_tokenizer(small_tokenizer(tmp_path_factory.mktemp(request.param), request.param))


def test_every_kind_is_trained_and_used(trained):
    vocabulary = trained.vocabulary
    ids = trained.encode(ENGLISH[0])
    assert ids
    assert all(0 <= index < vocabulary.size for index in ids)
    special = {vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask}
    assert not special & set(ids)
    assert vocabulary.unk not in ids
    assert trained.encode("") == []
    assert trained.encode_many(ENGLISH) == [trained.encode(text) for text in ENGLISH]


def test_random_words_are_no_special_tokens(trained):
    low, high = trained.vocabulary.random_range
    assert (low, high) == (5, trained.vocabulary.size)


@pytest.mark.parametrize("text", ["a [MASK] b", "a <mask> b", "a [SEP] </s> <s> [CLS] b", "[PAD] <pad>"])
def test_special_tokens_in_a_text_are_words(trained, text):
    vocabulary = trained.vocabulary
    special = {vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask}
    assert not special & set(trained.encode(text))


def test_texts_that_follow_others_are_the_end_of_the_joined_text(trained):
    first, second = ENGLISH[0], ENGLISH[6]
    joined = trained.encode(f"{first} {second}")
    assert trained.encode(first) + trained.encode_many([second], following=True)[0] == joined
    assert trained.marks_following == (trained.encode(first) + trained.encode(second) != joined)


def fingerprint(path):
    return load_tokenizer(path).vocabulary.fingerprint


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_fingerprint_does_not_depend_on_how_the_file_is_laid_out(tmp_path, kind):
    file = next(small_tokenizer(tmp_path / "one", kind).iterdir())
    told = json.loads(file.read_bytes())
    shuffled = {key: told[key] for key in reversed(told)}
    shuffled["model"]["vocab"] = dict(reversed(told["model"]["vocab"].items()))
    if kind == "bpe":  # as releases before 0.20 wrote it
        shuffled["model"]["merges"] = [" ".join(merge) for merge in told["model"]["merges"]]
    shuffled["decoder"] = None
    shuffled["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                           "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
    (tmp_path / "other.json").write_text(json.dumps(shuffled, indent=3), encoding="utf-8")
    assert (tmp_path / "other.json").read_bytes() != file.read_bytes()
    assert fingerprint(tmp_path / "other.json") == fingerprint(file)
    (tmp_path / "again.json").write_text(load_tokenizer(file).to_json(), encoding="utf-8")
    assert load_tokenizer(tmp_path / "again.json").vocabulary == load_tokenizer(file).vocabulary


def test_vocab_txt_and_the_published_json_of_it_are_one_tokenizer(tmp_path):
    text = write_vocab(tmp_path / "a", BERT_CASED)
    published = json.loads(load_tokenizer(text).to_json())
    published["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 102], "cls": ["[CLS]", 101]}
    published["model"]["max_input_chars_per_word"] = 100
    published["normalizer"]["strip_accents"] = False  # cased: the same as null
    for indent in (None, 2):
        (tmp_path / "tokenizer.json").write_text(json.dumps(published, indent=indent), encoding="utf-8")
        assert fingerprint(tmp_path) == fingerprint(text)


def test_what_changes_the_ids_changes_the_fingerprint(tmp_path):
    folder = write_vocab(tmp_path / "a", BERT_CASED, do_lower_case=False)
    prints = {fingerprint(folder), fingerprint(write_vocab(tmp_path / "b", BERT_CASED, do_lower_case=True))}
    prints.add(fingerprint(write_vocab(tmp_path / "c", [*BERT_CASED[:-1], "e"], do_lower_case=False)))
    told = json.loads(load_tokenizer(folder).to_json())
    for section, change in (
        ("normalizer", {"strip_accents": True}),
        ("normalizer", {"handle_chinese_chars": False}),
        ("model", {"max_input_chars_per_word": 7}),
        ("pre_tokenizer", {"type": "Whitespace"}),
    ):
        (tmp_path / "other.json").write_text(json.dumps({**told, section: {**told[section], **change}}))
        prints.add(fingerprint(tmp_path / "other.json"))
    assert len(prints) == 7


def test_merges_are_part_of_the_fingerprint_and_their_order_too(tmp_path):
    told = json.loads(train_bpe(ENGLISH, 300))
    found = []
    for number in range(2):
        (tmp_path / "tokenizer.json").write_text(json.dumps(told))
        found.append(fingerprint(tmp_path))
        told["model"]["merges"][3 + number], told["model"]["merges"][4] = (
            told["model"]["merges"][4],
            told["model"]["merges"][3],
        )
    assert found[0] != found[1]


def test_the_fingerprint_is_the_same_for_ever(tmp_path):
    """Stores and models keep it: whoever changes how it is made makes all of them look foreign."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]
    known = "c8d41230790f00a1df5c4d38d4ecaa0823b8b4cd3aeab9ba0713ae9d416288e9"
    assert fingerprint(write_vocab(tmp_path, tokens)) == known


def test_the_fingerprint_of_sentencepiece_is_that_of_the_file(tmp_path):
    file = next(small_tokenizer(tmp_path, "sentencepiece").iterdir())
    assert fingerprint(file) == hashlib.sha256(file.read_bytes()).hexdigest()


def write_vocab(folder, tokens, **config):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_berts_cased_vocabulary_has_its_published_range_of_random_words(tmp_path):
    tokenizer = load_tokenizer(write_vocab(tmp_path, BERT_CASED))
    vocabulary = tokenizer.vocabulary
    assert vocabulary.random_range == (106, len(BERT_CASED))
    assert [vocabulary.pad, vocabulary.unk, vocabulary.cls, vocabulary.sep, vocabulary.mask] == [0, 100, 101, 102, 103]
    assert [vocabulary.tokens[index] for index in tokenizer.encode("A dogs run!")] == ["A", "dog", "##s", "run", "!"]


def test_case_is_told_by_the_configuration_or_by_capitals(tmp_path):
    lower = [token for token in BERT_CASED if token not in ("A", "Z")]
    for name, tokens, config, expected in (
        ("a", BERT_CASED, {}, ["[UNK]"]),
        ("b", lower, {}, ["dog"]),
        ("c", lower, {"do_lower_case": False}, ["[UNK]"]),
    ):
        tokenizer = load_tokenizer(write_vocab(tmp_path / name, tokens, **config))
        assert [tokenizer.vocabulary.tokens[index] for index in tokenizer.encode("DOG")] == expected


GPT2_TOKENS = [chr(index) for index in range(33, 127)] + ["Ġ", "do", "dog", "Ġdog"]
GPT2_MERGES = "#version: 0.2\nd o\ndo g\nĠ dog\n"


def test_robertas_two_files_are_byte_level_bpe(tmp_path):
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *GPT2_TOKENS, "madeupword0000", "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    with pytest.raises(VlscaleError, match=r"merges\.txt is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text(GPT2_MERGES, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.vocabulary.tokens[index] for index in tokenizer.encode("dog dog.")] == ["dog", "Ġdog", "."]
    assert tokenizer.vocabulary.random_range == (4, 4 + len(GPT2_TOKENS))
    assert tokenizer.vocabulary.cls == 0
    assert tokenizer.vocabulary.mask == len(tokens) - 1


def test_unimos_three_files_are_byte_level_bpe_renumbered(tmp_path):
    (tmp_path / "encoder.json").write_text(json.dumps({token: index for index, token in enumerate(GPT2_TOKENS)}))
    (tmp_path / "vocab.bpe").write_text(GPT2_MERGES, encoding="utf-8")
    order = list(reversed(range(len(GPT2_TOKENS))))
    lines = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *map(str, order), "madeupword0000", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("dog dog") == [4 + order.index(GPT2_TOKENS.index(t)) for t in ("dog", "Ġdog")]
    assert tokenizer.vocabulary.random_range == (4, 4 + len(GPT2_TOKENS))
    assert (tokenizer.vocabulary.cls, tokenizer.vocabulary.sep) == (0, 2)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("vocab.txt", b"a\nb\na\n", "stands on two lines"),
        ("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\n", r"has no mask token \(\[MASK\] or <mask>\)"),
        ("vocab.txt", b"\xff\xfe", "cannot be read as a tokenizer"),
        ("tokenizer.json", b"{}", "cannot be read as a tokenizer"),
        ("tokenizer.json", b"[" * 100_000, "cannot be read as a tokenizer"),
        ("tokenizer.json", b"", "cannot be read as a tokenizer"),
        ("tokenizer.model", b"not a model", "cannot be read as a SentencePiece model"),
        ("tokenizer.model", b"", "SentencePiece model|has no pad token"),
    ],
)
def test_what_is_no_tokenizer_is_one_line(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VlscaleError, match=why) as found:
        load_tokenizer(tmp_path)
    assert "\n" not in str(found.value)
    assert name in str(found.value)


def test_missing_large_and_gapped_tokenizers_are_refused(tmp_path):
    with pytest.raises(VlscaleError, match=r"a folder without any of tokenizer\.json, vocab\.txt"):
        load_tokenizer(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(VlscaleError, match="larger than 64 MiB"):
        load_tokenizer(tmp_path)
    gapped = json.loads(train_wordpiece(ENGLISH, 60))
    gapped["model"]["vocab"]["gap"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(gapped))
    with pytest.raises(VlscaleError, match="without gaps"):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_of_a_published_file_are_switched_off(tmp_path):
    tokenizer = Tokenizer.from_str(train_wordpiece(ENGLISH, 200, min_frequency=1))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode(ENGLISH[1])) > 9


def test_the_command_line_trains_and_never_overwrites(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ENGLISH))
    main(["bpe", str(tmp_path / "a.txt"), "--out", str(tmp_path / "one"), "--vocab-size", "300"])
    main(["bpe", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "two"), "--vocab-size", "300", "--field", "body"])
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    assert "300 word pieces" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bpe", str(tmp_path / "a.txt"), "--out", str(tmp_path / "one")])
    assert "exists; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "size", "least"), [("bpe", 260, 261), ("wordpiece", 15, 16), ("sentencepiece", 3, 16)]
)
def test_a_vocabulary_smaller_than_its_alphabet_is_refused(tmp_path, capsys, kind, size, least):
    (tmp_path / "a.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    arguments = [kind, str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--vocab-size"]
    with pytest.raises(SystemExit):
        main([*arguments, str(size)])
    (line,) = capsys.readouterr().err.splitlines()
    assert str(size) in line
    assert str(least) in line
    assert not (tmp_path / "out").exists()
    if kind == "bpe":
        main([*arguments, str(least)])
        assert f"{least} word pieces" in capsys.readouterr().out


def test_a_wordpiece_vocabulary_smaller_than_the_texts_letters_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["wordpiece", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--vocab-size", "20"])
    assert "--vocab-size 20: special tokens and letters of these texts are " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_texts_for_sentencepiece_are_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a b c\n")
    with pytest.raises(SystemExit):
        main(["sentencepiece", str(tmp_path / "a.txt"), "--out", str(tmp_path / "x"), "--vocab-size", "5000"])
    assert capsys.readouterr().err.startswith("train_tokenizer: error: SentencePiece cannot be trained with")


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.txt", b"good\n\xff\xfe\n", r"a\.txt: row 2: line: is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"t": 1}\n', r"a\.jsonl: row 2: text: not to be had"),
        ("a.jsonl", b"{\n", r"a\.jsonl: row 1: text: not to be had"),
    ],
)
def test_bad_training_texts_name_their_row(tmp_path, name, content, why):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VlscaleError, match=why):
        list(training_texts([tmp_path / name]))


def test_training_bpe_or_sentencepiece_gives_the_same_file_in_another_process():
    code = (
        "from data_tools.train_tokenizer import *; from tests.data_tools.text_sources import ENGLISH; import hashlib;"
        "print(hashlib.sha256(train_bpe(ENGLISH, 300).encode() + train_sentencepiece(ENGLISH * 3, 70)).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = train_bpe(ENGLISH, 300).encode() + train_sentencepiece(ENGLISH * 3, 70)
    assert hashlib.sha256(here).hexdigest() == other


def test_texts_imported_with_the_demos_tokenizer_go_with_the_demos_models():
    texts = Path(__file__).resolve().parents[1] / "fixtures/demo/train/texts"
    known = json.loads((texts / "meta.json").read_text())["vocabulary"]["fingerprint"]
    assert load_tokenizer(texts / "tokenizer.json").vocabulary.fingerprint == known


RUSSIAN = ["снег лежит на крыше дома", "собака бежит по снегу", "дом стоит за рекой и снег идёт"] * 6


def plain_sentencepiece(folder: Path) -> Path:
    """A model as the library trains it when it is told nothing about special tokens."""
    folder.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(RUSSIAN), model_writer=model, vocab_size=32, minloglevel=2, hard_vocab_limit=False
    )
    file = folder / "sentencepiece.bpe.model"
    file.write_bytes(model.getvalue())
    return file


def test_a_plain_sentencepiece_model_gets_xlm_robertas_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    file = plain_sentencepiece(tmp_path / "xlmr")
    tokenizer = load_tokenizer(file)
    rival = transformers.XLMRobertaTokenizer(str(file))
    vocabulary = tokenizer.vocabulary
    assert [vocabulary.cls, vocabulary.pad, vocabulary.sep, vocabulary.unk] == [0, 1, 2, 3]
    assert vocabulary.mask == vocabulary.size - 1 == rival.mask_token_id
    assert vocabulary.random_range == (4, vocabulary.size - 1)
    back = Detokenizer(vocabulary)
    for text in [*RUSSIAN, "снег z дома", "<mask> снег"]:
        ids = tokenizer.encode(text)
        if "<" not in text:  # there a name in a text becomes the token itself
            assert ids == rival.encode(text, add_special_tokens=False)
            assert list(vocabulary.tokens[index] for index in ids) == rival.convert_ids_to_tokens(ids)
        assert vocabulary.mask not in ids
    assert back.text(tokenizer.encode(RUSSIAN[1])) == RUSSIAN[1]
    assert vocabulary.fingerprint != hashlib.sha256(file.read_bytes()).hexdigest()


def test_texts_of_a_sentencepiece_store_can_be_read_back(tmp_path):
    file = plain_sentencepiece(tmp_path / "model")
    tokenizer = load_tokenizer(file)
    with TextWriter(tmp_path / "out", tokenizer.vocabulary, {}, tokenizer.to_json()) as writer:
        for number, text in enumerate(RUSSIAN[:3]):
            writer.write(str(number), text, tokenizer.encode(text), [])
    store = TextStore(tmp_path / "out" / "texts")
    ids, lengths = store.input_ids(np.arange(3))
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    assert Detokenizer(store.meta.vocabulary).texts([row.tolist() for row in rows]) == RUSSIAN[:3]

"""Plain text, JSON lines and Parquet: documents to rows, repeated documents, and what cannot be used."""

import gzip
import itertools
import json
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import import_texts
from data_tools.formats.corpus import Packing
from data_tools.formats.jsonl_texts import JsonlTexts
from data_tools.formats.parquet_texts import ParquetTexts
from data_tools.formats.plain_text import PlainText
from data_tools.packing_texts import split_sentences
from data_tools.records import BadRow
from data_tools.tokenizers import load_tokenizer
from tests.data_tools.feature_files import good, only_bad, read_all
from tests.data_tools.text_sources import ENGLISH, open_format, small_tokenizer
from tests.data_tools.toy_sources import tree
from vlscale.errors import VlscaleError

DOCUMENTS = [ENGLISH[:3], ENGLISH[3:4], ENGLISH[4:]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), "wordpiece")


def write_plain(path, documents=DOCUMENTS, end="\n"):
    path.write_bytes((end * 2).join(end.join(texts) for texts in documents).encode() + end.encode())
    return path


def write_jsonl(path, documents=DOCUMENTS):
    path.write_text("".join(json.dumps({"text": "\n".join(texts), "id": 1}) + "\n" for texts in documents))
    return path


def write_parquet(path, documents=DOCUMENTS, kind=None, group=2):
    column = pa.array(["\n".join(texts) for texts in documents], kind or pa.string())
    pq.write_table(pa.table({"id": pa.array(range(len(documents))), "text": column}), path, row_group_size=group)
    return path


WRITE = {"plain_text": write_plain, "jsonl_texts": write_jsonl, "parquet_texts": write_parquet}
SUFFIX = {"plain_text": "txt", "jsonl_texts": "jsonl", "parquet_texts": "parquet"}


@pytest.mark.parametrize("name", WRITE)
def test_each_document_becomes_a_row(tmp_path, tokenizer, name):
    path = WRITE[name](tmp_path / f"a.{SUFFIX[name]}")
    source = open_format(name, path, "--pack", "document", tokenizer=tokenizer)
    encode = load_tokenizer(tokenizer).encode
    rows = good(source)
    assert [row.text for row in rows] == [" ".join(texts) for texts in DOCUMENTS]
    assert [row.input_ids for row in rows] == [encode(row.text) for row in rows]
    assert not source.paired


@pytest.mark.parametrize("name", WRITE)
def test_rows_are_filled_across_documents(tmp_path, tokenizer, name):
    options = {"group": 100} if name == "parquet_texts" else {}
    path = WRITE[name](tmp_path / f"a.{SUFFIX[name]}", **options)
    (row,) = good(open_format(name, path, tokenizer=tokenizer))
    assert row.text == "\n".join(" ".join(texts) for texts in DOCUMENTS)
    rows = good(open_format(name, path, "--max-tokens", "30", tokenizer=tokenizer))
    assert max(len(row.input_ids) for row in rows) <= 30
    assert " ".join(row.text for row in rows).split() == " ".join(ENGLISH).split()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_lines_or_files_end_documents(tmp_path, tokenizer, end):
    path = write_plain(tmp_path / "a.txt", end=end)
    for how, documents in (("blank", DOCUMENTS), ("line", [[text] for text in ENGLISH]), ("file", [ENGLISH])):
        rows = good(open_format("plain_text", path, "--pack", "document", "--documents", how, tokenizer=tokenizer))
        assert [row.text for row in rows] == [" ".join(texts) for texts in documents]


def test_a_line_with_blanks_alone_ends_a_document_too_and_a_byte_order_mark_is_no_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne.\n \t\nTwo.\nThree.\n")
    rows = good(open_format("plain_text", tmp_path / "a.txt", "--pack", "document", tokenizer=tokenizer))
    assert [row.text for row in rows] == ["One.", "Two. Three."]


@pytest.mark.parametrize("part_bytes", [1, 50, 170, 10_000])
@pytest.mark.parametrize("kind", [PlainText, JsonlTexts])
def test_any_division_into_parts_keeps_every_line_once(tmp_path, tokenizer, kind, part_bytes):
    documents = [[f"{text} {n}" for text in ENGLISH] for n in range(4)]
    path = (write_plain if kind is PlainText else write_jsonl)(tmp_path / "a.txt", documents)
    rows = good(kind([path], Packing(tokenizer, "none"), part_bytes=part_bytes))
    assert " ".join(row.text for row in rows).split() == " ".join(itertools.chain(*documents)).split()
    assert len({row.id for row in rows}) == len(rows)


def test_gzip_is_read(tmp_path, tokenizer):
    plain = write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    one, two = (good(open_format("jsonl_texts", tmp_path / n, tokenizer=tokenizer)) for n in ("a.jsonl", "b.jsonl.gz"))
    assert [row.text for row in one] == [row.text for row in two]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_columns_of_every_kind_of_string_are_read(tmp_path, tokenizer, kind):
    column = pa.array(["\n".join(texts) for texts in DOCUMENTS], pa.string()).cast(pa.string())
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    pq.write_table(pa.table({"body": column}), tmp_path / "a.parquet")
    source = open_format(
        "parquet_texts", tmp_path / "a.parquet", "--field", "body", "--pack", "document", tokenizer=tokenizer
    )
    assert [row.text for row in good(source)] == [" ".join(texts) for texts in DOCUMENTS]


def test_a_row_group_is_a_part_and_rows_keep_their_numbers(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "a.parquet", [[f"Text {n}."] for n in range(7)], group=3)
    source = ParquetTexts([path], Packing(tokenizer, "none"))
    assert [part["row"] for part in source.parts()] == [0, 3, 6]
    assert [row.where.removeprefix(f"{tmp_path}/") for row in good(source)] == [
        f"a.parquet: row {n + 1}" for n in range(7)
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b'{"text": 5}', "text: 5 is not a text"),
        (b'{"text": " "}', "text: is empty"),
        (b'{"body": "x"}', "text: is missing"),
        (b'{"text": "x"', "is not JSON"),
        (b"[" * 10_000, "is not JSON"),
        (b'["x"]', "['x'] is not a JSON object"),
        (b'{"text": "\xff"}', "line: is not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "text: holds half a surrogate pair"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_bad_json_lines_name_file_row_and_field(tmp_path, tokenizer, row, why):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "One."}\n' + row + b'\n{"text": "Two."}\n')
    source = open_format("jsonl_texts", tmp_path / "a.jsonl", tokenizer=tokenizer)
    assert only_bad(source).startswith(f"a.jsonl: row 2: {why}")
    assert [row.text for row in read_all(source) if not isinstance(row, BadRow)] == ["One.\nTwo."]


def test_bad_lines_of_text_name_their_row(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"One.\n\xe4\nTwo.\n" + b"x" * (1 << 20) + b"x\nThree.\n")
    found = read_all(open_format("plain_text", tmp_path / "a.txt", "--pack", "document", tokenizer=tokenizer))
    assert [str(row).removeprefix(f"{tmp_path}/") for row in found if isinstance(row, BadRow)] == [
        "a.txt: row 2: line: is not UTF-8 at byte 0: b'\\xe4\\n'",
        "a.txt: row 4: is longer than 1048576 bytes",
    ]
    assert [row.text for row in found if not isinstance(row, BadRow)] == ["One.", "Two.", "Three."]


def test_bad_cells_of_parquet_are_bad_rows(tmp_path, tokenizer):
    column = pa.array([b"One.", None, b"\xff", b" ", b"Two."], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = read_all(open_format("parquet_texts", tmp_path / "a.parquet", tokenizer=tokenizer))
    assert [str(row).removeprefix(f"{tmp_path}/") for row in found if isinstance(row, BadRow)] == [
        "a.parquet: row 2: text: is null",
        "a.parquet: row 3: text: is not UTF-8 at byte 0: b'\\xff'",
        "a.parquet: row 4: text: is empty",
    ]


def test_what_is_no_parquet_of_strings_is_refused(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "a.parquet")
    for options, why in (
        (("--field", "body"), "body: is missing, expected strings"),
        (("--field", "id"), "id: is int64"),
    ):
        with pytest.raises(VlscaleError, match=rf"a\.parquet: {why}"):
            open_format("parquet_texts", path, *options, tokenizer=tokenizer).parts()
    data = path.read_bytes()
    for damaged in (data[:-20], data[:40], b"PAR1" * 10, b"text"):
        path.write_bytes(damaged)
        with pytest.raises(VlscaleError, match=r"a\.parquet: cannot be read as Parquet"):
            open_format("parquet_texts", path, tokenizer=tokenizer).parts()


def test_flipped_bytes_of_parquet_never_crash(tmp_path, tokenizer):
    path = write_parquet(tmp_path / "a.parquet", [[f"Text {n} of many."] for n in range(50)], group=25)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        flipped = bytearray(data)
        for place in rng.integers(0, len(data), 3):
            flipped[place] ^= int(rng.integers(1, 256))
        path.write_bytes(flipped)
        try:
            read_all(open_format("parquet_texts", path, tokenizer=tokenizer))
        except VlscaleError as error:
            assert "\n" not in str(error)  # noqa: PT017 most changes are not noticed


REPEATED = [ENGLISH[:2], ENGLISH[2:3], [ENGLISH[0].upper(), f"  {ENGLISH[1]}"], ENGLISH[3:], ENGLISH[2:3], ENGLISH[2:3]]


@pytest.mark.parametrize("name", WRITE)
@pytest.mark.parametrize("parts", ["one", "many"])
def test_repeated_documents_are_left_out_over_all_parts_and_files(tmp_path, tokenizer, capsys, name, parts):
    half = 6 if parts == "one" else 3
    paths = [
        WRITE[name](tmp_path / f"{n}.{SUFFIX[name]}", chosen)
        for n, chosen in enumerate((REPEATED[:half], REPEATED[half:]))
        if chosen
    ]
    options = ("--pack", "document", "--dedup", "exact")
    source = open_format(name, paths, *options, out=tmp_path / "out", tokenizer=tokenizer)
    expected = [" ".join(texts) for texts in (ENGLISH[:2], ENGLISH[2:3], ENGLISH[3:])]
    assert [row.text for row in good(source)] == expected
    assert "3 of 6 documents repeat earlier ones" in capsys.readouterr().err
    again = open_format(name, paths, *options, out=tmp_path / "out", tokenizer=tokenizer)
    assert [row.text for row in good(again)] == expected
    assert not capsys.readouterr().err  # what was found is kept for the next process


def test_bad_rows_do_not_shift_what_is_repeated(tmp_path, tokenizer):
    lines = [{"text": "One."}, {"text": 1}, {"text": "Two."}, {"text": "one."}, {"text": ""}, {"text": "Three."}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_format("jsonl_texts", path, "--dedup", "exact", out=tmp_path / "out", tokenizer=tokenizer)
    found = read_all(source)
    assert [row.text for row in found if not isinstance(row, BadRow)] == ["One.\nTwo.\nThree."]
    assert sum(isinstance(row, BadRow) for row in found) == 2


def test_a_dead_worker_of_dedup_is_one_line(tmp_path, tokenizer, monkeypatch):
    paths = [write_plain(tmp_path / f"{number}.txt") for number in range(3)]
    packing = Packing(tokenizer, repeated=tmp_path / "repeated.npy", workers=2, reopen=_die)
    with pytest.raises(VlscaleError, match=r"0\.txt: --dedup: a worker process was killed") as raised:
        PlainText(paths, packing).parts()
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "repeated.npy").exists()


def _die():
    os._exit(1)


def test_a_corpus_is_imported_by_the_command_line(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", REPEATED * 40)
    roots = [tmp_path / "one", tmp_path / "two"]
    for root, workers in zip(roots, ("1", "2"), strict=True):
        options = ["--tokenizer", str(tokenizer), "--max-tokens", "40", "--dedup", "exact", "--workers", workers]
        import_texts.run(["jsonl_texts", str(path), str(path), "--out", str(root), *options])
        assert not (root / ".parts").exists()
    assert tree(roots[0]) == tree(roots[1])
    report = json.loads((roots[0] / "report-texts.json").read_bytes())
    words = " ".join(" ".join(texts) for texts in (ENGLISH[:2], ENGLISH[2:3], ENGLISH[3:]))
    assert report["rows"] > 1
    assert report["tokens"] >= len(load_tokenizer(tokenizer).encode(words))
    assert (roots[0] / "texts/tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer):
    peaks = []
    for count in (500, 3_000):
        path = write_plain(tmp_path / f"{count}.txt", [ENGLISH] * count)
        source = open_format("plain_text", path, tokenizer=tokenizer)
        parts = source.parts()
        tracemalloc.start()
        rows = sum(1 for part in parts for _ in source.read(part))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows > count // 8
    assert peaks[1] < 1.5 * peaks[0] + 1_000_000


def test_rows_hold_whole_sentences(tmp_path, tokenizer):
    path = write_plain(tmp_path / "a.txt", [ENGLISH] * 3)
    for row in good(open_format("plain_text", path, "--max-tokens", "64", tokenizer=tokenizer)):
        assert set(split_sentences(row.text)) <= set(ENGLISH)

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.formats.lines import Line, indexed_parts, line_parts, read_line_index, read_lines
from data_tools.records import BadRow
from tests.data_tools.feature_files import write_line_index, write_lines
from vlscale.errors import VlscaleError


def rows_of(paths, parts, **options):
    return [line for part in parts for line in read_lines(paths, part, **options)]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.text("ab\t", min_size=1, max_size=12), min_size=1, max_size=20),
    size=st.integers(1, 60),
    ended=st.booleans(),
)
def test_any_division_into_parts_gives_each_line_once_and_in_order(tmp_path_factory, rows, size, ended):
    path = tmp_path_factory.mktemp("lines") / "a.tsv"
    path.write_text("\n".join(rows) + "\n" * ended)
    found = rows_of([path], line_parts([path], size))
    assert [line.data.rstrip(b"\n").decode() for line in found] == rows
    begins = np.cumsum([0, *(len(row) + 1 for row in rows)])[:-1]
    assert [line.begin for line in found] == begins.tolist()


def test_rows_are_named_by_number_or_by_byte(tmp_path):
    path = write_lines(tmp_path / "a.tsv", ["aaaa", "bbbb", "cccc"])
    whole = rows_of([path], line_parts([path]))
    assert [line.where for line in whole] == [f"{path}: row {row}" for row in (1, 2, 3)]
    cut = rows_of([path], line_parts([path], 6))
    assert [line.where for line in cut] == [f"{path}: row 1", f"{path}: row 2", f"{path}: row at byte 10"]


def test_rows_of_files_that_are_called_alike_are_told_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths = [write_lines(tmp_path / name / "a.tsv", ["x"]) for name in ("one", "two")]
    assert len({line.where for line in rows_of(paths, line_parts(paths))}) == 2


def test_parts_of_several_files_are_plain_json_and_the_same_each_time(tmp_path):
    paths = [write_lines(tmp_path / name, ["x" * 9] * 9) for name in ("a", "b")]
    parts = line_parts(paths, 30)
    assert len(parts) == 6
    assert json.loads(json.dumps(parts)) == line_parts(paths, 30) == parts


def test_blank_lines_are_no_rows_and_crlf_is_a_line_end(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"a\r\n\r\n\nb\n\n")
    found = rows_of([path], line_parts([path]))
    assert [(line.row, line.data) for line in found] == [(1, b"a\r\n"), (4, b"b\n")]


def test_a_line_that_is_too_long_is_a_bad_row_and_the_next_is_read(tmp_path):
    path = write_lines(tmp_path / "a.tsv", ["a", "x" * 5000, "b"])
    found = rows_of([path], line_parts([path]), max_line=100)
    assert isinstance(found[1], BadRow)
    assert str(found[1]) == f"{path}: row 2: is longer than 100 bytes"
    assert [found[0].data, found[2].data] == [b"a\n", b"b\n"]


def test_gzip_is_one_part_and_gives_the_same_lines(tmp_path):
    rows = [f"row {number}" for number in range(1000)]
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    parts = line_parts([path], 10)
    assert len(parts) == 1
    assert [line.data.decode().strip() for line in rows_of([path], parts)] == rows


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_damaged_gzip_is_one_error_that_names_the_file(tmp_path, damage):
    data = gzip.compress(np.random.default_rng(0).bytes(50_000).replace(b"\n", b" ") + b"\n")
    data = {"cut": data[:-2000], "flipped": data[:30_000] + b"\0" * 20 + data[30_020:], "plain": b"a\tb\n"}[damage]
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(data)
    with pytest.raises(VlscaleError, match=r"a\.tsv\.gz: its compression is damaged"):
        rows_of([path], line_parts([path]))


@pytest.mark.parametrize("row", [b"\n", b"x" * 99 + b"\n", b"x"])
def test_a_gzip_bomb_ends_early(tmp_path, row):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress(row * (40_000_000 // len(row))))
    with pytest.raises(VlscaleError, match="unpacks to more than 256 times its size"):
        rows_of([path], line_parts([path]), max_line=1 << 20)


@pytest.mark.parametrize("name", ["missing.tsv", "folder", "empty.tsv"])
def test_sources_that_hold_nothing_are_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(VlscaleError, match=name):
        line_parts([tmp_path / name])


def test_an_index_gives_parts_whose_rows_are_numbered(tmp_path):
    rows = ["a" * length for length in (3, 50, 2, 9, 70, 1)]
    path = write_lines(tmp_path / "a.tsv", rows)
    write_line_index(path, rows)
    for size in (1, 10, 60, 1000):
        found = rows_of([path], indexed_parts([path], size))
        assert [(line.row, line.data.decode().strip()) for line in found] == list(enumerate(rows, 1))
    assert len(indexed_parts([path], 60)) > 1


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.tsv", ["aaaa", "bbbb", "cccc"])
    index = path.with_suffix(".lineidx")
    for text, why in (
        ("0\n4\n10\n", "no row begins at byte 4"),
        ("0\n5\n100\n", "is it cut off"),
        ("5\n10\n", "do not ascend from 0"),
        ("0\n10\n5\n", "do not ascend"),
        ("0\nx\n", "not a list of byte positions"),
        ("", "is empty"),
    ):
        index.write_text(text)
        with pytest.raises(VlscaleError, match=why):
            indexed_parts([path], 1)


def test_chosen_rows_are_read_where_they_begin(tmp_path):
    path = write_lines(tmp_path / "a.tsv", ["aaaa", "bbbb", "cccc"])
    found = list(read_lines([path], {"file": 0, "rows": [[5, 2], [10, None]]}))
    assert found == [Line(f"{path}: row 2", 5, b"bbbb\n", 2), Line(f"{path}: row at byte 10", 10, b"cccc\n", None)]


def test_read_line_index_gives_the_positions(tmp_path):
    rows = ["a", "bb", "ccc"]
    path = write_lines(tmp_path / "a.tsv", rows)
    write_line_index(path, rows)
    assert read_line_index(path.with_suffix(".lineidx")).tolist() == [0, 2, 5]

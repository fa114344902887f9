"""The pictures: free, present, credited, and the held-out ones really held out."""

from __future__ import annotations

import json
import re

import pytest

from data_tools.pictures import DEMO, load_catalogue, load_picture
from vlscale.errors import VlscaleError

RECORDS = [json.loads(line) for line in (DEMO / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_picture_has_a_free_licence_an_author_and_a_file() -> None:
    assert len(RECORDS) == 574
    free = re.compile(r"public-domain|CC0-1\.0|CC-BY(-SA)?(-[1-4]\.[05])?")
    for record in RECORDS:
        assert free.fullmatch(record["license"]), record["id"]
        assert record["author"], record["id"]
    on_disk = {f"images/{path.name}" for path in (DEMO / "images").iterdir()}
    assert on_disk == {record["file"] for record in RECORDS}


def test_sizes_in_the_records_are_those_of_the_files() -> None:
    for record in RECORDS[::23]:
        picture = load_picture(record["file"])
        assert picture.size == (record["width"], record["height"])
        # Scenes are planned from "alpha" alone: a cut-out must have see-through pixels.
        assert (picture.getextrema()[3][0] < 255) == record["alpha"], record["id"]


@pytest.mark.parametrize("things", [12, 32, 120])
def test_catalogue_keeps_seen_unseen_and_new_pictures_apart(things: int) -> None:
    catalogue = load_catalogue(things)
    assert len(catalogue.known) == things
    groups = [thing.seen for thing in catalogue.known + catalogue.new]
    groups += [thing.unseen for thing in catalogue.known + catalogue.new] + [catalogue.backgrounds]
    ids = [picture.id for group in groups for picture in group]
    assert len(ids) == len(set(ids))
    nouns = [thing.noun for thing in catalogue.known + catalogue.new]
    assert len(nouns) == len(set(nouns))
    for thing in catalogue.known + catalogue.new:
        assert re.fullmatch("[a-z]+", thing.noun)
        assert thing.article == ("an" if thing.noun[0] in "aeiou" else "a")
        total = len(thing.seen) + len(thing.unseen)
        assert len(thing.unseen) == (max(1, total // 3) if total > 1 else 0)


def test_all_of_the_default_things_have_a_held_out_picture() -> None:
    assert all(thing.unseen for thing in load_catalogue(32).known)


def test_too_many_things_and_a_gpl_picture_are_refused(tmp_path) -> None:
    with pytest.raises(VlscaleError, match="--things 1000"):
        load_catalogue(1000)
    (tmp_path / "records.jsonl").write_text(json.dumps({**RECORDS[0], "license": "GPL-2"}) + "\n")
    listed = {"things": [{"noun": "x", "article": "a", "pictures": [RECORDS[0]["id"]]}], "backgrounds": []}
    (tmp_path / "pictures.json").write_text(json.dumps(listed))
    with pytest.raises(VlscaleError, match="GPL-2"):
        load_catalogue(5, tmp_path)


def test_a_missing_picture_is_named() -> None:
    with pytest.raises(VlscaleError, match="no-such-picture"):
        load_picture("images/no-such-picture.webp")

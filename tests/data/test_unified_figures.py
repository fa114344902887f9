"""What ``vlscale inspect`` tells of datasets for unified steps, and of the steps."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.data.test_unified import three
from tests.data.unified_data import toy_pairs, write_all
from vlscale.cli import main
from vlscale.data.dataset import open_dataset
from vlscale.data.inspection import facts, open_stores
from vlscale.data.plan_figures import plan_figures
from vlscale.data.rows import decoded_rows
from vlscale.data.source import PlanSettings
from vlscale.data.verification import verify
from vlscale.data.views import UNIFIED, Role
from vlscale.errors import VlscaleError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("unified"))


def settings(**more) -> PlanSettings:
    return PlanSettings(**{"seed": 5, "max_text_tokens": 18, "micro_batch_tokens": 1500, **more})


def test_figures_of_mixed_steps_add_up():
    pairs, texts, images = three()
    found = plan_figures(pairs, UNIFIED, settings(), 2, 2, share=5.0, others=[(texts, 1.0), (images, 1.0)])
    mixed = found.mixed
    assert [*mixed["units"]] == ["pairs", "texts", "images"]
    units = np.array([*mixed["units"].values()])
    assert np.abs(units / units.sum() - np.array([5, 1, 1]) / 7).max() < 0.02
    assert sum(role["share"] for role in mixed["roles"].values()) == pytest.approx(1)
    assert sum(role["rows"] for role in mixed["roles"].values()) == pytest.approx(mixed["rows"])
    assert set(mixed["roles"]) == {role.name.lower() for role in Role}
    assert mixed["roles"]["pair"]["rows"] == pytest.approx(units[0])
    assert found.texts == len(pairs) - found.left_out
    assert found.examples >= found.texts  # units of the first dataset, over the whole pass
    assert found.examples == pytest.approx(units[0] * found.steps)
    assert found.tokens.max() <= 1500
    assert json.loads(json.dumps(found.to_json()))["mixed"]["rows"] == mixed["rows"]


def test_figures_leave_out_views_without_a_store():
    pairs, _, images = three()
    found = plan_figures(pairs, UNIFIED, settings(), gas=1, others=[(images, 1.0)]).mixed
    assert "retrieved_text" not in found["roles"]
    assert found["roles"]["retrieved_image"]["rows"] > 0
    bare = toy_pairs(images, three()[1], name="bare")
    object.__setattr__(bare, "beside", type(bare.beside)())
    assert {"positive", "negative", "retrieved_image"}.isdisjoint(
        plan_figures(bare, UNIFIED, settings(), gas=1).mixed["roles"]
    )
    assert "mixed" not in plan_figures(pairs, "mlm", settings(), gas=1).to_json()


def test_a_budget_below_the_largest_unit_is_refused():
    with pytest.raises(
        VlscaleError, match=r"--budget 50 is smaller than the largest unit with its views of pairs: \d+"
    ):
        plan_figures(three()[0], UNIFIED, settings(micro_batch_tokens=50), gas=1)
    with pytest.raises(VlscaleError, match="--global-tokens 50 is smaller than the largest unit"):
        plan_figures(three()[0], UNIFIED, settings(global_batch_tokens=50))


def test_facts_name_everything_beside_the_texts(folders):
    found = facts(open_stores(folders["pairs"]))
    assert [*found["stores"]] == ["texts", "images", "classes", "units", "rewrites", "retrieved"]
    dataset = open_dataset("pairs", folders["pairs"])
    assert found["fingerprint"] == dataset.fingerprint
    assert found["stores"]["units"]["units"] == dataset.units.lengths.sum()
    assert found["stores"]["rewrites"]["views"] == len(dataset.rewrites.view_tokens)
    assert found["stores"]["rewrites"]["positive_views"] == dataset.rewrites.view_positive.sum()
    assert found["stores"]["retrieved"]["images"] == dataset.retrieved.image_counts.sum()
    texts, images = (facts(open_stores(folders[name])) for name in ("texts", "images"))
    assert texts["fingerprint"]
    assert images["fingerprint"]
    assert "vocabulary" not in images


def test_rows_show_units_rewrites_and_candidates(folders):
    stores = open_stores(folders["pairs"])
    for row in decoded_rows(stores, "0:9", 2):
        assert [token for unit in row["units"] for token in unit] == row["tokens"]
        assert len(row["rewrites"]) == stores.rewrites.lengths[row["row"]]
        assert row["retrieved"]["texts"] == stores.retrieved.texts_of(row["row"]).tolist()
    with pytest.raises(VlscaleError, match="name the dataset's folder"):
        decoded_rows(open_stores(folders["pairs"] / "units"), "0", 1)


@pytest.mark.parametrize("store", ["units", "rewrites", "retrieved"])
def test_damage_beside_the_texts_is_found(folders, tmp_path, store):
    root = tmp_path / "pairs"
    shutil.copytree(folders["pairs"], root)
    assert not verify(root, rows=True).found
    shard = root / store / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 0xFF
    shard.write_bytes(content)
    assert store in verify(root).problems[0]
    shutil.rmtree(root / store)
    assert not verify(root, rows=True).found


@pytest.mark.parametrize("name", ["texts", "images"])
def test_texts_and_images_alone_are_whole(folders, name):
    found = verify(folders[name], rows=True)
    assert not found.problems
    assert found.rows


def test_inspect_shows_mixed_steps_in_words(folders, capsys):
    asked = ["inspect", str(folders["pairs"]), "--plan", "--budget", "1500", "--rows", "0"]
    assert main([*asked, "--mix", f"{folders['texts']}=0.2", "--mix", f"{folders['images']}=0.2"]) == 0
    shown = capsys.readouterr().out
    assert "of pairs" in shown
    assert "of texts.2" in shown
    assert "the image with a rewritten caption that is not true" in shown
    assert "largest unit with its views" in shown
    for name in ("texts", "images"):
        assert main(["inspect", str(folders[name]), "--plan", "--budget", "200", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["plan"]["mixed"]["units"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mix", "nowhere"], "--mix nowhere: expected FOLDER=SHARE"),
        (["--mix", "nowhere=0"], "expected FOLDER=SHARE, a share above 0"),
        (["--mix", "nowhere=1"], "nowhere/texts is no folder"),
        (["--mix", "nowhere=1", "--task", "mlm"], "--mix has no effect with --task mlm"),
        (["--task", "itm"], "has no texts/, which task itm needs"),
    ],
)
def test_mistakes_are_said_in_one_line(folders, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(["inspect", str(folders["images"]), "--plan", "--budget", "500", *arguments])
    assert message in capsys.readouterr().err

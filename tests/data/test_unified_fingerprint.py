"""A unified run goes on after a resume where all that it reads is what it was; else the message names what is not."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil

import pytest

from tests.data.test_unified import plan_of, three, walked
from tests.data.toy import toy_lengths
from tests.data.unified_data import ToyViews, write_all, write_retrieved, write_rewrites, write_units
from vlscale.config_unified import UnifiedSection
from vlscale.data import plan as planning
from vlscale.data.dataset import open_dataset
from vlscale.data.plan import Plan, PlanSettings
from vlscale.data.views import UNIFIED, ViewSettings
from vlscale.errors import VlscaleError

NO_VIEWS = ViewSettings.from_section(UnifiedSection.model_validate({"contrast": {"weight": 0}}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("unified"))


def test_fingerprints_cover_what_decides_the_rows():
    lengths, base = three(), ViewSettings()
    one = plan_of(lengths)
    assert one.fingerprint == plan_of(lengths).fingerprint == plan_of(lengths, micro_batch_tokens=3000).fingerprint
    for name, value in (("negatives", 3), ("images", 0), ("pair_visual_share", 0.4), ("seq2seq_share", 0.1),
                        ("seq2seq_probability", 0.5), ("alone", False), ("contrast", False)):  # fmt: skip
        other = plan_of(lengths, views=dataclasses.replace(base, **{name: value}))
        with pytest.raises(VlscaleError, match=r"changed recipe \(objectives\.unified\)"):
            other.check_resume(one.fingerprint)
    with pytest.raises(VlscaleError, match=r"changed recipe .*mix"):
        plan_of(lengths, shares=(4, 1, 1)).check_resume(one.fingerprint)
    bare = dataclasses.replace(lengths[0], beside=dataclasses.replace(lengths[0].beside, retrieved=None))
    alone = plan_of([bare], views=dataclasses.replace(base, images=0, texts=0))
    assert alone.fingerprint != plan_of(lengths[:1], views=ViewSettings(contrast=False)).fingerprint


def opened_plan(folders, root, views=None, task=UNIFIED) -> Plan:
    """A plan over the pairs in ``root``, as training makes it, with what they retrieve from."""
    places = {"pairs": root} if task != UNIFIED else {**folders, "pairs": root}
    datasets = {name: open_dataset(name, place) for name, place in places.items()}
    settings = PlanSettings(seed=1, global_batch_tokens=4000, micro_batch_tokens=3000, views=views or ViewSettings())
    fingerprints = {name: dataset.fingerprint for name, dataset in datasets.items()}
    return Plan([(dataset.lengths, {task: 1.0}) for dataset in datasets.values()], settings, fingerprints)


@pytest.mark.parametrize(
    ("store", "unread"),
    [
        ("units", {"units": False}),
        ("rewrites", {"positives": 0, "negatives": 0}),
        ("retrieved", {"images": 0, "texts": 0}),
    ],
)
def test_what_stands_beside_the_texts_counts_where_it_is_read(folders, tmp_path, store, unread):
    root = tmp_path / "pairs"
    shutil.copytree(folders["pairs"], root)
    without = dataclasses.replace(ViewSettings(), **unread)
    read, ignored, words = (
        opened_plan(folders, root).fingerprint,
        opened_plan(folders, root, without).fingerprint,
        opened_plan(folders, root, task="mlm").fingerprint,
    )
    shutil.rmtree(root / store)
    {"units": write_units, "rewrites": write_rewrites}.get(
        store, lambda place, seed: write_retrieved(place, folders["images"], folders["texts"], seed=seed)
    )(root, seed=7)
    with pytest.raises(
        VlscaleError, match=rf"a changed {store}/ beside a data set, or whether .*\): dataset pairs {store} of the plan"
    ):
        opened_plan(folders, root).check_resume(read)
    opened_plan(folders, root, without).check_resume(ignored)
    opened_plan(folders, root, task="mlm").check_resume(words)
    shutil.rmtree(root / store)
    opened_plan(folders, root, without).check_resume(ignored)
    opened_plan(folders, root, NO_VIEWS if store != "units" else without)
    opened_plan(folders, root, task="mlm").check_resume(words)


def test_a_dataset_that_is_named_as_a_store_is_not_taken_for_one():
    settings = PlanSettings(seed=1, global_batch_tokens=4000)
    one, two = (Plan([(toy_lengths(name="units", seed=seed), {"mlm": 1.0})], settings) for seed in (1, 2))
    with pytest.raises(VlscaleError, match="a changed data set on resume: dataset units of the plan"):
        two.check_resume(one.fingerprint)


def test_another_version_of_the_expansion_is_named(monkeypatch):
    settings = PlanSettings(seed=1, global_batch_tokens=4000)
    before, words = plan_of().fingerprint, Plan([(toy_lengths(), {"mlm": 1.0})], settings).fingerprint
    monkeypatch.setattr(planning, "EXPANSION_VERSION", planning.EXPANSION_VERSION + 1)
    with pytest.raises(VlscaleError, match=r"expansion of units to rows \(another version of vlscale\): expansion of"):
        plan_of().check_resume(before)
    assert Plan([(toy_lengths(), {"mlm": 1.0})], settings).fingerprint == words


def test_frozen_rows():
    """Rows are part of the checkpoint format: who changes them raises EXPANSION_VERSION."""
    digest = hashlib.sha256()
    for step, _ in walked(plan_of(), 12):
        for column in (step.texts, step.images, step.passes, step.examples, step.views.view):
            digest.update(column.astype("<i8").tobytes())
        digest.update(step.views.role.tobytes() + step.views.source.tobytes())
    assert planning.EXPANSION_VERSION == 1
    assert digest.hexdigest()[:16] == "a0ac448b4da94bdf"


def test_digests_of_lengths_do_not_know_what_stands_beside():
    pairs = three()[0]
    views = dataclasses.replace(pairs.beside, rewrites=ToyViews(None, None, None))
    assert dataclasses.replace(pairs, beside=views).digest == dataclasses.replace(pairs, beside=type(views)()).digest

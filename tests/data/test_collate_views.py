"""Batches of unified steps hold what their rows say, however they are dealt, read and packed."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from tests.data.test_packing import equal
from tests.data.test_unified import rows_of
from tests.data.unified_data import open_all, write_all
from tests.helpers import make_dataset, make_vocabulary
from vlscale.config_unified import UnifiedSection
from vlscale.data.collate_views import collate_views
from vlscale.data.dataset import open_dataset
from vlscale.data.deal import accumulation, deal, fitting_accumulation
from vlscale.data.loader import Loader, slot_bytes
from vlscale.data.packing import Block
from vlscale.data.plan import FixedSteps, Plan, PlanSettings, evaluation_seed, evaluation_steps
from vlscale.data.prefetch import Prefetcher, check_room
from vlscale.data.random import Draws
from vlscale.data.views import UNIFIED, Role, ViewSettings
from vlscale.errors import VlscaleError
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.objectives.unified import UnifiedLearning

SECTION = UnifiedSection()
REGIONS = 6
CEILING = 700
SETTINGS = PlanSettings(
    seed=3, global_batch_tokens=1500, micro_batch_tokens=CEILING, max_regions=REGIONS,
    views=ViewSettings.from_section(SECTION),
)  # fmt: skip
MIX = {"pairs": 5, "texts": 1, "images": 1}
OBJECTIVES = {UNIFIED: UnifiedLearning.build(SECTION, make_vocabulary())}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("unified"))


@pytest.fixture(scope="module")
def datasets(folders):
    return open_all(folders)


def plan_of(datasets, settings=SETTINGS) -> Plan:
    return Plan([(dataset.lengths, {UNIFIED: MIX[name]}) for name, dataset in datasets.items()], settings)


def loader_of(datasets, plan=None, position=None, rank=0, world=1, gas=None, workers=0, **more) -> Loader:
    plan = plan or plan_of(datasets)
    more = {"seed": 3, "max_regions": REGIONS, "prefetch": 2, **more}
    return Loader(
        datasets, OBJECTIVES, plan, position or plan.start(), rank, world, gas, CEILING, workers=workers, **more
    )


def micros(datasets, steps=2, world=2):
    plan = plan_of(datasets)
    gas, position, found = accumulation(plan, world), plan.start(), []
    for _ in range(steps):
        step, position = plan.step(position)
        found += [micro for hand in deal(step, world, gas, CEILING) for micro in hand]
    return found


def expected_row(datasets, micro, row):
    """Ids, features, boxes and rows of classes of one row, read by itself."""
    views = micro.views
    dataset, text, image = datasets[views.datasets[views.source[row]]], micro.texts[row], micro.images[row]
    ids = np.zeros(0, np.int64)
    if views.view[row] >= 0:
        number = int(views.view[row] - dataset.rewrites.ptr[text])
        ids = dataset.rewrites.rewrites(int(text))[number][1]
    elif text >= 0:
        ids = dataset.texts.input_ids(np.array([text]))[0]
    if text >= 0:
        ids = np.r_[dataset.vocabulary.cls, ids, dataset.vocabulary.sep]
    if image < 0:
        return ids, np.zeros((0, 8), np.float32), np.zeros((0, 4)), np.zeros(0)
    features, boxes, _, rows = dataset.images.regions(np.array([image]), REGIONS)
    return ids, features.astype(np.float32), boxes, rows


@pytest.mark.parametrize("in_block", [False, True])
def test_every_row_holds_what_its_stores_hold(datasets, in_block):
    seen = set()
    for micro in micros(datasets):
        block = Block(torch.zeros(slot_bytes(datasets, OBJECTIVES, CEILING), dtype=torch.uint8)) if in_block else None
        batch = collate_views(datasets, micro, REGIONS, block)
        text, regions = batch.cu_text.tolist(), batch.cu_regions.tolist()
        units, ends = batch.targets["cu_units"].tolist(), batch.targets["unit_ends"].numpy()
        assert batch.features.dtype == torch.float32  # float16 of the pairs is widened to what the images have
        assert batch.targets["role"].tolist() == micro.views.role.tolist()
        assert batch.targets["source"].tolist() == micro.views.source.tolist()
        for row in range(len(micro)):
            ids, features, boxes, rows = expected_row(datasets, micro, row)
            assert batch.input_ids[text[row] : text[row + 1]].tolist() == ids.tolist()
            place = slice(regions[row], regions[row + 1])
            assert np.array_equal(batch.features[place].numpy(), features)
            assert np.array_equal(batch.boxes[place].numpy(), boxes)
            assert batch.region_rows[place].tolist() == rows.tolist()
            role = Role(micro.views.role[row])
            seen.add(role)
            mine = ends[units[row] : units[row + 1]] - text[row] - 1
            if role in (Role.BIDIRECTIONAL, Role.SEQ2SEQ):
                dataset = datasets[micro.views.datasets[micro.views.source[row]]]
                assert mine.tolist() == dataset.units.units_of(micro.texts[row : row + 1])[0][:, 1].tolist()
            else:
                assert not len(mine)
        if in_block:
            for tensor in (batch.features, batch.input_ids, batch.targets["role"]):
                begin = tensor.data_ptr() - block.buffer.data_ptr()
                assert 0 <= begin < len(block.buffer)
    assert seen == set(Role)


def test_an_image_is_decoded_once_per_micro_batch(folders):
    datasets = open_all(folders)
    for micro in micros(datasets, steps=1):
        before = {name: datasets[name].images.bytes_read for name in ("pairs", "images")}
        collate_views(datasets, micro, REGIONS)
        for number, name in enumerate(micro.views.datasets):
            if name not in before:
                continue
            shown = np.unique(micro.images[(micro.views.source == number) & (micro.images >= 0)])
            store = datasets[name].images
            once = store.bytes_read - before[name]
            before[name] = store.bytes_read
            store.regions(shown, REGIONS)
            assert once == store.bytes_read - before[name]


def test_texts_of_a_dataset_without_units_have_none(datasets, folders):
    bare = open_dataset("texts", folders["texts"])
    del bare.stores["units"]
    some = {**datasets, "texts": bare}
    for micro in micros(datasets):
        batch = collate_views(some, micro, REGIONS)
        both = (batch, collate_views(datasets, micro, REGIONS))
        counts, whole = (each.targets["cu_units"].diff().numpy() for each in both)
        theirs = micro.views.source == 1
        assert not counts[theirs].any()
        assert np.array_equal(counts[~theirs], whole[~theirs])
    micro = micros(datasets)[0]
    assert "unit_ends" not in collate_views(datasets, micro, REGIONS, units=False).targets


@pytest.mark.parametrize("names", [["texts"], ["images"], ["pairs"], ["texts", "images"]])
def test_a_step_may_lack_kinds_of_units(datasets, names):
    some = {name: datasets[name] for name in names}
    settings = dataclasses.replace(SETTINGS, views=dataclasses.replace(SETTINGS.views, images=0, texts=0))
    plan = plan_of(some, settings)
    with loader_of(some, plan, gas=accumulation(plan, 1)) as loader:
        step, _, batches = next(loader)
    assert step.dataset == "+".join(names)
    assert all(isinstance(batch, UnimoBatch) for batch in batches)
    assert sum(len(batch) for batch in batches) == len(step)
    kinds = {name for name in names if datasets[name].kind != "texts"}
    assert any(len(batch.targets["region_positions"]) for batch in batches) == bool(kinds)


def test_batches_are_equal_for_any_workers_and_after_a_resume(datasets):
    plan = plan_of(datasets)
    gas = accumulation(plan, 2)
    with (
        loader_of(datasets, world=2, rank=1, gas=gas) as here,
        loader_of(datasets, world=2, rank=1, gas=gas, workers=2) as there,
    ):
        walked = [(next(here), next(there)) for _ in range(3)]
    for (step, after, ours), (other, other_after, theirs) in walked:
        assert rows_of([step]) == rows_of([other])
        assert after == other_after
        for one, two in zip(ours, theirs, strict=True):
            assert type(one) is type(two) is UnimoBatch
            equal(one, two)
    with loader_of(datasets, position=walked[1][0][1], world=2, rank=1, gas=gas) as resumed:
        for one, two in zip(next(resumed)[2], walked[2][0][2], strict=True):
            equal(one, two)


def masked_rows(batches):
    """(source, pass, example, role) -> what was masked, drawn and read of each row."""
    found = {}
    for batch in batches:
        if not batch.weight:
            continue
        chosen = batch.targets["region_positions"].tolist()
        at = dict(zip(chosen, range(len(chosen)), strict=True))
        for row in range(len(batch)):
            key = tuple(int(each[row]) for each in (batch.targets["source"], batch.passes, batch.examples,
                                                    batch.targets["role"]))  # fmt: skip
            ids = batch.input_ids[batch.cu_text[row] : batch.cu_text[row + 1]].tolist()
            regions = [r for r in range(int(batch.cu_regions[row]), int(batch.cu_regions[row + 1])) if r in at]
            probs = [batch.targets["class_probs"][at[r]].tolist() for r in regions]
            place = [r - int(batch.cu_regions[row]) for r in regions]
            prefix = -1 if batch.prefix_len is None else int(batch.prefix_len[row])
            if prefix == len(ids):
                prefix = -1
            found.setdefault(key, []).append((ids, place, probs, prefix))
    return {key: sorted(rows) for key, rows in found.items()}


def test_draws_and_class_probabilities_do_not_depend_on_the_dealing(datasets):
    plan = plan_of(datasets)
    wholes = []
    for world in (1, 2, 4):
        gas, batches = accumulation(plan, world), []
        for rank in range(world):
            with loader_of(datasets, plan, rank=rank, world=world, gas=gas) as loader:
                batches += [batch for _ in range(2) for batch in next(loader)[2]]
        wholes.append(masked_rows(batches))
    assert wholes[0] == wholes[1] == wholes[2]
    probs = {source: [p for key, rows in wholes[0].items() if key[0] == source for row in rows for p in row[2]]
             for source in (0, 1, 2)}  # fmt: skip
    assert probs[0]
    assert probs[2]
    assert not probs[1]


def test_class_probabilities_are_those_of_each_dataset(datasets):
    with loader_of(datasets, gas=accumulation(plan_of(datasets), 1)) as loader:
        batches = [batch for _ in range(3) for batch in next(loader)[2]]
    for batch in batches:
        owner, rows = batch.region_owner(), batch.region_rows
        for number, position in enumerate(batch.targets["region_positions"].tolist()):
            dataset = [*datasets.values()][int(batch.targets["source"][owner[position]])]
            expected = dataset.classes.probs(rows[position : position + 1].numpy())[0]
            assert np.array_equal(batch.targets["class_probs"][number].numpy(), expected)


def test_evaluation_steps_are_read_from_one_dataset(datasets):
    steps = evaluation_steps(datasets["pairs"].lengths, UNIFIED, 12, SETTINGS)
    one = {"pairs": datasets["pairs"]}
    with loader_of(one, FixedSteps(steps), seed=evaluation_seed(3)) as loader:
        found = [(step, batches) for step, _, batches in loader]
    assert [step.index for step, _ in found] == [step.index for step in steps]
    for step, batches in found:
        assert sum(len(batch) for batch in batches if batch.weight) == len(step)
        assert len(batches) == fitting_accumulation(step, 1, CEILING)


def test_views_travel_through_a_slot_as_they_are(datasets):
    micro = micros(datasets)[0]
    draws = [Draws(3, name) for name in micro.views.datasets]
    batch = OBJECTIVES[UNIFIED].prepare_views(collate_views(datasets, micro, REGIONS), draws)
    with loader_of(datasets, world=2, gas=accumulation(plan_of(datasets), 2)) as loader:
        loaded = next(loader)[2][0]
    assert type(loaded) is type(batch)
    assert loaded.prefix_len is None or loaded.prefix_len.tolist() == batch.prefix_len.tolist()


def test_stores_that_are_fetched_give_the_same_batches(datasets, folders, tmp_path):
    from vlscale.data.remote import CacheSettings

    cached = {
        name: open_dataset(name, folder, True, CacheSettings(tmp_path / "cache")) for name, folder in folders.items()
    }
    plan = plan_of(cached)
    assert plan.fingerprint == plan_of(datasets).fingerprint
    gas = accumulation(plan, 1)
    prefetcher = Prefetcher(cached, plan, plan.start(), [UNIFIED], steps=3)
    with loader_of(datasets, gas=gas) as here, loader_of(cached, plan, gas=gas, prefetcher=prefetcher) as there:
        assert prefetcher.wait(30)
        for _ in range(2):
            for one, two in zip(next(here)[2], next(there)[2], strict=True):
                equal(one, two)
    fetched = {path.parent.name for path in (tmp_path / "cache").rglob("*.mds")}
    assert fetched == {"texts", "images", "classes", "units", "rewrites", "retrieved"}


def test_prefetching_knows_every_shard_that_a_step_reads(datasets, folders, tmp_path):
    from vlscale.data.remote import CacheSettings

    cached = {
        name: open_dataset(name, folder, True, CacheSettings(tmp_path / "cache")) for name, folder in folders.items()
    }
    plan = plan_of(cached)
    step, after = plan.step(plan.start())
    prefetcher = Prefetcher(cached, FixedSteps([step]), dataclasses.replace(plan.start()), [UNIFIED])
    prefetcher.start()
    assert prefetcher.wait(30)
    prefetcher.close()
    before = sorted((tmp_path / "cache").rglob("*.mds"))
    with loader_of(cached, FixedSteps([step])) as loader:
        next(loader)
    assert sorted((tmp_path / "cache").rglob("*.mds")) == before
    assert after.step == 1


def test_a_cache_has_to_hold_what_is_retrieved_from(folders, tmp_path):
    from vlscale.data.remote import CacheSettings, disk_bytes

    def opened(limit):
        return {
            name: open_dataset(name, folder, True, CacheSettings(tmp_path / "cache", limit))
            for name, folder in folders.items()
        }

    cached = opened(10**6)
    check_room(plan_of(cached), cached, [UNIFIED], 1)
    sizes = {
        name: sum(disk_bytes(file) for store in each.stores.values() for file in store.reader.index.shards)
        for name, each in cached.items()
    }
    tight = opened(int(sizes["texts"] / 0.9) + 9)
    with pytest.raises(VlscaleError, match=r"cannot hold two windows .* images, texts whole for retrieved views,"):
        check_room(plan_of(tight), tight, [UNIFIED], 1)
    alone = {"texts": tight["texts"]}
    check_room(plan_of(alone), alone, [UNIFIED], 1)


def test_batches_are_no_larger_than_was_planned(datasets):
    for seed in range(12):
        views = dataclasses.replace(SETTINGS.views, seq2seq_share=[0.0, 1.0][seed % 2])
        plan = plan_of(datasets, dataclasses.replace(SETTINGS, seed=seed, views=views))
        step, _ = plan.step(plan.start())
        for (micro,) in deal(step, fitting_accumulation(step, 1, CEILING) * 3, 1, CEILING):
            draws = [Draws(seed, name) for name in micro.views.datasets]
            batch = OBJECTIVES[UNIFIED].prepare_views(collate_views(datasets, micro, REGIONS), draws)
            assert batch.tokens <= micro.tokens
            if not (micro.views.role == Role.SEQ2SEQ).any():
                assert batch.tokens == micro.tokens


def test_an_images_store_without_rows_is_none(tmp_path):
    root = make_dataset(tmp_path / "data", images=0, texts_without_image=9, classes=False)
    dataset = open_dataset("words", root)
    assert dataset.kind == dataset.lengths.kind == "texts"
    plan = Plan([(dataset.lengths, {UNIFIED: 1})], SETTINGS)
    with loader_of({"words": dataset}, plan, gas=accumulation(plan, 1)) as loader:
        _, _, (batch, *_) = next(loader)
    assert batch.features.shape == (0, 8)
    assert not batch.cu_regions.any()


def test_classes_are_needed_where_there_are_images_only(datasets, folders, tmp_path):
    bare = open_dataset("images", folders["images"])
    del bare.stores["classes"]
    with pytest.raises(VlscaleError, match=r"dataset images: task unified .*\.visual\.class_weight to 0"):
        loader_of({**datasets, "images": bare})
    section = UnifiedSection.model_validate({"visual": {"class_weight": 0}})
    objective = {UNIFIED: UnifiedLearning.build(section, make_vocabulary())}
    some = {**datasets, "images": bare}
    plan = plan_of(some)
    with Loader(some, objective, plan, plan.start(), 0, 1, accumulation(plan, 1), CEILING) as loader:
        assert all("class_probs" not in batch.targets for batch in next(loader)[2])


def test_pairs_of_which_no_region_is_masked_need_no_classes(folders):
    pairs = {"pairs": open_dataset("pairs", folders["pairs"])}
    del pairs["pairs"].stores["classes"]
    views = dataclasses.replace(SETTINGS.views, pair_visual_share=0.0, images=0, texts=0)
    plan = plan_of(pairs, dataclasses.replace(SETTINGS, views=views))
    with pytest.raises(VlscaleError, match=r"dataset pairs: task unified needs class probabilities"):
        loader_of(pairs, plan)
    section = UnifiedSection.model_validate({"pair_visual_share": 0})
    objective = {UNIFIED: UnifiedLearning.build(section, make_vocabulary())}
    with Loader(pairs, objective, plan, plan.start(), 0, 1, accumulation(plan, 1), CEILING) as loader:
        for batch in next(loader)[2]:
            assert not (batch.targets["role"] == Role.VISUAL).any()


def test_kinds_of_datasets_are_told_by_their_stores(datasets, folders, tmp_path):
    assert {name: dataset.kind for name, dataset in datasets.items()} == {name: name for name in datasets}
    assert [len(datasets[name]) for name in ("pairs", "texts", "images")] == [36, 30, 9]
    images = datasets["images"]
    assert images.vocabulary is None
    assert images.num_types == 1
    assert images.feature_dim == 8
    assert datasets["texts"].feature_dim is None
    with pytest.raises(VlscaleError, match=r"dataset images: .*texts is not there, and texts are needed"):
        images.require("texts")
    root = tmp_path / "empty"
    root.mkdir()
    with pytest.raises(VlscaleError, match="is no folder, nor is images/"):
        open_dataset("empty", root)
    shutil.copytree(folders["pairs"] / "texts", root / "texts")
    with pytest.raises(VlscaleError, match="images is no folder, but texts refer to images"):
        open_dataset("empty", root)


def test_tasks_of_uniter_say_what_is_missing(datasets):
    settings = PlanSettings(seed=1, global_batch_tokens=400)
    with pytest.raises(VlscaleError, match="dataset images: has no texts/, which task mlm needs"):
        Plan([(datasets["images"].lengths, {"mlm": 1})], settings)
    with pytest.raises(VlscaleError, match="has no image, which task mrfr needs"):
        Plan([(datasets["texts"].lengths, {"mrfr": 1})], settings)
    plan = Plan([(datasets["texts"].lengths, {"mlm": 1})], settings)
    with pytest.raises(VlscaleError, match="images is not there, and images are needed"):
        Loader({"texts": datasets["texts"]}, {"mlm": OBJECTIVES[UNIFIED]}, plan, plan.start(), 0, 1, 1, 400)

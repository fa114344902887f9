"""Promises of unified steps, for whatever recipe, data and number of processes Hypothesis thinks of."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.data.test_plan import same
from tests.data.toy import toy_lengths
from tests.data.unified_data import toy_images, toy_pairs, toy_texts
from vlscale.config_unified import UnifiedSection
from vlscale.data.deal import Rule, accumulation, deal, deal_hand, fill_advice, fitting_accumulation
from vlscale.data.plan import Plan, PlanSettings, Position, evaluation_steps
from vlscale.data.unified import group_ends, merged
from vlscale.data.views import MASKED, UNIFIED, Role, Views, ViewSettings
from vlscale.errors import VlscaleError

LONGEST = 18
STEPS = 8
WORLDS = (1, 2, 4, 64)


def three(seed: int = 0, **pairs):
    images, texts = toy_images(seed=seed), toy_texts(seed=seed + 1)
    return [toy_pairs(images, texts, seed=seed + 2, **pairs), texts, images]


def plan_of(lengths=None, shares=(5, 1, 1), views: ViewSettings | None = None, **settings) -> Plan:
    unit = {} if "global_batch_examples" in settings else {"global_batch_tokens": 4000}
    chosen = {"seed": 3, "max_text_tokens": LONGEST, "micro_batch_tokens": 1500, **unit, **settings}
    datasets = lengths or three()
    mixes = [{UNIFIED: share} for share in shares[: len(datasets)]]
    return Plan([*zip(datasets, mixes, strict=True)], PlanSettings(**chosen, views=views or ViewSettings()))


def walked(plan: Plan, count: int = STEPS):
    position, found = plan.start(), []
    for _ in range(count):
        step, position = plan.step(position)
        found.append((step, position))
    return found


@st.composite
def views_of(draw):
    shares = [0.0, 0.5, 1.0]
    return ViewSettings(
        contrast=draw(st.booleans()),
        positives=draw(st.integers(0, 2)),
        negatives=draw(st.integers(0, 5)),
        images=draw(st.integers(0, 2)),
        texts=draw(st.integers(0, 2)),
        alone=draw(st.booleans()),
        pair_visual_share=draw(st.sampled_from(shares)),
        seq2seq_share=draw(st.sampled_from(shares)),
    )


@st.composite
def recipes(draw):
    """A way to build a plan; twice gives two plans of one recipe."""
    seed = draw(st.integers(0, 10**6))
    lengths = three(seed, own_images=draw(st.integers(4, 40)), without_image=draw(st.integers(0, 4)))
    unit = {"global_batch_examples": draw(st.integers(1, 80))}
    if draw(st.booleans()):
        unit = {"global_batch_tokens": draw(st.integers(900, 9000))}
    shares = [draw(st.sampled_from([0.3, 1.0, 2.5, 5.0])) for _ in lengths]
    views, shards = draw(views_of()), draw(st.integers(1, 5))
    return lambda: plan_of(lengths, shares, views, seed=seed, window_shards=shards, **unit)


def built(recipe) -> Plan:
    """The plan; recipes that are refused (a step below one group) are no cases."""
    try:
        return recipe()
    except VlscaleError as error:
        assume("global_batch_tokens" not in str(error))
        raise


def units_of(step):
    """(dataset, pass, row) of each group, in order."""
    first = np.r_[0, group_ends(step)[:-1]]
    # The masked row comes first, and is of the unit's own dataset.
    assert np.isin(step.views.role[first], MASKED).all()
    return [*zip(step.views.source[first].tolist(), step.passes[first].tolist(), step.examples[first].tolist(),
                 strict=True)]  # fmt: skip


def rows_of(pieces):
    """Everything that is said of each row, sorted."""
    found = []
    for piece in pieces:
        columns = (piece.group, piece.views.role, piece.views.source, piece.views.view, piece.texts, piece.images,
                   piece.passes, piece.examples)  # fmt: skip
        found += zip(*(column.tolist() for column in columns), strict=True)
    return sorted(found)


@hypothesis_settings(max_examples=40, deadline=None)
@given(recipe=recipes())
def test_every_unit_comes_once_per_pass_in_the_mix_and_goes_on_alike(recipe):
    plan = built(recipe)
    met: dict[tuple[int, int], list[int]] = {}
    position = plan.start()
    shares = np.array([source.mix[UNIFIED] for source in plan.sources.values()])
    shares /= shares.sum()
    for _ in range(STEPS):
        restored = Position.from_json(json.loads(json.dumps(position.to_json())))
        step, after = plan.step(position)
        again, _ = recipe().step(restored)
        same(step, again)
        assert rows_of([step]) == rows_of([again])
        units = units_of(step)
        assert np.array_equal(np.unique(step.group), np.arange(len(units)))
        for source, passes, row in units:
            met.setdefault((source, passes), []).append(row)
        taken = [after.cursors[name][0] * len(source.order) + after.cursors[name][1]
                 for name, source in plan.sources.items()]  # fmt: skip
        # All datasets are within half a unit of their shares at one and the same place of the sequence.
        low, high = (np.array(taken) - 0.5) / shares, (np.array(taken) + 0.5) / shares
        assert low.max() <= high.min() + 1e-6
        assert np.abs(np.array(taken) - sum(taken) * shares).max() <= 1.25
        position = after
    for (number, passes), rows in met.items():
        source = [*plan.sources.values()][number]
        assert len(rows) == len(set(rows))
        assert np.all(source.lengths.tokens[rows] <= LONGEST)
        if (number, passes + 1) in met:
            assert len(rows) == len(source.order)


@hypothesis_settings(max_examples=40, deadline=None)
@given(recipe=recipes(), world=st.sampled_from(WORLDS), hidden=st.sampled_from([None, 32]))
def test_rows_do_not_depend_on_the_number_of_processes_and_bounds_hold(recipe, world, hidden):
    plan = built(recipe)
    ceiling, budget = plan.settings.micro_batch_tokens, plan.settings.global_batch_tokens
    name, task = plan.pairs[0]
    try:
        gas = accumulation(plan, world)
    except VlscaleError as error:
        if "more processes than" not in str(error):  # the ceiling holds any group of these
            raise
        gas = None
    for step, _ in walked(plan):
        groups = np.bincount(step.group, step.costs).astype(int)
        assert groups.max() <= plan.heaviest(name, task, 1)
        assert groups.sum() <= plan.heaviest(name, task, len(groups))
        assert groups.min() >= min(bound.least for bound in plan._unified.bounds.values())
        assert len(groups) <= plan.most_groups(name, task)
        if budget is not None:
            assert groups.sum() <= budget
        fitting = fitting_accumulation(step, world, ceiling, Rule(hidden_size=hidden))
        for micro_steps in {fitting} | ({gas} if gas else set()):
            dealt = deal(step, world, micro_steps, ceiling, Rule(hidden_size=hidden))
            pieces = [micro for hand in dealt for micro in hand if micro.weight]
            assert rows_of(pieces) == rows_of([step])
            assert max(micro.tokens for micro in pieces) <= ceiling
            assert sum(len(set(micro.group.tolist())) for micro in pieces) == len(groups)
            hand = deal_hand(step, world - 1, world, micro_steps, ceiling, Rule(hidden_size=hidden))
            assert rows_of(hand) == rows_of(dealt[world - 1])


@hypothesis_settings(max_examples=60, deadline=None)
@given(recipe=recipes())
def test_units_become_the_rows_that_they_should(recipe):
    plan = built(recipe)
    pairs, texts, _images = (source.lengths for source in plan.sources.values())
    wanted, rewrites, lists = plan.settings.views, pairs.beside.rewrites, pairs.beside.retrieved.lists
    step, _ = plan.step(plan.start())
    for group in range(int(step.group[-1]) + 1):
        at = np.flatnonzero(step.group == group)
        role, source, text, image = step.views.role[at], step.views.source[at], step.texts[at], step.images[at]
        assert np.all(np.diff(role) >= 0)
        assert len(set(zip(step.passes[at].tolist(), step.examples[at].tolist(), strict=True))) == 1
        row = int(step.examples[at[0]])
        if source[0] == 2:
            assert (role.tolist(), text.tolist(), image.tolist()) == ([Role.VISUAL], [-1], [row])
            continue
        own = int([pairs, texts][source[0]].first_image(np.array([row]))[0])
        assert text[0] == row
        assert image[0] == own
        assert (role[0] == Role.VISUAL) <= (own >= 0 and wanted.pair_visual_share > 0)
        if own < 0 or not wanted.contrast:
            assert len(at) == 1
            continue
        counts = np.bincount(role, minlength=len(Role))
        views = np.arange(*rewrites.ptr[[row, row + 1]])
        fits = rewrites.view_tokens[views] <= LONGEST
        for kind, number, says in ((Role.POSITIVE, wanted.positives, 1), (Role.NEGATIVE, wanted.negatives, 0)):
            usable = views[fits & (rewrites.view_positive[views] == says)]
            drawn = step.views.view[at][role == kind]
            assert counts[kind] == min(number, len(usable)) == len(set(drawn.tolist()))
            assert np.isin(drawn, usable).all()
            assert np.all(image[role == kind] == own)
        assert counts[Role.PAIR] == 1
        assert counts[Role.IMAGE] == counts[Role.TEXT] == wanted.alone
        assert np.all(step.views.view[at][(role != Role.POSITIVE) & (role != Role.NEGATIVE)] == -1)
        found = lists["images"][row]
        drawn = image[role == Role.RETRIEVED_IMAGE]
        assert len(set(drawn.tolist())) == min(wanted.images, len(found))
        assert np.isin(drawn, found).all()
        assert np.all(text[role == Role.RETRIEVED_IMAGE] == -1)
        assert np.all(source[role == Role.RETRIEVED_IMAGE] == 2)
        found = [one for one in lists["texts"][row] if texts.tokens[one] <= LONGEST]
        drawn = text[role == Role.RETRIEVED_TEXT]
        assert len(set(drawn.tolist())) == min(wanted.texts, len(found))
        assert np.isin(drawn, found).all()
        assert np.all(image[role == Role.RETRIEVED_TEXT] == -1)
        assert np.all(source[role == Role.RETRIEVED_TEXT] == 1)


def test_costs_count_text_image_and_room_for_fragments():
    plan = plan_of(views=ViewSettings(seq2seq_share=1.0))
    pairs, texts, images = (source.lengths for source in plan.sources.values())
    step, _ = plan.step(plan.start())
    views = step.views
    for row in range(len(step)):
        lengths = (pairs, texts, images)[views.source[row]]
        cost = 0
        if step.texts[row] >= 0:
            view = views.view[row]
            cost += 2 + (lengths.tokens[step.texts[row]] if view < 0 else pairs.beside.rewrites.view_tokens[view])
        if step.images[row] >= 0:
            cost += 1 + lengths.regions[step.images[row]]
        if views.role[row] == Role.SEQ2SEQ:
            quarter = -(-int(lengths.tokens[step.texts[row]]) // 4)
            cost += 2 * max(1, -(-quarter // 4))
        assert step.costs[row] == cost


def test_choices_change_with_the_pass_and_have_their_shares():
    lengths = three(own_images=60)
    plan = plan_of(lengths, shares=(1, 1, 1), global_batch_examples=3 * 2000)
    step, _ = plan.step(plan.start())
    first = np.r_[0, group_ends(step)[:-1]]
    mine = step.views.source[first] == 0
    role, passes, row = step.views.role[first][mine], step.passes[first][mine], step.examples[first][mine]
    share = np.bincount(role, minlength=3)[:3] / mine.sum()
    assert np.abs(share - [0.5, 0.25, 0.25]).max() < 4 * np.sqrt(0.25 / mine.sum())
    before = dict(zip(row[passes == 0].tolist(), role[passes == 0].tolist(), strict=True))
    changed = [
        before[one] != two for one, two in zip(row[passes == 1].tolist(), role[passes == 1].tolist(), strict=True)
    ]
    assert 0.4 < np.mean(changed) < 0.85


def test_merging_goes_on_wherever_it_stands_even_behind():
    shares = np.array([0.7, 0.2, 0.1])
    whole = merged(np.zeros(3, np.int64), shares, 500)
    assert np.bincount(whole).tolist() == [350, 100, 50]
    for cut in (1, 7, 250):
        taken = np.bincount(whole[:cut], minlength=3)
        assert np.array_equal(merged(taken, shares, 500 - cut), whole[cut:])
    behind = merged(np.array([1000, 0, 0]), shares, 100)
    assert set(behind.tolist()) == {1, 2}
    assert len(behind) == 100


def test_a_million_passes_on_the_mix_is_still_exact():
    shares, start = np.array([5, 1, 1]) / 7, 10**12
    taken = np.array([5, 1, 1]) * start
    assert np.bincount(merged(taken, shares, 7000)).tolist() == [5000, 1000, 1000]


def test_mix_repeat_and_choose_count_units():
    lengths = three()
    sizes = {"pairs": ("repeat", 2.0), "texts": ("choose", 40), "images": ("choose", 20)}
    settings = PlanSettings(seed=3, global_batch_examples=200, max_text_tokens=LONGEST)
    plan = Plan([(each, {UNIFIED: 3.0}) for each in lengths], settings, sizes=sizes)
    step, _ = plan.step(plan.start())
    first = np.r_[0, group_ends(step)[:-1]]
    weights = np.array([2 * plan.sources["pairs"].survey.total, 40, 20])
    assert np.abs(np.bincount(step.views.source[first]) - 200 * weights / weights.sum()).max() <= 1


def test_settings_of_a_recipe_without_contrast_want_no_views():
    section = UnifiedSection.model_validate({"contrast": {"weight": 0, "window": True}})
    found = ViewSettings.from_section(section)
    assert not found.contrast
    assert not found.alone
    assert (found.positives, found.negatives, found.images, found.texts) == (0, 0, 0, 0)


def test_left_out_texts_and_views_are_counted():
    lengths = three()
    plan = plan_of(lengths)
    assert plan.left_out == {each.name: int((each.tokens > LONGEST).sum()) for each in lengths}
    assert plan.left_out["pairs"]
    assert plan.left_out["texts"]
    assert not plan.left_out["images"]
    tokens = lengths[0].beside.rewrites.view_tokens
    assert plan.left_out_views == {"pairs": int((tokens > LONGEST).sum())}


def test_texts_longer_than_512_are_left_out_and_counted():
    texts = toy_texts()
    long = dataclasses.replace(texts, tokens=np.where(np.arange(30) % 3 == 0, 513, 512).astype(np.int32))
    plan = plan_of([long], max_text_tokens=512, global_batch_tokens=9000)
    assert plan.left_out == {"texts": 10}
    step, _ = plan.step(plan.start())
    assert np.all(step.examples % 3 > 0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"rewrites": None}, r"no ROOT/rewrites; run python -m data_tools\.rewrite_captions ROOT, or set"),
        ({"retrieved": None}, r"retrieved images are wanted, but .* no ROOT/retrieved; run .*build_retrieval ROOT"),
    ],
)
def test_a_missing_companion_is_named_with_its_tool(edit, message):
    pairs, texts, images = three()
    lacking = dataclasses.replace(pairs, beside=dataclasses.replace(pairs.beside, **edit))
    with pytest.raises(VlscaleError, match=message):
        plan_of([lacking, texts, images])
    plan_of([lacking, texts, images], views=ViewSettings(contrast=False, positives=0, negatives=0, images=0, texts=0))


def test_a_collection_that_the_recipe_lacks_is_named():
    pairs, _texts, images = three()
    with pytest.raises(
        VlscaleError, match=r"retrieved texts are rows of a store \(30 rows, index bbbbbbbbbbbb\) that no"
    ):
        plan_of([pairs, images], shares=(5, 1))
    plan_of([pairs, images], shares=(5, 1), views=ViewSettings(texts=0))


@pytest.mark.parametrize("mode", ["padded", "reference"])
def test_other_modes_are_refused(mode):
    unit = {"reference_batches": 4, "global_batch_tokens": None} if mode == "reference" else {}
    with pytest.raises(VlscaleError, match=r"set batch\.mode to packed"):
        plan_of([toy_texts()], mode=mode, **unit)


def test_unified_goes_with_no_other_task():
    settings = PlanSettings(seed=1, global_batch_tokens=4000)
    with pytest.raises(VlscaleError, match="task mlm cannot be trained beside task unified"):
        Plan([(toy_texts(), {UNIFIED: 1.0}), (toy_lengths(), {"mlm": 1.0})], settings)
    with pytest.raises(VlscaleError, match=r"dataset images: has no texts/, which task mlm needs"):
        Plan([(toy_images(), {"mlm": 1.0})], settings)


def test_budgets_below_one_group_are_refused():
    with pytest.raises(VlscaleError, match="smaller than one unit with all its views of dataset pairs"):
        plan_of(global_batch_tokens=60)
    plan = plan_of(micro_batch_tokens=60)
    with pytest.raises(VlscaleError, match=r"smaller than one unit with all its views .* the numbers of views"):
        accumulation(plan, 1)
    with pytest.raises(VlscaleError, match=r"more processes than examples in a step: 512 processes, .* units"):
        accumulation(plan_of(), 512)


def test_an_advice_for_the_batch_fills_it():
    plan = plan_of(micro_batch_tokens=2100)
    advice = fill_advice(plan, 1)
    assert advice
    assert "micro_batch_tokens" in advice


def test_evaluation_is_of_one_dataset_without_retrieved_views():
    pairs, texts, images = three()
    settings = PlanSettings(seed=3, global_batch_tokens=1500, max_text_tokens=LONGEST)
    for lengths, allowed in ((pairs, set(Role) - {Role.RETRIEVED_IMAGE, Role.RETRIEVED_TEXT}),
                             (texts, {Role.BIDIRECTIONAL, Role.SEQ2SEQ}), (images, {Role.VISUAL})):  # fmt: skip
        steps = evaluation_steps(lengths, UNIFIED, 15, settings)
        again = evaluation_steps(lengths, UNIFIED, 15, settings)
        for one, two in zip(steps, again, strict=True):
            same(one, two)
        assert {step.dataset for step in steps} == {lengths.name}
        found = [unit for step in steps for unit in units_of(step)]
        assert len(found) == len(set(found)) == 15
        assert {Role(role) for step in steps for role in step.views.role.tolist()} == allowed
        assert all(step.tokens <= 1500 for step in steps)
    bare = dataclasses.replace(pairs, beside=type(pairs.beside)())
    roles = {role for step in evaluation_steps(bare, UNIFIED, 15, settings) for role in step.views.role.tolist()}
    assert Role.POSITIVE not in roles
    assert Role.PAIR in roles
    counted = dataclasses.replace(settings, global_batch_tokens=None, global_batch_examples=4)
    assert [len(units_of(step)) for step in evaluation_steps(pairs, UNIFIED, 15, counted)] == [4, 4, 4, 3]


def test_a_twin_plans_the_same_steps():
    plan = plan_of()
    for (one, _), (two, _) in zip(walked(plan), walked(plan.twin()), strict=True):
        same(one, two)
        assert isinstance(two.views, Views)

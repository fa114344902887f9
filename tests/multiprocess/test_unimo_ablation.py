"""The ablation's variants: what each leaves out of the steps, and that all can be trained and evaluated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.bench.bench_unimo_ablation import COLUMNS, RECIPE, Setting, common, run, variants
from tests.unimo_demo import small_corpus
from vlscale.config import load_recipe
from vlscale.data.dataset import open_dataset
from vlscale.data.plan import Plan
from vlscale.data.views import Role


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    tiny = "model.config={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
    return Setting(str(small_corpus(tmp_path_factory)), steps=2, overrides=(tiny, "data.workers=0"))


def roles_of(setting: Setting, name: str) -> Counter[Role]:
    """Rows by role in the first five steps of a variant."""
    recipe = load_recipe(RECIPE, (*common(setting), *variants(setting)[name]))
    data = {section.name: open_dataset(section.name, Path(str(section.root))) for section in recipe.data.datasets}
    plan = Plan.from_recipe(recipe, data)
    found: Counter[Role] = Counter()
    for _, (step, _) in zip(range(5), plan.steps(plan.start()), strict=False):
        assert step.views is not None
        roles, counts = np.unique(step.views.role, return_counts=True)
        found.update({Role(role): int(count) for role, count in zip(roles, counts, strict=True)})
    return found


def test_each_variant_leaves_out_what_its_name_says(setting: Setting) -> None:
    full = roles_of(setting, "full")
    assert {*Role} - set(full) == {Role.POSITIVE}  # the demo has no translations
    retrieved = {Role.RETRIEVED_IMAGE, Role.RETRIEVED_TEXT}
    for name, gone in (
        ("without rewrites", {Role.NEGATIVE}),
        ("without retrieved", retrieved),
        ("without texts and images", retrieved),
    ):
        found = roles_of(setting, name)
        assert set(full) - set(found) == gone, name
        assert found[Role.PAIR] == pytest.approx(full[Role.PAIR], abs=5), name


@pytest.mark.long
@pytest.mark.multiprocess
def test_all_variants_run(setting: Setting) -> None:
    rows = run(setting)
    assert [row["variant"] for row in rows] == ["untrained", *variants(setting)]
    assert all(set(COLUMNS) <= set(row["metrics"]) for row in rows)
    assert all(0 <= row["metrics"]["i2t_r1"]["value"] <= 1 for row in rows)

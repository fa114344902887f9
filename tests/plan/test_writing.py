"""A recipe with another budget: the rest of the file stays, byte by byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlscale.config import load_recipe
from vlscale.errors import VlscaleError
from vlscale.plan.writing import check_overrides, with_tokens, write_budget

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_be_written(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "new.yaml"
    write_budget(path, target, 7777, overwrite=False)
    assert load_recipe(target) == load_recipe(path, ("batch.micro_batch_tokens=7777",))
    assert target.read_text().count("#") == path.read_text().count("#")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ("batch: {global_batch_tokens: 9, micro_batch_tokens: 5}\n", "micro_batch_tokens: 8}"),
        ("batch: {global_batch_tokens: 9}\n", "{micro_batch_tokens: 8, global"),
        ("batch:\n    global_batch_tokens: 9\nx: 1\n", "batch:\n    micro_batch_tokens: 8\n"),
        ("batch:\n  micro_batch_tokens: 5   # 5 are few\n", "micro_batch_tokens: 8   # 5 are few"),
        ("batch:\n  # micro_batch_tokens: 3\n  micro_batch_tokens: 5\n", ": 3\n  micro_batch_tokens: 8\n"),
    ],
)  # fmt: skip
def test_forms_of_the_section(batch: str, expected: str) -> None:
    assert expected in str(with_tokens(batch, 8))


def test_what_is_not_understood_is_left_alone(tmp_path: Path) -> None:
    odd, target = tmp_path / "odd.yaml", tmp_path / "out.yaml"
    text = (ROOT / "launch/recipes/demo.yaml").read_text()
    odd.write_text(text.replace("batch:\n", '"batch":\n'))
    with pytest.raises(VlscaleError, match="by hand"):
        write_budget(odd, target, 8, overwrite=False)
    target.write_text("mine")
    with pytest.raises(VlscaleError, match="exists"):
        write_budget(odd, target, 8, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.yaml", "out.yaml"]
    assert target.read_text() == "mine"


@pytest.mark.parametrize(
    "override",
    ["model.config.hidden_size=256", "batch.mode=packed", "activation_checkpointing=full",
     "data.datasets.0.mix={mlm: 1}", "data.max_regions=3", "optimizer={lr: 1}"],
)  # fmt: skip
def test_a_budget_found_under_overrides_that_the_file_lacks_is_refused(override: str) -> None:
    with pytest.raises(VlscaleError, match="which the file does not say") as caught:
        check_overrides(("schedule.total_steps=9", override))
    assert f"--set {override}," in str(caught.value)


def test_overrides_that_change_no_budget_are_no_matter() -> None:
    check_overrides(("data.datasets.0.root=/elsewhere", "data.workers=0", "schedule.total_steps=9", "seed=3"))

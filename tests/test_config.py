"""Recipes: every mistake is one line that names the key and the cure."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlscale.config import load_recipe, parse_recipe, resolved
from vlscale.errors import VlscaleError

DEMO = Path(__file__).resolve().parents[1] / "launch/recipes/demo.yaml"

RECIPES = sorted(Path("launch/recipes").glob("*.yaml"))
MINIMAL = {
    "name": "tiny",
    "model": {"config": {"hidden_size": 8}},
    "data": {"datasets": [{"name": "a", "root": "somewhere", "mix": {"mlm": 1}}]},
    "batch": {"global_batch_tokens": 100},
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup_steps": 1, "total_steps": 10},
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_is_named_after_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_overrides_reach_sections_lists_and_scientific_numbers(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file, ("optimizer.lr=1e-4", "data.datasets.0.root=other", "objectives.wra.loss=hinge", "seed=7")
    )
    assert recipe.optimizer.lr == 1e-4
    assert recipe.data.datasets[0].root == Path("other")
    assert recipe.objectives.wra.loss == "hinge"
    assert recipe.seed == 7


def test_words_that_yaml_1_1_takes_for_booleans_stay_words(recipe_file: Path) -> None:
    mlm = "objectives.mlm={content_probability: 0.5, function_words: [on, no, y]}"
    recipe = load_recipe(recipe_file, ("objectives.wra.loss=off", mlm))
    assert recipe.objectives.wra.loss == "off"
    assert recipe.objectives.mlm.function_words == ("on", "no", "y")
    assert load_recipe(recipe_file, ("data.verify=false",)).data.verify is False


def test_the_resolved_recipe_reads_back_equal(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert parse_recipe(resolved(recipe), "again") == recipe


def test_a_recipe_is_frozen(recipe_file: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load_recipe(recipe_file).seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", r"unknown key 'optimizer.lrr'; did you mean 'lr'\?"),
        ("optimiser.lr=1", r"unknown key 'optimiser'; did you mean 'optimizer'\?"),
        ("data.datasets.0.rot=x", r"did you mean 'root'\?"),
        ("data.datasets.0.mix.mlmm=1", r"mix\.mlmm.*did you mean 'mlm'\?"),
        ("objectives.wra.loss=hing", r"objectives\.wra\.loss.*found 'hing'; did you mean 'hinge'\?"),
        ("objectives.mlm.probability=1.5", r"objectives\.mlm\.probability.*less than or equal to 1.*1\.5"),
        ("objectives.mlm.function_words=[a]", "no effect without content_probability"),
        ("schedule.warmup_steps=100", "warmup_steps 100 exceeds total_steps 10"),
        ("batch.global_batch_examples=4", "exactly one of"),
        ("activation_checkpointing=every 0", "activation_checkpointing"),
        ("data.datasets.0.mix.mlm=0", "no task has a positive share"),
        ("optimizer", "expected KEY.KEY=VALUE"),
        ("name.x.y=1", "name is not a section"),
        ("name=../../etc", "name"),
        ("name=..", "name"),
        ("name=2020-13-45", "not valid YAML"),
        ("name=" + "[" * 5000, "not valid YAML"),
        ("data.datasets.².root=x", "data.datasets is not a section"),
        ("optimizer.lr=.inf", r"optimizer\.lr.*finite"),
        ("data.datasets.0.mix.mlm=.inf", r"mix\.mlm.*finite"),
        ("optimizer.betas=[0.9, 1.0]", r"optimizer\.betas\.1.*less than 1"),
    ],
)
def test_mistakes_are_named(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(VlscaleError, match=message) as caught:
        load_recipe(recipe_file, (override,))
    assert "\n" not in str(caught.value)


UNIFIED = ("model.name=unimo", "data.datasets.0.mix={unified: 1}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (UNIFIED[1:], r"uniter does not train task unified \(it trains mlm, .*\): set model.name to unimo"),
        (UNIFIED[:1], r"unimo does not train task mlm \(it trains unified\): set model.name to uniter"),
        ((UNIFIED[0], "data.datasets.0.mix={unified: 1, itm: 1}"), "unimo does not train task itm"),
        ((*UNIFIED, "batch.mode=padded"), "batch.mode padded does not go with task unified"),
        (
            (*UNIFIED, "objectives.unified.contrast.window=true", "loss_normalization=reference"),
            "loss_normalization reference does not go with objectives.unified.contrast.window",
        ),
        ((*UNIFIED, "objectives.unified.contrast.negatives=0"), "positives alone, so its loss would be constant"),
        ((*UNIFIED, "objectives.unified.contrast.wieght=0"), r"unknown key 'objectives.*did you mean 'weight'"),
        ((*UNIFIED, "objectives.unified.language.longest_fragment=3"), "shortest_fragment 4 exceeds"),
        ((*UNIFIED, "objectives.unified.visual.background_class=0"), "labels: hard only"),
        ((*UNIFIED, "objectives.unified.visual.labels=sft"), "did you mean 'soft'"),
        (
            (*UNIFIED, "objectives.unified={contrast: {weight: 0}, visual: {feature_weight: 0, class_weight: 0}, "
             "language: {bidirectional_weight: 0, seq2seq_weight: 0}}"),
            "every weight is 0",
        ),
        ((*UNIFIED, "optimizer.rule=padle"), "did you mean 'paddle'"),
        ((*UNIFIED, "schedule.kind=padle"), "did you mean 'paddle'"),
    ],
)  # fmt: skip
def test_mistakes_of_unified_recipes_are_named(recipe_file: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(VlscaleError, match=message) as caught:
        load_recipe(recipe_file, overrides)
    assert "\n" not in str(caught.value)
    assert "recipe: " not in str(caught.value)


def test_means_of_means_go_without_a_window(recipe_file: Path) -> None:
    unified = (*UNIFIED, "loss_normalization=reference")
    for more in ((), ("objectives.unified.contrast={window: true, weight: 0}",)):
        assert load_recipe(recipe_file, (*unified, *more)).loss_normalization == "reference"


@pytest.mark.parametrize("more", [("window=true", "negatives=0"), ("weight=0", "negatives=0"), ("negatives=1",)])
def test_a_contrast_that_can_be_learnt_loads(recipe_file: Path, more: tuple[str, ...]) -> None:
    recipe = load_recipe(recipe_file, (*UNIFIED, *(f"objectives.unified.contrast.{each}" for each in more)))
    assert recipe.tasks == ("unified",)
    assert parse_recipe(resolved(recipe), "again") == recipe


@pytest.mark.parametrize(
    "content", ["- a\n- b\n", "", "a: [1", "!!python/object:os.system {}", "a: 2020-13-45", "[" * 50_000]
)
def test_files_that_are_no_recipe(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(VlscaleError, match=r"recipe .*bad\.yaml"):
        load_recipe(path)


def test_a_key_that_stands_twice_is_refused(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "batch: {global_batch_tokens: 5}\n")
    with pytest.raises(VlscaleError, match="key 'batch' stands twice"):
        load_recipe(recipe_file)


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(VlscaleError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"a" * (1 << 21))
    with pytest.raises(VlscaleError, match="not a recipe"):
        load_recipe(large)


def test_repeated_dataset_names_are_refused() -> None:
    twice = {**MINIMAL, "data": {"datasets": MINIMAL["data"]["datasets"] * 2}}  # type: ignore[index]
    with pytest.raises(VlscaleError, match="names repeat"):
        parse_recipe(twice, "here")


def test_a_root_is_a_folder_or_a_url_and_a_url_needs_a_cache(recipe_file) -> None:
    remote = ("data.datasets.0.root=s3://bucket/data",)
    with pytest.raises(VlscaleError, match=r"its root is a remote; set data\.cache"):
        load_recipe(recipe_file, remote)
    recipe = load_recipe(recipe_file, (*remote, "data.cache=cache", "data.cache_limit=1.5 GiB"))
    assert recipe.data.datasets[0].root == "s3://bucket/data"
    assert recipe.data.cache == Path("cache")
    assert recipe.data.cache_limit == 3 << 29
    assert parse_recipe(resolved(recipe), "x") == recipe
    assert load_recipe(recipe_file, ("data.datasets.0.root=a:b/c",)).data.datasets[0].root == Path("a:b/c")


@pytest.mark.parametrize(
    ("value", "found"), [("64gb", 64 * 10**9), ("10", 10), ("null", None), ("2MiB", 2 << 20), ("5kb", 5000)]
)
def test_a_cache_limit_has_units(recipe_file, value, found) -> None:
    assert load_recipe(recipe_file, ("data.cache=c", f"data.cache_limit={value}")).data.cache_limit == found


@pytest.mark.parametrize("value", ["much", "64 parsecs", "-1", "0", "1e9gb"])
def test_a_cache_limit_that_is_no_size_is_refused(recipe_file, value) -> None:
    with pytest.raises(VlscaleError, match=r"data\.cache_limit: "):
        load_recipe(recipe_file, (f"data.cache_limit={value}",))


def test_keys_without_effect_and_datasets_without_a_task_are_refused(tmp_path):
    recipe = yaml.safe_load(DEMO.read_text())
    for change, says in (
        ({"cache_limit": "1gb"}, "cache_limit has no effect without data.cache"),
        ({"download_retries": 9}, "download_retries has no effect without data.cache"),
        ({"datasets": [*recipe["data"]["datasets"], {"name": "b", "root": "b"}]}, "dataset b: no task has a positive"),
        (
            {"datasets": [*recipe["data"]["datasets"], {"name": "b", "root": "b", "repeat": 3}]},
            "dataset b: no task has a positive share, so nothing would be trained on it",
        ),
    ):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, "data": {**recipe["data"], **change}}))
        with pytest.raises(VlscaleError, match=says) as error:
            load_recipe(path)
        assert "\n" not in str(error.value)


def test_a_recipe_with_every_default_written_out_loads_again(tmp_path):
    recipe = load_recipe(DEMO)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(path) == recipe


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(DEMO, ["data.cache=~/cache", "data.datasets.0.root=~/data"])
    assert recipe.data.cache == tmp_path / "cache"
    assert recipe.data.datasets[0].root == tmp_path / "data"

"""The DeepSpeed JSON: unknown keys, numbers against the plan, precision against the machine, names against recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlscale.errors import VlscaleError
from vlscale.train import ds_config
from vlscale.train.ds_config import check_machine, find_recipe, read_ds_config, resolve_ds_config

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))


def read(tmp_path: Path, content: Any) -> ds_config.DeepSpeedSettings:
    path = tmp_path / "model_cluster.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return read_ds_config(path)


def resolve(settings: ds_config.DeepSpeedSettings, examples: int | None = None) -> dict[str, Any]:
    return resolve_ds_config(settings, 3, 4, examples)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_valid_and_belong_to_a_recipe(path: Path) -> None:
    settings = read_ds_config(path)
    found = find_recipe(path, ROOT / "launch" / "recipes")
    assert path.stem.startswith(found.stem)
    config = resolve(settings)
    assert config["gradient_accumulation_steps"] == 3
    assert settings.clip > 0 or found.stem.endswith("_vcr"), "only VCR's second stage was published without a clip"
    assert (settings.precision == "fp16") == path.stem.endswith("v100")
    assert settings.precision == "fp32" or config["data_types"]["grad_accum_dtype"] == "fp32"


def test_there_are_shipped_files() -> None:
    assert {path.stem for path in SHIPPED} >= {"demo_cpu", "uniter_base_v100", "uniter_large_v100"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gradient_cliping": 1.0}, r"unknown key 'gradient_cliping'; did you mean 'gradient_clipping'"),
        ({"zero_optimisation": {}}, r"did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stge": 2}}, r"unknown key zero_optimization.stge; did you mean 'stage'"),
        ({"fp16": {"enable": True}}, r"unknown key fp16.enable; did you mean 'enabled'"),
        ({"bf16": {"enabeld": True}}, r"did you mean 'enabled'"),
        ({"activation_checkpointing": {"partition_activation": True}}, r"did you mean 'partition_activations'"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, r"has no effect"),
        ({"optimizer": {"type": "AdamW"}}, r"optimizer: the recipe owns it: remove the block"),
        ({"scheduler": {}}, r"scheduler: the recipe owns it"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, r"offloading is not supported"),
        ({"zero_optimization": {"stage": 4}}, r"expected 0, 1, 2 or 3, found 4"),
        ({"zero_optimization": {"stage": "2"}}, r"expected 0, 1, 2 or 3, found '2'"),
        ({"zero_optimization": []}, r"zero_optimization: expected an object"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, r"reduce_bucket_size: expected a number of elements"),
        ({"gradient_clipping": -1}, r"gradient_clipping: expected a number >= 0, found -1"),
        ({"gradient_clipping": "1"}, r"gradient_clipping: expected a number"),
        ({"fp16": {"enabled": "auto"}}, r"fp16.enabled: expected true or false, found 'auto'"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, r"fp16 and bf16 are both enabled"),
        ({"fp16": {"enabled": True}}, r"fp16 needs zero_optimization.stage 1, 2 or 3"),
        ({"zero_allow_untested_optimizer": False}, r"must be true"),
        ('{"gradient_clipping": 1, "gradient_clipping": 2}', r"key 'gradient_clipping' stands twice"),
        ("{", r"not valid JSON"),
        ("[1]", r"expected an object, found list"),
        ("[" * 100_000, r"not valid JSON"),
        (" " * (ds_config.MAX_BYTES + 1), r"this is not a DeepSpeed JSON"),
    ],
)
def test_mistakes_are_named_with_their_cure(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(VlscaleError, match=message) as caught:
        read(tmp_path, content)
    assert "model_cluster.json" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VlscaleError, match=r"nothing.json: cannot be read"):
        read_ds_config(tmp_path / "nothing.json")


def test_auto_and_missing_numbers_are_filled_in(tmp_path: Path) -> None:
    config = resolve(read(tmp_path, {"train_batch_size": "auto", "zero_optimization": {"stage": 2}}))
    sizes = [config[key] for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    assert sizes == [1, 3]
    assert config["train_batch_size"] == 12
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_optimization"]["reduce_bucket_size"] == ds_config.BUCKET_ELEMENTS


def test_stated_values_stay(tmp_path: Path) -> None:
    raw = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
        "steps_per_print": 7,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "bf16"},
    }
    settings = read(tmp_path, raw)
    config = resolve(settings)
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000, "allgather_bucket_size": 25_000_000}
    assert config["steps_per_print"] == 7
    assert config["data_types"] == {"grad_accum_dtype": "bf16"}
    assert settings.raw["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}, "the input was changed"


@pytest.mark.parametrize(
    ("key", "value", "examples", "message"),
    [
        ("gradient_accumulation_steps", 2, None, r"is 2, which contradicts the plan: .* needs 3 at 4 processes"),
        ("train_batch_size", 64, None, r"the recipe measures steps in tokens"),
        ("train_batch_size", 64, 48, r"the recipe's batch makes it 48"),
        ("train_micro_batch_size_per_gpu", 8, None, r"micro-batches vary"),
        ("train_micro_batch_size_per_gpu", 8, 48, r"the recipe's batch makes it 4"),
        ("gradient_accumulation_steps", "3", None, r'expected "auto" or a positive number'),
        ("train_batch_size", True, 1, r'expected "auto" or a positive number'),
    ],
)
def test_a_number_that_contradicts_the_plan_is_refused(
    tmp_path: Path, key: str, value: Any, examples: int | None, message: str
) -> None:
    with pytest.raises(VlscaleError, match=message):
        resolve(read(tmp_path, {key: value}), examples)


def test_a_number_that_agrees_with_the_plan_is_taken(tmp_path: Path) -> None:
    raw = {"gradient_accumulation_steps": 3, "train_batch_size": 48, "train_micro_batch_size_per_gpu": 4}
    assert resolve(read(tmp_path, raw), 48)["train_batch_size"] == 12  # DeepSpeed's own count: one per micro-batch


def test_precision_is_checked_against_the_machine(tmp_path: Path) -> None:
    fp16 = read(tmp_path, {"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    with pytest.raises(VlscaleError, match=r"fp16 is enabled, but this runs on a CPU"):
        check_machine(fp16, "cpu", None)
    check_machine(fp16, "cuda", (7, 0))
    bf16 = read(tmp_path, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    with pytest.raises(VlscaleError, match=r"bf16 is enabled, but this GPU \(compute capability 7.0\)"):
        check_machine(bf16, "cuda", (7, 0))
    check_machine(bf16, "cuda", (8, 0))
    check_machine(bf16, "cpu", None)


def test_the_longest_name_finds_the_recipe(tmp_path: Path) -> None:
    for name in ("uniter", "uniter_large"):
        (tmp_path / f"{name}.yaml").touch()
    assert find_recipe(Path("x/uniter_large_v100.json"), tmp_path).stem == "uniter_large"
    assert find_recipe(Path("uniter_cpu.json"), tmp_path).stem == "uniter"
    assert find_recipe(Path("uniter_large_16_v100.json"), tmp_path).stem == "uniter_large"
    for unknown in ("unitr_v100.json", "uniter.json"):
        with pytest.raises(VlscaleError, match=r"name one with --recipe \(in .*: uniter, uniter_large\)"):
            find_recipe(Path(unknown), tmp_path)


def test_the_known_keys_are_those_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": precision.DeepSpeedFP16Config,
        "bf16": precision.DeepSpeedBF16Config,
    }
    for section, kind in kinds.items():
        names = {field.alias or name for name, field in kind.model_fields.items()}
        assert ds_config._SECTIONS[section] == names, section
    assert ds_config._SECTIONS["activation_checkpointing"] == set(ACT_CHKPT_DEFAULT)
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    sections = {"activation_checkpointing", "flops_profiler", "comms_logger", "csv_monitor", "wandb", "comet", "aio"}
    elsewhere = {*sections, "tensorboard", "timers", "zero_optimization", "fp16", "bf16"}
    assert known | elsewhere >= ds_config.KNOWN_KEYS

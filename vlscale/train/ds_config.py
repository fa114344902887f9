"""The DeepSpeed JSON: read strictly, checked against the plan and the machine, its ``"auto"`` numbers filled in.

The JSON owns ZeRO, precision, communication and clipping; the recipe owns everything that decides what is learnt. This
module imports no deepspeed: the keys that DeepSpeed knows stand here as data, and a test compares them with it.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlscale.errors import VlscaleError, nearest
from vlscale.untrusted import unique_keys

MAX_BYTES = 1 << 20
AUTO = "auto"
BUCKET_ELEMENTS = 25_000_000
"""Bucket size where the JSON states none: 50 MB in half precision. DeepSpeed's default of 5e8 takes 1-2 GB per rank."""

Precision = Literal["fp32", "fp16", "bf16"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_SECTIONS: dict[str, frozenset[str]] = {
    "zero_optimization": _words("""
        stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload cpu_offload_param
        cpu_offload_use_pin_memory stage3_prefetch_bucket_size stage3_param_persistence_threshold
        stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
        stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
        stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential
        ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size
        zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
        pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
        save_muon_momentum_buffer_in_memory leaf_module
    """),
    "fp16": _words("""
        enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads
    """),
    "bf16": _words("""
        enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states
    """),
    "activation_checkpointing": _words("""
        partition_activations number_checkpoints contiguous_memory_optimization cpu_checkpointing profile
        synchronize_checkpoint_boundary
    """),
    "data_types": _words("grad_accum_dtype param_dtype buffer_dtype"),
}
_FREE_KEYS = _words("""
    zero_allow_untested_optimizer steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level
    gradient_clipping prescale_gradients gradient_predivide_factor communication_data_type disable_allgather
    seq_parallel_communication_data_type comms_logger flops_profiler tensorboard wandb csv_monitor comet aio
    checkpoint disable_python_gc timers
""")
KNOWN_KEYS = frozenset([*_BATCH_KEYS, *_SECTIONS, *_FREE_KEYS])

_RECIPE_OWNS = "the recipe owns it"
_REFUSED: dict[str, str] = {
    "optimizer": f"{_RECIPE_OWNS}: remove the block and set the recipe's optimizer section",
    "scheduler": f"{_RECIPE_OWNS}: remove the block and set the recipe's schedule section",
    "torch_autocast": "precision is set by the fp16 or bf16 block: remove it",
    "amp": "precision is set by the fp16 or bf16 block: remove it",
    "data_efficiency": "the plan decides what is read: remove it",
    "curriculum_learning": "the plan decides what is read: remove it",
    "managed_gradient_accumulation": "accumulation is derived from the recipe: remove it",
    "gradient_allreduce_op": "losses are scaled for the mean over ranks: remove it",
    "zero_force_ds_cpu_optimizer": "offloading is not supported: remove it",
}
_REFUSED_IN_ZERO: dict[str, str] = {
    key: "offloading is not supported: the models here fit without; raise the stage instead"
    for key in ("offload_param", "offload_optimizer", "cpu_offload", "cpu_offload_param", "zenflow")
}
_NO_EFFECT = "has no effect: the recipe's activation_checkpointing uses PyTorch's; remove the block"


@dataclass(frozen=True)
class DeepSpeedSettings:
    """A DeepSpeed JSON that has been read and checked by itself, not yet against plan and machine.

    Attributes:
        path: where it was read from.
        raw: its content.
    """

    path: Path
    raw: dict[str, Any]

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return int(self.raw.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> Precision:
        """What weights and activations are kept in; fp32 where neither block is enabled."""
        for kind in ("fp16", "bf16"):
            if self.raw.get(kind, {}).get("enabled", False):
                return kind
        return "fp32"

    @property
    def clip(self) -> float:
        """Largest global gradient norm; 0 does not clip."""
        return float(self.raw.get("gradient_clipping", 0.0))


def read_ds_config(path: Path) -> DeepSpeedSettings:
    """Read a DeepSpeed JSON.

    Raises:
        VlscaleError: missing, too large, not JSON, a key twice, an unknown key (the nearest is named), a block that the
            recipe owns, a value of the wrong kind, or settings that do not go together.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise VlscaleError(f"{path}: more than {MAX_BYTES} bytes: this is not a DeepSpeed JSON")
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise VlscaleError(
            f"{path}: cannot be read ({error.strerror}); give --ds_config ds_configs/NAME.json"
        ) from None
    except VlscaleError as error:
        raise VlscaleError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    except (ValueError, RecursionError) as error:
        raise VlscaleError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise VlscaleError(f"{path}: expected an object, found {type(raw).__name__}")
    _check_keys(path, raw)
    settings = DeepSpeedSettings(path, raw)
    _check_values(settings)
    return settings


def resolve_ds_config(
    settings: DeepSpeedSettings, accumulation: int, world_size: int, global_batch_examples: int | None
) -> dict[str, Any]:
    """Fill in what only the plan knows, and refuse numbers that contradict it.

    Args:
        settings: the JSON.
        accumulation: micro-steps per optimiser step, derived from the recipe.
        world_size: number of processes.
        global_batch_examples: the recipe's, or None where steps are measured in tokens.

    Returns:
        The configuration for ``deepspeed.initialize``, a new dictionary.

    Raises:
        VlscaleError: a number contradicts the plan.
    """
    config = copy.deepcopy(settings.raw)
    _check_batch(settings, accumulation, world_size, global_batch_examples)
    # DeepSpeed counts examples per micro-batch; ours vary, so one "example" stands for a whole micro-batch.
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = accumulation
    config["train_batch_size"] = accumulation * world_size
    config["zero_allow_untested_optimizer"] = True
    config.setdefault("steps_per_print", 1 << 30)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(key, BUCKET_ELEMENTS)
    if settings.precision != "fp32":
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    return config


def find_recipe(ds_config: Path, recipes: Path) -> Path:
    """Return the recipe that a JSON named ``<model>_<cluster>.json`` trains: ``recipes/<model>.yaml``.

    Parts of the name are dropped from its end until a recipe is found, so the longest match wins.

    Raises:
        VlscaleError: there is none; the recipes are listed.
    """
    parts = ds_config.stem.split("_")
    for length in range(len(parts) - 1, 0, -1):
        path = recipes / f"{'_'.join(parts[:length])}.yaml"
        if path.is_file():
            return path
    known = sorted(path.stem for path in recipes.glob("*.yaml"))
    raise VlscaleError(
        f"{ds_config}: no recipe belongs to this name (<model>_<cluster>.json){nearest(ds_config.stem, known)}; "
        f"name one with --recipe (in {recipes}: {', '.join(known) or 'none'})"
    )


def _check_keys(path: Path, raw: dict[str, Any]) -> None:
    for key, value in raw.items():
        if key in _REFUSED:
            raise VlscaleError(f"{path}: {key}: {_REFUSED[key]}")
        if key not in KNOWN_KEYS:
            raise VlscaleError(f"{path}: unknown key {key!r}{nearest(key, KNOWN_KEYS)}")
        known = _SECTIONS.get(key)
        if known is None:
            continue
        if not isinstance(value, dict):
            raise VlscaleError(f"{path}: {key}: expected an object, found {value!r}")
        for inner in value:
            if inner not in known:
                raise VlscaleError(f"{path}: unknown key {key}.{inner}{nearest(inner, known)}")
            if key == "zero_optimization" and inner in _REFUSED_IN_ZERO:
                raise VlscaleError(f"{path}: {key}.{inner}: {_REFUSED_IN_ZERO[inner]}")
            if key == "activation_checkpointing" and value[inner] not in (False, None):
                raise VlscaleError(f"{path}: {key}.{inner} {_NO_EFFECT}")


def _check_values(settings: DeepSpeedSettings) -> None:
    path, raw = settings.path, settings.raw
    for kind in ("fp16", "bf16"):
        enabled = raw.get(kind, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            raise VlscaleError(f"{path}: {kind}.enabled: expected true or false, found {enabled!r}")
    if all(raw.get(kind, {}).get("enabled", False) for kind in ("fp16", "bf16")):
        raise VlscaleError(f"{path}: fp16 and bf16 are both enabled; enable one")
    stage = raw.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise VlscaleError(f"{path}: zero_optimization.stage: expected 0, 1, 2 or 3, found {stage!r}")
    clip = raw.get("gradient_clipping", 0.0)
    if type(clip) not in (int, float) or not 0 <= clip < float("inf"):
        raise VlscaleError(f"{path}: gradient_clipping: expected a number >= 0, found {clip!r}")
    if raw.get("zero_allow_untested_optimizer", True) is not True:
        raise VlscaleError(f"{path}: zero_allow_untested_optimizer must be true: the recipe owns the optimiser")
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        size = raw.get("zero_optimization", {}).get(key, BUCKET_ELEMENTS)
        if type(size) not in (int, float) or size < 1:
            raise VlscaleError(f"{path}: zero_optimization.{key}: expected a number of elements, found {size!r}")
    if settings.precision != "fp32" and stage == 0:
        raise VlscaleError(
            f"{path}: {settings.precision} needs zero_optimization.stage 1, 2 or 3: at stage 0 DeepSpeed neither "
            f"scales the loss nor accumulates in fp32; stage 1 does the same work with less memory"
        )


def check_machine(settings: DeepSpeedSettings, accelerator: str, capability: tuple[int, int] | None) -> None:
    """Refuse a precision that the machine does not have.

    Args:
        settings: the JSON.
        accelerator: ``cpu`` or ``cuda``.
        capability: compute capability of the GPU; None on a CPU.

    Raises:
        VlscaleError: fp16 on a CPU, or bf16 on a GPU older than Ampere.
    """
    path, precision = settings.path, settings.precision
    if precision == "fp16" and accelerator == "cpu":
        raise VlscaleError(
            f"{path}: fp16 is enabled, but this runs on a CPU, which DeepSpeed does not train in fp16; set "
            f"fp16.enabled to false (fp32) or use bf16, or start on a machine with GPUs"
        )
    if precision == "bf16" and capability is not None and capability < (8, 0):
        raise VlscaleError(
            f"{path}: bf16 is enabled, but this GPU (compute capability {capability[0]}.{capability[1]}) has none; use "
            f'"fp16": {{"enabled": true}}, or a GPU of the Ampere generation or later'
        )


def _check_batch(
    settings: DeepSpeedSettings, accumulation: int, world_size: int, global_batch_examples: int | None
) -> None:
    stated = {}
    for key in _BATCH_KEYS:
        value = settings.raw.get(key, AUTO)
        if value != AUTO:
            if type(value) is not int or value < 1:
                raise VlscaleError(f'{settings.path}: {key}: expected "auto" or a positive number, found {value!r}')
            stated[key] = value
    derived: dict[str, tuple[int | None, str]] = {
        "gradient_accumulation_steps": (
            accumulation,
            f"the recipe's batch needs {accumulation} at {world_size} processes",
        ),
        "train_batch_size": (global_batch_examples, _size_reason("", global_batch_examples)),
    }
    micro = None
    if global_batch_examples is not None and global_batch_examples % (accumulation * world_size) == 0:
        micro = global_batch_examples // (accumulation * world_size)
    derived["train_micro_batch_size_per_gpu"] = (micro, _size_reason("micro-batches vary; ", micro))
    for key, value in stated.items():
        expected, reason = derived[key]
        if value != expected:
            raise VlscaleError(
                f'{settings.path}: {key} is {value}, which contradicts the plan: {reason}; write "auto", or change the '
                f"recipe's batch section"
            )


def _size_reason(prefix: str, examples: int | None) -> str:
    if examples is not None:
        return f"the recipe's batch makes it {examples}"
    return f"{prefix}their size is the recipe's, in tokens" if prefix else "the recipe measures steps in tokens"

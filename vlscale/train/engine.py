"""The engine: the only module that imports deepspeed, and the guards against what it does behind one's back.

DeepSpeed is imported when a run connects, because it reads ``DS_ACCELERATOR`` while it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlscale.errors import VlscaleError
from vlscale.train.environment import check_compiler, stand_alone
from vlscale.train.loss_scale import TaskLossScales
from vlscale.train.network import choose_interface
from vlscale.train.options import JOIN_TIMEOUT_S
from vlscale.train.processes import Processes
from vlscale.train.roll_call import host_name, own_note, roll_call

STALE_GRADIENTS_CHECKED = ("0.19",)
"""DeepSpeed versions (major.minor) whose ZeRO-3 gradient buffer has been read and tested."""


def connect(
    accelerator: str, timeout_s: float = 1800.0, program: str = "vlscale", join_timeout_s: float = JOIN_TIMEOUT_S
) -> Processes:
    """Join the other processes of this run; a single process needs no launcher.

    Args:
        accelerator: see :func:`vlscale.train.environment.choose_accelerator`.
        timeout_s: how long a collective may wait for the others.
        program: name that errors are printed under.
        join_timeout_s: how long the others may take to start; see :func:`vlscale.train.roll_call.roll_call`.

    Raises:
        VlscaleError: ninja, the compiler or this process's GPU is missing, or the roll call failed.
    """
    # Overrides even an explicit weights_only=False, which DeepSpeed passes: a checkpoint is not a program.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    stand_alone()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator == "cpu":
        check_compiler()
    elif local_rank >= torch.cuda.device_count():
        raise VlscaleError(
            f"local rank {local_rank}, but this machine has {torch.cuda.device_count()} GPUs; lower --num_gpus"
        )
    else:
        torch.cuda.set_device(local_rank)
    choose_interface()
    with _met(program, join_timeout_s) as hosts:
        import deepspeed

        deepspeed.utils.logger.setLevel("ERROR")
        _allow_checkpoint_types()
        deepspeed.init_distributed(timeout=timedelta(seconds=timeout_s), verbose=False)
    if accelerator == "cpu":
        _unlink_shared_buffers()
    group = None if accelerator == "cpu" else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    where = torch.device("cpu") if accelerator == "cpu" else torch.device("cuda", local_rank)
    return Processes(dist.get_rank(), dist.get_world_size(), where, group, program, hosts)


@contextmanager
def _met(program: str, timeout_s: float) -> Iterator[list[str]]:
    """Meet the other processes; yields the host of each rank. See :func:`vlscale.train.roll_call.roll_call`."""
    world_size = int(os.environ["WORLD_SIZE"])
    if dist.is_initialized():  # by the caller: they have met
        hosts = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, host_name())
        yield hosts
    elif world_size == 1:
        yield [host_name()]
    else:
        with roll_call(int(os.environ["RANK"]), world_size, own_note(), timeout_s, program) as hosts:
            yield hosts


def _unlink_shared_buffers() -> None:
    """Take the names of DeepSpeed's shared-memory buffers (66 MiB per process) off /dev/shm.

    On a CPU every process of a machine maps the buffers of all others while it connects; from then on nobody needs
    their names, and DeepSpeed never removes them. Memory without a name goes when its last process goes.
    """
    dist.barrier()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        port = os.environ["MASTER_PORT"]
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
            buffer.unlink(missing_ok=True)


def _allow_checkpoint_types() -> None:
    """Name the few classes, all of them plain records, that DeepSpeed's own checkpoints hold."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


@contextmanager
def construction(config: dict[str, Any]) -> Iterator[None]:
    """Build a model inside: at ZeRO stage 3 each parameter is partitioned as soon as it exists."""
    if config["zero_optimization"]["stage"] < 3:
        with nullcontext():
            yield
        return
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config):
        yield


def is_partitioned(module: nn.Module) -> bool:
    """Whether the parameters were partitioned while they were constructed (ZeRO stage 3)."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters they are named after, also where those are partitioned.

    All processes have to call it with the same names.
    """
    named = dict(module.named_parameters())
    for name, tensor in state.items():
        with _writable(named[name]), torch.no_grad():
            named[name].copy_(tensor)


def _writable(parameter: nn.Parameter) -> Any:
    """Gather a partitioned parameter for the length of a block; what rank 0 writes then is everybody's."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def share_parameters(pairs: list[tuple[nn.Module, Tensor]]) -> None:
    """Tell ZeRO-3 which modules read parameters that another module owns (tied heads); no effect otherwise."""
    for module, parameter in pairs:
        if hasattr(parameter, "ds_id"):
            import deepspeed

            deepspeed.zero.register_external_parameter(module, parameter)


@dataclass(frozen=True)
class StepReport:
    """What became of an optimiser step.

    Attributes:
        applied: whether the weights changed.
        grad_norm: global norm of the gradient before clipping; infinite where it overflowed.
        loss_scale: scale that the step ran under; 1 unless fp16.
        collapsed: the loss scale cannot recover.
    """

    applied: bool
    grad_norm: Any
    loss_scale: float = 1.0
    collapsed: bool = False


class Engine:
    """Forward, backward, step, save and load through DeepSpeed, with its traps guarded.

    * ZeRO-3 applies the last gradient of a parameter that the step does not use again and again: its buffer is cleared
      after every step.
    * fp16: one loss scale per task.
    * Stage 0 reports no gradient norm: it is taken here.

    Args:
        processes: the processes of this run.
        module: called as ``module(task, batch)``.
        make_optimizer: builds the optimiser on the module's parameters.
        config: see :func:`vlscale.train.ds_config.resolve_ds_config`.
        tasks: every task that will be trained.

    Attributes:
        module: the module as given.
        stage: ZeRO stage.
        accumulation: backward calls per step.
    """

    def __init__(
        self,
        processes: Processes,
        module: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: dict[str, Any],
        tasks: tuple[str, ...],
    ) -> None:
        import deepspeed

        self.processes, self.module, self.config = processes, module, config
        self.stage: int = config["zero_optimization"]["stage"]
        self.accumulation: int = config["gradient_accumulation_steps"]
        self.version: str = deepspeed.__version__
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=make_optimizer(module), config=config)
        self._settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._engine.optimizer.param_groups
        ]
        self._stale = _stale_gradients(self._engine.optimizer, self.version) if self.stage == 3 else None
        fp16 = config.get("fp16", {}).get("enabled", False)
        self.loss_scales = TaskLossScales(self._engine.optimizer, tasks) if fp16 else None
        self._task, self._scale = "", 1.0

    def begin(self, task: str, lr: float) -> None:
        """Start an optimiser step of ``task`` at learning rate ``lr``."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._task = task
        self._scale = self.loss_scales.select(task) if self.loss_scales else 1.0

    def forward(self, task: str, batch: Any) -> Any:
        """Run the module, through DeepSpeed's hooks."""
        return self._engine(task, batch)

    def represent(self, task: str, batch: Any) -> Tensor:
        """Run the module's ``represent`` through the same hooks; see :mod:`vlscale.train.window`."""
        return self._engine(task, batch, represent=True)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate; DeepSpeed divides by the accumulation and, when it reduces, by the number of processes."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self) -> StepReport:
        """Take the optimiser step, after the last backward of the window.

        Raises:
            RuntimeError: the number of backward calls was not the accumulation.
        """
        if not self._engine.is_gradient_accumulation_boundary():
            raise RuntimeError(f"step() after fewer or more than {self.accumulation} backward calls")
        norm: Any = None
        if self.stage == 0:
            grads = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            if not torch.isfinite(norm):  # DeepSpeed would put NaN into the weights
                return StepReport(False, float("inf"))
        self._engine.step()
        if self._stale is not None:
            self._stale.zero_()
        applied = self._engine.was_step_applied()
        norm = norm if norm is not None else self._engine.get_global_grad_norm()
        collapsed = self.loss_scales is not None and self.loss_scales.record(self._task, self._scale, applied)
        return StepReport(applied, norm, self._scale, collapsed)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout, no gradient."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def save(self, folder: Path, tag: str) -> None:
        """Let every process write its part of the state into ``folder/tag``."""
        # A marker that DeepSpeed's converter to its universal format asks for.
        marker = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=marker, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Restore what :meth:`save` wrote with the same number of processes, stage and model.

        Clipping and the optimiser's settings stay those of this run: DeepSpeed would bring the old ones back.

        Raises:
            VlscaleError: DeepSpeed cannot read it.
        """
        clip = getattr(self._engine.optimizer, "clip_grad", None)
        try:
            loaded, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        except (RuntimeError, OSError, KeyError, ValueError, AssertionError, UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise VlscaleError(f"checkpoint {folder / tag}: DeepSpeed cannot load it: {reason}") from None
        if loaded is None:
            raise VlscaleError(f"checkpoint {folder / tag}: DeepSpeed found nothing to load")
        if clip is not None:
            self._engine.optimizer.clip_grad = clip
        for group, settings in zip(self._engine.optimizer.param_groups, self._settings, strict=True):
            group.update(settings)

    def weights(self, module: nn.Module) -> dict[str, Tensor] | None:
        """Gather the full-precision weights of ``module`` on the CPU of the main process; None in the others.

        All processes have to call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        found: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            full = safe_get_full_fp32_param(parameter) if self.stage > 0 else parameter
            if self.processes.main:
                found[name] = full.detach().float().cpu().reshape(getattr(parameter, "ds_shape", parameter.shape))
        return found if self.processes.main else None

    @contextmanager
    def watching_gradients(self) -> Iterator[list[str]]:
        """List, in a block, the parameters that get a gradient that is not finite in this process, in that order.

        The first is nearest to where the trouble starts. For diagnoses only: every gradient is looked at.
        """
        bad: list[str] = []

        def watch(name: str) -> Callable[[Tensor], None]:
            def look(gradient: Tensor) -> None:
                if not bool(torch.isfinite(gradient).all()):
                    bad.append(name)

            return look

        named = [(name, tensor) for name, tensor in self.module.named_parameters() if tensor.requires_grad]
        handles = [tensor.register_hook(watch(name)) for name, tensor in named]
        try:
            yield bad
        finally:
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        """Remove DeepSpeed's hooks; the module can be trained by another engine afterwards."""
        self._engine.destroy()


def _stale_gradients(optimizer: Any, version: str) -> Tensor:
    """Return the buffer in which ZeRO-3 keeps gradients from one step to the next.

    It is overwritten only by parameters that get a gradient, and is never cleared, so that an idle head would move by
    its last gradient in every step.

    Raises:
        VlscaleError: this DeepSpeed has not been looked at.
    """
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if not version.startswith(tuple(f"{known}." for known in STALE_GRADIENTS_CHECKED)) or buffer is None:
        raise VlscaleError(
            f"DeepSpeed {version}: its ZeRO stage 3 has not been checked for stale gradients of idle heads (checked: "
            f"{', '.join(STALE_GRADIENTS_CHECKED)}); use zero_optimization.stage 2, or the pinned version"
        )
    return buffer

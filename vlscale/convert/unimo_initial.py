"""What a UNIMO's pre-training starts from: a RoBERTa, as its authors did, or their published variables."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vlscale.convert.huggingface import HuggingFaceSource
from vlscale.convert.mapped import Mapped
from vlscale.convert.opening import Opened, open_checkpoint
from vlscale.convert.unimo_model import import_plans
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, check_state
from vlscale.models.registry import expected_shapes
from vlscale.models.unimo_config import UnimoConfig

_REQUIRED = ("text_embedder.word.", "text_embedder.position.", "text_embedder.norm.", "encoder.")
_SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")


def read_unimo(path: Path, config: UnimoConfig) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read what a checkpoint holds for a UNIMO, in float32.

    Args:
        path: a Hugging Face folder of a RoBERTa or BERT, whose images, poolers and heads for regions are left random;
            or UNIMO's variables (a folder, a tar, one file) or PaddleNLP's ``.pdparams``.
        config: the model that the weights are for.

    Returns:
        Our names -> tensors, and the names of the checkpoint that the model has no place for.

    Raises:
        VlscaleError: no such checkpoint, damaged or hostile files, weights that are missing or do not fit.
    """
    with open_checkpoint(path, to="unimo") as opened:
        if isinstance(opened.source, HuggingFaceSource):
            _check_encoder(opened.source, config)
        elif opened.model != "unimo":
            raise VlscaleError(
                f"model.init_from: {path} holds {opened.layout}; give a RoBERTa, a UNIMO, or a vlscale folder of one"
            )
        _check_positions(opened, config)
        mapped = _ours(opened)
        opened.check_tied()
        shapes = expected_shapes(config)
        state = {name: mapped.read(name).float() for name in mapped.tensors if name in shapes}
        surplus = [name for name in mapped.tensors if name not in shapes]
        ignored = {*surplus, *opened.unexpected, *(name for stage in opened.stages for name in stage.plan.ignored)}
    check_state(state, shapes, str(path), partial=True)
    missing = sorted(name for name in shapes if name.startswith(_REQUIRED) and name not in state)
    if missing:
        raise VlscaleError(
            f"{path}: {len(missing)} weights of the text encoder are missing: {', '.join(missing[:4])}; give a whole "
            "checkpoint"
        )
    return state, tuple(sorted(ignored))


def _ours(opened: Opened) -> Mapped:
    """The tensors under our names; a text encoder's still have the published ones of a UNIMO."""
    if opened.model is not None:
        return opened.mapped
    first, second = import_plans(opened.mapped.tensors, partial=True)
    return Mapped(Mapped(opened.mapped, first), second)


def _check_encoder(source: HuggingFaceSource, config: UnimoConfig) -> None:
    """Compare a text encoder's sizes and arithmetic with the model's."""
    for key in _SAME:
        theirs, ours = getattr(source.shape, key), getattr(config, key)
        if theirs != ours:
            raise VlscaleError(
                f"{source.path / CONFIG_FILE}: {key} is {theirs}, the model's is {ours}; set "
                f"model.config.{key}={theirs}"
                + (" or use this folder's vocabulary for the texts" if key == "vocab_size" else "")
            )
    for key, expected in (("norm", "post"), ("activation", "gelu")):
        if getattr(config, key) != expected:
            raise VlscaleError(
                f"{source.path}: its weights are for {key}: {expected}, the model has {key}: {getattr(config, key)}"
            )


def _check_positions(opened: Opened, config: UnimoConfig) -> None:
    """The row of a text's first token is in no tensor."""
    first = 0 if opened.layout == "unimo-text" else 2
    if config.first_position != first:
        raise VlscaleError(
            f"{opened.source.path}: its texts begin at position {first}, the model's at {config.first_position}; set "
            f"model.config.first_position={first}"
        )

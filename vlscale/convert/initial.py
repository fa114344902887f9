"""The weights that a run starts from (``model.init_from``).

A UNITER starts from a vlscale folder or a Hugging Face BERT folder; a UNIMO from a vlscale folder, a Hugging Face
RoBERTa folder (word, position and layers; row 0 of its token types is folded into the words), or the authors' published
variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vlscale.config import InitTables
from vlscale.convert.bert import is_bert_folder, read_bert, required_names
from vlscale.convert.growing import check_tables, grow_tables, old_sizes
from vlscale.convert.unimo_initial import read_unimo
from vlscale.errors import VlscaleError
from vlscale.models.base import PretrainingModel
from vlscale.models.folder import CONFIG_FILE, check_state, read_config, read_json, read_weights
from vlscale.models.registry import ModelConfig, config_type_of, expected_shapes
from vlscale.models.unimo_config import UnimoConfig


@dataclass(frozen=True)
class WeightReport:
    """What was taken from a folder.

    Attributes:
        source: the folder.
        loaded: names of the model that were found.
        fresh: names of the model that were not, and keep their random values.
        ignored: names of the folder that the model has no place for.
        grown: what was done to tables that are longer in the model, in words.
    """

    source: str
    loaded: tuple[str, ...]
    fresh: tuple[str, ...]
    ignored: tuple[str, ...]
    grown: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        if self.fresh:
            groups = sorted({name.split(".")[0] for name in self.fresh})
            parts.append(f"{len(self.fresh)} start from random values ({', '.join(groups)})")
        if self.ignored:
            parts.append(f"{len(self.ignored)} ignored ({', '.join(self.ignored)})")
        return "; ".join([*parts, *self.grown])


def initial_state(path: Path, config: ModelConfig, tables: InitTables = "exact") -> dict[str, Tensor]:
    """Return the part of the model's state dict that ``path`` provides, on the CPU; nothing is written anywhere.

    For models whose parameters are partitioned: gather each parameter and copy. See :func:`read_initial`.
    """
    return read_initial(path, config, tables)[0]


def read_initial(
    path: Path, config: ModelConfig, tables: InitTables = "exact"
) -> tuple[dict[str, Tensor], WeightReport]:
    """Read initial weights and check them against the shapes of the configured model.

    Args:
        path: vlscale folder (all weights must fit), Hugging Face folder of a BERT or RoBERTa (image parts stay
            random), or, for UNIMO, what :func:`vlscale.convert.unimo_initial.read_unimo` takes.
        config: the model's configuration.
        tables: ``model.init_tables``: whether a vlscale folder may have fewer words or types than the model.

    Returns:
        Our names -> tensors, and what was mapped, ignored and left random.

    Raises:
        VlscaleError: the folder is missing or of another kind, its files are damaged, or its weights do not fit.
    """
    unimo = isinstance(config, UnimoConfig)
    if not path.is_dir() and not (unimo and path.is_file()):
        encoder = "RoBERTa" if unimo else "BERT"
        raise VlscaleError(
            f"model.init_from: no such folder {path}; give a vlscale or Hugging Face {encoder} folder, or null"
        )
    shapes = expected_shapes(config)
    grown: tuple[str, ...] = ()
    described = path.is_dir() and (not unimo or (path / CONFIG_FILE).is_file())
    kind = config_type_of(read_json(path / CONFIG_FILE).get("model_type")) if described else None
    if kind is not None:
        state, ignored, grown = _read_own(path, config, kind, tables)
    elif isinstance(config, UnimoConfig):
        state, ignored = read_unimo(path, config)
    elif is_bert_folder(path):
        bert = read_bert(path, config)
        state, ignored = bert.state, bert.ignored
        check_state(state, shapes, str(path), partial=True)
        missing = sorted(required_names(set(shapes)) - set(state))
        if missing:
            raise VlscaleError(f"{path}: {len(missing)} weights of a BERT are missing: {', '.join(missing[:4])}")
    else:
        raise VlscaleError(f"{path / CONFIG_FILE}: neither a vlscale model nor a BERT")
    fresh = tuple(name for name in shapes if name not in state)
    return state, WeightReport(str(path), tuple(state), fresh, ignored, grown)


def _read_own(
    path: Path, config: ModelConfig, kind: type[ModelConfig], tables: InitTables
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """A vlscale folder: weights, names that the model does without, and what was done to tables."""
    if not isinstance(config, kind):
        raise VlscaleError(
            f"{path}: holds a {_model_name(kind)}, model.name is {_model_name(type(config))}; give a folder of that "
            "model"
        )
    saved = read_config(kind, path)
    for key in ("norm", "first_position", "activation"):
        if getattr(saved, key, None) != getattr(config, key, None):
            raise VlscaleError(
                f"{path}: the weights are for {key}: {getattr(saved, key)}, the model has {key}: {getattr(config, key)}"
            )
    if saved.num_attention_heads != config.num_attention_heads:  # the one size that no tensor shows
        raise VlscaleError(
            f"{path}: num_attention_heads is {saved.num_attention_heads}, the model's is "
            f"{config.num_attention_heads}; set model.config.num_attention_heads"
        )
    check_tables(path, saved, config, tables)
    shapes = expected_shapes(config)
    found = read_weights(path, expected_shapes(old_sizes(saved, config)))
    state, grown = grow_tables(found, saved, config, tables)
    state = {name: tensor for name, tensor in state.items() if name in shapes}
    return state, tuple(name for name in found if name not in shapes), grown  # heads that the model does without


def _model_name(kind: type[ModelConfig]) -> str:
    return "unimo" if kind is UnimoConfig else "uniter"


def load_initial_weights(model: PretrainingModel, path: Path, tables: InitTables = "exact") -> WeightReport:
    """Copy initial weights into an ordinary (not partitioned) model.

    Raises:
        VlscaleError: see :func:`read_initial`.
    """
    state, report = read_initial(path, model.config, tables)
    model.load_state_dict(state, strict=False)  # names and shapes have been checked
    return report

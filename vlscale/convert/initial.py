"""The weights that a run starts from (``model.init_from``): a vlscale folder or a Hugging Face BERT folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vlscale.config import InitTables
from vlscale.convert.bert import is_bert_folder, read_bert, required_names
from vlscale.convert.growing import check_tables, grow_tables, old_sizes
from vlscale.errors import VlscaleError
from vlscale.models.folder import CONFIG_FILE, MODEL_TYPE, check_state, read_config, read_json, read_weights
from vlscale.models.uniter import UniterConfig, UniterForPretraining, expected_shapes


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


def initial_state(path: Path, config: UniterConfig, tables: InitTables = "exact") -> dict[str, Tensor]:
    """Return the part of the model's state dict that ``path`` provides, on the CPU; nothing is written anywhere.

    For models whose parameters are partitioned: gather each parameter and copy. See :func:`read_initial`.
    """
    return read_initial(path, config, tables)[0]


def read_initial(
    path: Path, config: UniterConfig, tables: InitTables = "exact"
) -> tuple[dict[str, Tensor], WeightReport]:
    """Read initial weights and check them against the shapes of the configured model.

    Args:
        path: vlscale folder (all weights must fit) or Hugging Face BERT folder (image parts stay random).
        config: the model's configuration.
        tables: ``model.init_tables``: whether a vlscale folder may have fewer words or types than the model.

    Returns:
        Our names -> tensors, and what was mapped, ignored and left random.

    Raises:
        VlscaleError: the folder is missing or of another kind, its files are damaged, or its weights do not fit.
    """
    if not path.is_dir():
        raise VlscaleError(
            f"model.init_from: no such folder {path}; give a vlscale or Hugging Face BERT folder, or null"
        )
    shapes = expected_shapes(config)
    grown: tuple[str, ...] = ()
    if read_json(path / CONFIG_FILE).get("model_type") == MODEL_TYPE:
        saved = read_config(UniterConfig, path)
        if saved.norm != config.norm:
            raise VlscaleError(f"{path}: the weights are for norm: {saved.norm}, the model has norm: {config.norm}")
        if saved.num_attention_heads != config.num_attention_heads:  # the one size that no tensor shows
            raise VlscaleError(
                f"{path}: num_attention_heads is {saved.num_attention_heads}, the model's is "
                f"{config.num_attention_heads}; set model.config.num_attention_heads"
            )
        check_tables(path, saved, config, tables)
        found = read_weights(path, expected_shapes(old_sizes(saved, config)))
        state, grown = grow_tables(found, saved, config, tables)
        state = {name: tensor for name, tensor in state.items() if name in shapes}
        ignored = tuple(name for name in found if name not in shapes)  # heads that the model does without
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


def load_initial_weights(model: UniterForPretraining, path: Path, tables: InitTables = "exact") -> WeightReport:
    """Copy initial weights into an ordinary (not partitioned) model.

    Raises:
        VlscaleError: see :func:`read_initial`.
    """
    state, report = read_initial(path, model.config, tables)
    model.load_state_dict(state, strict=False)  # names and shapes have been checked
    return report

"""Model folders: ``config.json`` (plain JSON) and ``model.safetensors``, read strictly and written atomically enough.

Weights are exchanged in this form only; nothing here unpickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlscale.errors import VlscaleError, nearest
from vlscale.models.shards import read_index

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
PROVENANCE_FILE = "provenance.json"
"""Beside a folder's weights: where they came from, as far as their source told."""
TASK_HEAD_FILE = "task_head.safetensors"
"""Beside a folder's weights: what fine-tuning added, under published names after ``task_head.``."""
MODEL_TYPE = "vlscale-uniter"
HUB_KEYS = ("model_type", "architectures", "transformers_version")
"""Of ``config.json``, for the hub's pages and for transformers; the model does not look at them."""
MAX_CONFIG_BYTES = 1 << 20
_SHOWN = 4
Config = TypeVar("Config", bound=BaseModel)


def parse_config(kind: type[Config], raw: Mapping[str, Any], origin: str) -> Config:
    """Validate a mapping as the configuration ``kind``; ``origin`` is named in errors.

    Raises:
        VlscaleError: one line with the first problem; for an unknown key, the nearest known one.
    """
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
        if problem["type"] == "extra_forbidden":
            known = sorted(kind.model_fields)
            raise VlscaleError(
                f"{origin}: unknown key {where!r}{nearest(where, known)} (known: {', '.join(known)}){more}"
            ) from None
        found = f", found {' '.join(repr(problem['input']).split())[:80]}" if where else ""
        message = problem["msg"].removeprefix("Value error, ")
        raise VlscaleError(f"{origin}: {where + ': ' if where else ''}{message}{found}{more}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most :data:`MAX_CONFIG_BYTES`.

    Raises:
        VlscaleError: missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise VlscaleError(f"{path}: more than {MAX_CONFIG_BYTES} bytes: this is not a configuration")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VlscaleError(f"{path}: cannot be read ({error.strerror}); give a folder that holds {path.name}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or an integer of 5,000 digits
        raise VlscaleError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise VlscaleError(f"{path}: expected an object, found {type(raw).__name__}")
    return raw


def read_config(kind: type[Config], folder: Path) -> Config:
    """Read the configuration of a model folder.

    Raises:
        VlscaleError: missing or unreadable file, a folder of another kind of model, an unknown key, a bad value.
    """
    path = folder / CONFIG_FILE
    raw = read_json(path)
    found = raw.get("model_type")
    expected = model_type_of(kind)
    if found != expected:
        raise VlscaleError(f"{path}: model_type is {found!r}, expected {expected!r}; give a folder saved by vlscale")
    return parse_config(kind, own_keys(raw), str(path))


def model_type_of(kind: type[BaseModel]) -> str:
    """What ``config.json`` calls the models of a configuration: its ``model_type``, else :data:`MODEL_TYPE`."""
    return getattr(kind, "model_type", MODEL_TYPE)


def own_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The model's part of a ``config.json``."""
    return {key: value for key, value in raw.items() if key not in HUB_KEYS}


def read_weights(folder: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Read ``model.safetensors``, or the shards of its index, and compare it with the expected ``shapes``.

    Raises:
        VlscaleError: missing or damaged files, or both forms at once; shards that are not as the index says; missing,
            unexpected or misshapen tensors.
    """
    whole, file = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if not file.is_file():
        state = read_safetensors(whole)
    elif whole.is_file():
        raise VlscaleError(f"{folder}: holds both of {INDEX_FILE} and {WEIGHTS_FILE}; remove the one that is not meant")
    else:
        state = {}
        index = read_index(file, ".safetensors")
        for shard in index.files:
            part = read_safetensors(shard)
            index.check_shard(shard, part)
            state |= part
    check_state(state, shapes, str(whole))
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file to the CPU.

    Raises:
        VlscaleError: the file is missing or damaged.
    """
    if not path.is_file():
        raise VlscaleError(f"{path}: no such file; give a folder that holds {path.name}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise VlscaleError(f"{path}: damaged or not a safetensors file ({error})") from None


def check_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], origin: str, partial: bool = False
) -> None:
    """Compare names and shapes of ``state`` with what the model expects; ``partial`` lets names be missing.

    Raises:
        VlscaleError: one line that counts and names what is missing, unexpected or misshapen.
    """
    missing = [] if partial else [name for name in shapes if name not in state]
    unexpected = [name for name in state if name not in shapes]
    misshapen = [
        f"{name} is {list(tensor.shape)}, the model's is {list(shapes[name])}"
        for name, tensor in state.items()
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name])
    ]
    problems = [
        f"{len(names)} {label}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise VlscaleError(f"{origin}: the weights do not fit the configuration: {'; '.join(problems)}")


def write_folder(folder: Path, config: BaseModel, state: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors`` for a complete state dict, each through a temporary file.

    Also takes a state dict that was gathered from a partitioned model. Tensors are written in their own dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, weights, {"format": "pt"})
    os.replace(weights, folder / WEIGHTS_FILE)
    (folder / INDEX_FILE).unlink(missing_ok=True)  # of shards that these weights replace
    text = folder / f".{CONFIG_FILE}.{os.getpid()}"
    text.write_text(describe(config), encoding="utf-8")
    os.replace(text, folder / CONFIG_FILE)


def describe(config: BaseModel) -> str:
    """Return the text of ``config.json``."""
    kind = {"model_type": model_type_of(type(config))}
    return json.dumps(kind | json.loads(config.model_dump_json()), indent=2) + "\n"


def resolve_folder(name: str, **hub: Any) -> Path:
    """Return the folder ``name``, or the local copy of the hub repository ``name``.

    Raises:
        VlscaleError: neither exists, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        config = Path(hf_hub_download(name, CONFIG_FILE, **hub))
        try:
            hf_hub_download(name, WEIGHTS_FILE, **hub)
        except EntryNotFoundError:
            hf_hub_download(name, INDEX_FILE, **hub)
            for shard in read_index(config.parent / INDEX_FILE, ".safetensors").files:
                hf_hub_download(name, shard.name, **hub)
    except HFValidationError:
        raise VlscaleError(f"{name}: no such folder, and not the name of a repository (OWNER/NAME) either") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VlscaleError(f"{name}: no such folder, and not found on the Hugging Face hub ({reason})") from None
    return config.parent

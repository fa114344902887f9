"""vlscale's models in transformers' Auto classes: importing this module registers them.

    import vlscale.hf
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_pretrained("folder or hub repository")

The model is vlscale's own; transformers only finds it by the ``model_type`` of its ``config.json``. This module alone
imports transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, PretrainedConfig
from typing_extensions import Self

from vlscale.errors import VlscaleError
from vlscale.models.base import PretrainingModel
from vlscale.models.folder import MODEL_TYPE
from vlscale.models.unimo import UnimoConfig, UnimoForPretraining
from vlscale.models.uniter import UniterForPretraining

_HUB = ("revision", "cache_dir", "local_files_only", "token", "force_download")


class UniterAutoConfig(PretrainedConfig):
    """``config.json`` as transformers reads it; the model reads the file itself, and strictly."""

    model_type = MODEL_TYPE


class UnimoAutoConfig(PretrainedConfig):
    """The same for UNIMO."""

    model_type = UnimoConfig.model_type


class _FromAuto(PretrainingModel):
    """Called the way ``AutoModel`` calls its models."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Self:
        """Load a folder or hub repository; of transformers' arguments those about the hub are used.

        Raises:
            VlscaleError: see :meth:`vlscale.models.base.PretrainingModel.from_pretrained`.
        """
        hub = {key: value for key, value in arguments.items() if key in _HUB and value is not None}
        return super().from_pretrained(pretrained_model_name_or_path, **hub)


class UniterAutoModel(_FromAuto, UniterForPretraining):
    """:class:`~vlscale.models.uniter.UniterForPretraining` for ``AutoModel``."""

    config_class = UniterAutoConfig


class UnimoAutoModel(_FromAuto, UnimoForPretraining):
    """:class:`~vlscale.models.unimo.UnimoForPretraining` for ``AutoModel``."""

    config_class = UnimoAutoConfig


def load_seq2seq(folder: Path) -> tuple[Any, Any]:
    """Load tokenizer and model of any seq2seq model from a folder: safetensors weights, no code of its own.

    Raises:
        VlscaleError: the folder holds no such model.
    """
    if not (folder / "config.json").is_file():
        raise VlscaleError(f"{folder}: no config.json; a folder of a Hugging Face seq2seq model is needed")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
        return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(folder, use_safetensors=True, **local).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VlscaleError(
            f"{folder}: cannot be read as a seq2seq model with its tokenizer and safetensors weights ({reason})"
        ) from None


AutoConfig.register(MODEL_TYPE, UniterAutoConfig, exist_ok=True)
AutoModel.register(UniterAutoConfig, UniterAutoModel, exist_ok=True)
AutoConfig.register(UnimoConfig.model_type, UnimoAutoConfig, exist_ok=True)
AutoModel.register(UnimoAutoConfig, UnimoAutoModel, exist_ok=True)

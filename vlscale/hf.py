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

from transformers import AutoConfig, AutoModel, PretrainedConfig
from typing_extensions import Self

from vlscale.models.folder import MODEL_TYPE
from vlscale.models.uniter import UniterForPretraining

_HUB = ("revision", "cache_dir", "local_files_only", "token", "force_download")


class UniterAutoConfig(PretrainedConfig):
    """``config.json`` as transformers reads it; the model reads the file itself, and strictly."""

    model_type = MODEL_TYPE


class UniterAutoModel(UniterForPretraining):
    """:class:`~vlscale.models.uniter.UniterForPretraining`, called the way ``AutoModel`` calls its models."""

    config_class = UniterAutoConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Self:
        """Load a folder or hub repository; of transformers' arguments those about the hub are used.

        Raises:
            VlscaleError: see :meth:`vlscale.models.uniter.UniterForPretraining.from_pretrained`.
        """
        hub = {key: value for key, value in arguments.items() if key in _HUB and value is not None}
        return super().from_pretrained(pretrained_model_name_or_path, **hub)


AutoConfig.register(MODEL_TYPE, UniterAutoConfig, exist_ok=True)
AutoModel.register(UniterAutoConfig, UniterAutoModel, exist_ok=True)

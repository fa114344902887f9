"""What all models for pre-training share: heads at single positions, and folders to load from and to save to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

from huggingface_hub import PyTorchModelHubMixin
from pydantic import BaseModel
from torch import Tensor, nn
from typing_extensions import Self

from vlscale.errors import VlscaleError
from vlscale.models.encoder import Encoder
from vlscale.models.folder import read_config, read_weights, resolve_folder, write_folder
from vlscale.ragged import RaggedBatch


class EncodedRows(Protocol):
    """What an encoder makes of a batch, as far as heads look at it.

    Attributes:
        hidden: float [N, H], packed.
        text_index: int64 [Nt], row of each text token; region_index: int64 [Nr], row of each region.
    """

    hidden: Tensor

    @property
    def text_index(self) -> Tensor:
        """Rows of the text tokens."""
        ...

    @property
    def region_index(self) -> Tensor:
        """Rows of the regions."""
        ...


class PretrainingModel(nn.Module, PyTorchModelHubMixin, library_name="vlscale", license="apache-2.0"):
    """A model with its pre-training heads; a subclass sets ``config_type``, ``config`` and its modules.

    Every method that looks at single positions takes int64 indices into the text tokens (``RaggedBatch.input_ids``) or
    the regions (``RaggedBatch.boxes``) of the batch; K = 0 is allowed. Outputs have the dtype of the weights.
    """

    config_type: ClassVar[type[BaseModel]]
    config: Any
    encoder: Encoder
    word_head: nn.Module
    feature_head: nn.Module
    region_classifier: nn.Module

    def encode(self, batch: RaggedBatch, all_layers: bool = False) -> Any:
        """Embed and encode a batch on the model's device; every model says what of a batch it reads.

        Returns:
            :class:`EncodedRows`, with more that the model's own heads look at.
        """
        raise NotImplementedError

    def external_parameters(self) -> list[tuple[nn.Module, Tensor]]:
        """Return (module, parameter) where a module's forward reads a parameter that another module owns.

        Partitioned training has to gather the parameter for that module too.
        """
        raise NotImplementedError

    def mlm_logits(self, encoded: EncodedRows, positions: Tensor) -> Tensor:
        """Return [K, V], scores of all word pieces at K text tokens: masked ones, or the next ones of a target."""
        self._require("words")
        return self.word_head(encoded.hidden.index_select(0, encoded.text_index.index_select(0, positions)))

    def predict_features(self, encoded: EncodedRows, positions: Tensor) -> Tensor:
        """Return [K, D], regressed features of K regions."""
        self._require("features")
        return self.feature_head(encoded.hidden.index_select(0, encoded.region_index.index_select(0, positions)))

    def classify_regions(self, encoded: EncodedRows, positions: Tensor) -> Tensor:
        """Return [K, C], class scores of K regions."""
        self._require("classes")
        return self.region_classifier(encoded.hidden.index_select(0, encoded.region_index.index_select(0, positions)))

    def set_activation_checkpointing(self, policy: str) -> None:
        """Choose ``none``, ``full`` or ``every N``; see :meth:`vlscale.models.encoder.Encoder`."""
        self.encoder.set_activation_checkpointing(policy)

    def _require(self, head: str) -> None:
        if head not in self.config.heads:
            raise VlscaleError(
                f"the model has no head {head!r} (heads in its configuration: {[*self.config.heads]}); "
                "start a model with all heads from these weights (model.init_from)"
            )

    def _save_pretrained(self, save_directory: Path) -> None:
        write_folder(save_directory, self.config, self.state_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **arguments: Any) -> Self:
        """Load a folder written by ``save_pretrained``, or a repository of the Hugging Face hub.

        Args:
            pretrained_model_name_or_path: folder, or hub repository.
            **arguments: ``revision``, ``cache_dir``, ``local_files_only``, ``token``, ``force_download`` for the hub.

        Returns:
            The model in evaluation mode, in float32, on the CPU.

        Raises:
            VlscaleError: a file is missing, a key is unknown, weights are missing, left over or misshapen.
        """
        folder = resolve_folder(str(pretrained_model_name_or_path), **arguments)
        model = cls(read_config(cls.config_type, folder))
        model.load_state_dict(read_weights(folder, {name: t.shape for name, t in model.state_dict().items()}))
        return model.eval()

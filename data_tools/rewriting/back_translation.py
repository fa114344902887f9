"""Paraphrases: a caption translated into another language and back, by Hugging Face seq2seq models given by path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlscale.errors import VlscaleError

MAX_TOKENS = 128


@dataclass(frozen=True)
class Translation:
    """How to translate; pickled into worker processes.

    Attributes:
        there: folder of the model into the other language.
        back: folder of the model back.
        count: paraphrases per caption: the best of as many beams.
        batch: captions at a time.
        device: of both models.
    """

    there: Path
    back: Path
    count: int
    batch: int = 32
    device: str = "cpu"

    def load(self) -> BackTranslator:
        """Load both models.

        Raises:
            VlscaleError: transformers is missing, or a folder holds no seq2seq model with a tokenizer.
        """
        return BackTranslator(self)


class BackTranslator:
    """Both models, loaded; the same captions give the same paraphrases whatever the batches on one device."""

    def __init__(self, how: Translation) -> None:
        self.how = how
        self._there = _load(how.there, how.device)
        self._back = _load(how.back, how.device)

    def paraphrase(self, texts: Sequence[str]) -> list[list[str]]:
        """At most ``count`` different texts for each of some texts; empty translations are left out."""
        found: list[list[str]] = []
        for begin in range(0, len(texts), self.how.batch):
            foreign = self._translate(self._there, texts[begin : begin + self.how.batch], 1)
            returned = self._translate(self._back, [best[0] for best in foreign], self.how.count)
            found.extend([list(dict.fromkeys(text for text in several if text)) for several in returned])
        return found

    def _translate(self, loaded: tuple[Any, Any], texts: Sequence[str], count: int) -> list[list[str]]:
        import torch

        tokenizer, model = loaded
        limit = min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", MAX_TOKENS))
        inputs = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=limit)
        inputs = {name: inputs[name].to(self.how.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                num_beams=max(count, 4),
                num_return_sequences=count,
                do_sample=False,
                max_length=limit,
                early_stopping=True,
            )
        texts_out = [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return [texts_out[begin : begin + count] for begin in range(0, len(texts_out), count)]


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    try:
        from vlscale.hf import load_seq2seq
    except ImportError:
        raise VlscaleError("back-translation needs transformers; pip install transformers") from None
    tokenizer, model = load_seq2seq(folder)
    return tokenizer, model.to(device)

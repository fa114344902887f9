"""A model that reads sources once and then runs one token per live hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.models.generation.cache import KeyValueCache
from vlscale.models.generation.settings import GenerationSettings
from vlscale.models.generation.sources import Sources
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.ragged import RaggedBatch

if TYPE_CHECKING:
    from vlscale.models.unimo import UnimoForPretraining


class Decoder:
    """What searches ask for the scores of next tokens.

    Args:
        model: in evaluation mode.
        batch: the sources, on the device of the model; a target in it is left out.
        settings: how to generate.
        hypotheses: per example.

    Raises:
        VlscaleError: a source is empty or has no text to go on from, the longest text exceeds the position table, or a
            role or turn of the target has no counterpart in the model or the sources.
    """

    def __init__(
        self, model: UnimoForPretraining, batch: RaggedBatch, settings: GenerationSettings, hypotheses: int
    ) -> None:
        self.model, self.settings, self.hypotheses = model, settings, hypotheses
        sources = Sources.read(batch, settings.positions, model.config.first_position)
        self.batch, self.size, self.lengths = sources.batch, len(sources.lengths), sources.lengths
        self._first = sources.first
        self._check_sources(sources.texts)
        self._check_tables()
        self._check_lengths(sources.last_first)

    @property
    def device(self) -> torch.device:
        """Where all happens."""
        return self.batch.input_ids.device

    def begin(self) -> Tensor:
        """Read the sources; return float [B, V], scores of the first new token of each example."""
        joint_NH, layout = self.model.embed(self.batch)
        self.cache = KeyValueCache(self.model.encoder, self.lengths, 1, joint_NH)
        hidden_NH = self.model.encoder.extend(joint_NH, self.cache.layers, self.cache.source())
        if self.settings.bos_token_id is None:
            logits_BV = self.model.word_head(hidden_NH.index_select(0, layout.cu[1:].long() - 1))
        else:
            rows = torch.arange(self.size, device=self.device)
            logits_BV = self._run(torch.full_like(rows, self.settings.bos_token_id), rows, range(self.size), rows)
        self.cache.share(self.hypotheses)
        return logits_BV

    def step(self, tokens_R: Tensor, parents_R: Tensor | None, live: Sequence[int], live_L: Tensor) -> Tensor:
        """Run one new token of each live hypothesis.

        Args:
            tokens_R: int64 [R], the newest token of all R = B * hypotheses.
            parents_R: int64 [R], which hypothesis of the step before each one continues; None: itself.
            live: which ones are run; ``live_L``: the same, int64 [L], on the device.

        Returns:
            float [L, V], scores of their next tokens.
        """
        if parents_R is not None:
            self.cache.reorder(parents_R)
        examples = [row // self.hypotheses for row in live]
        example_L = torch.div(live_L, self.hypotheses, rounding_mode="floor")
        return self._run(tokens_R.index_select(0, live_L), live_L, examples, example_L)

    def _run(self, tokens_L: Tensor, live_L: Tensor, examples: Sequence[int], example_L: Tensor) -> Tensor:
        position_L = self._first.index_select(0, example_L) + self.cache.generated
        hidden_LH = self.model.text_embedder(self._words(tokens_L, position_L))
        step = self.cache.step(live_L, examples)
        return self.model.word_head(self.model.encoder.extend(hidden_LH, self.cache.layers, step))

    def _words(self, tokens_L: Tensor, position_L: Tensor) -> UnimoBatch:
        """The new tokens as a batch of texts of one token."""
        count, chosen = tokens_L.numel(), self.settings
        none = torch.zeros(count + 1, dtype=torch.int32, device=tokens_L.device)
        empty = position_L[:0]
        return UnimoBatch(
            task=self.batch.task,
            dataset=self.batch.dataset,
            input_ids=tokens_L,
            cu_text=torch.arange(count + 1, dtype=torch.int32, device=tokens_L.device),
            features=self.batch.features[:0],
            boxes=self.batch.boxes[:0],
            cu_regions=none,
            passes=empty, examples=empty, images=empty, group=empty, region_rows=empty,
            text_positions=position_L,
            text_types=torch.full_like(tokens_L, chosen.target_type_id),
            role_ids=None if self.batch.role_ids is None else torch.full_like(tokens_L, chosen.target_role_id),
            turn_ids=None if self.batch.turn_ids is None else torch.full_like(tokens_L, chosen.target_turn_id),
        )  # fmt: skip

    def _check_sources(self, texts: Sequence[int]) -> None:
        where = f"generate, dataset {self.batch.dataset!r}"
        if not self.size:
            raise VlscaleError(f"{where}: the batch is empty; give at least one example")
        if min(self.lengths) == 0:
            raise VlscaleError(
                f"{where}: example {self.lengths.index(0)} has neither image nor tags nor text; give it one of them"
            )
        if self.settings.bos_token_id is None and min(texts) == 0:
            raise VlscaleError(
                f"{where}: example {texts.index(0)} has no text to go on from; give bos_token_id, which begins one"
            )

    def _check_lengths(self, first: int) -> None:
        steps, rows = self.settings.steps, self.model.config.max_position_embeddings
        needed = first + self.settings.start + steps - 1  # the last token is never run, so it needs no position
        if needed > rows:
            possible = steps - needed + rows
            cure = f"lower max_new_tokens (or max_length) to {possible}" if possible > 0 else "shorten the source"
            raise VlscaleError(
                f"generate: {steps} new tokens from position {first} on need {needed} positions, the model has {rows}; "
                f"{cure}"
            )

    def _check_tables(self) -> None:
        config, chosen = self.model.config, self.settings
        for name, target, size, ids in (
            ("target_type_id", chosen.target_type_id, config.type_vocab_size, self.batch.input_ids),
            ("target_role_id", chosen.target_role_id, config.role_vocab_size, self.batch.role_ids),
            ("target_turn_id", chosen.target_turn_id, config.turn_vocab_size, self.batch.turn_ids),
        ):
            if target >= max(size, 1):
                raise VlscaleError(f"generate: {name} is {target}, the model has {size} of them")
            if target and ids is None:
                given = name.removeprefix("target_") + "s"
                raise VlscaleError(
                    f"generate: {name} is {target}, but dataset {self.batch.dataset!r} gives no {given}, without which "
                    f"the model uses none; give the sources {given}, or leave {name} out"
                )

"""A model that reads sources once and then runs one token per live hypothesis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlscale.errors import VlscaleError
from vlscale.models.generation.cache import KeyValueCache
from vlscale.models.generation.settings import GenerationSettings
from vlscale.models.unimo_batch import UnimoBatch
from vlscale.ragged import RaggedBatch, cumulative

if TYPE_CHECKING:
    from vlscale.models.unimo import UnimoForPretraining


def sources_of(batch: RaggedBatch) -> UnimoBatch:
    """The batch without the targets that it may hold: texts end after their ``prefix_len`` tokens."""
    batch = UnimoBatch.of(batch)
    if batch.prefix_len is None:
        return batch
    owner = batch.text_owner()
    within = torch.arange(owner.numel(), device=owner.device) - batch.cu_text.long().index_select(0, owner)
    kept = (within < batch.prefix_len.long().index_select(0, owner)).nonzero()[:, 0]
    of_text = ("text_positions", "text_types", "role_ids", "turn_ids")
    given = {name: value for name in of_text if (value := getattr(batch, name)) is not None}
    return replace(
        batch,
        input_ids=batch.input_ids.index_select(0, kept),
        cu_text=cumulative(batch.prefix_len),
        **{name: value.index_select(0, kept) for name, value in given.items()},
        prefix_len=None,
        sizes=None,
        max_joint=None,
        max_text=None,
    )


class Decoder:
    """What searches ask for the scores of next tokens.

    The device is waited for here, once, to learn the lengths of the sources.

    Args:
        model: in evaluation mode.
        batch: the sources, on the device of the model.
        settings: how to generate.
        hypotheses: per example.

    Raises:
        VlscaleError: a source is empty or has no text to go on from, or the longest text exceeds the position table.
    """

    def __init__(
        self, model: UnimoForPretraining, batch: UnimoBatch, settings: GenerationSettings, hypotheses: int
    ) -> None:
        self.model, self.settings, self.hypotheses = model, settings, hypotheses
        self.batch, self.size = batch, len(batch)
        self.lengths: list[int] = batch.cu_joint.diff().tolist()
        self._check_sources()
        self._check_tables()
        self._first = self._first_positions()

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

    def _check_sources(self) -> None:
        where = f"generate, dataset {self.batch.dataset!r}"
        if not self.size:
            raise VlscaleError(f"{where}: the batch is empty; give at least one example")
        if min(self.lengths) == 0:
            raise VlscaleError(
                f"{where}: example {self.lengths.index(0)} has neither image nor tags nor text; give it one of them"
            )
        texts: list[int] = self.batch.text_lengths.tolist()
        if self.settings.bos_token_id is None and min(texts) == 0:
            raise VlscaleError(
                f"{where}: example {texts.index(0)} has no text to go on from; give bos_token_id, which begins one"
            )

    def _first_positions(self) -> Tensor:
        """int64 [B], position of the first token of each generated text."""
        config, kind = self.model.config, self.settings.positions
        lengths = self.batch.text_lengths.long()
        if kind == "restart":
            first = torch.full_like(lengths, config.first_position)
        elif kind == "reference":
            first = lengths
        elif self.batch.text_positions is None or not self.batch.text_positions.numel():
            first = lengths + config.first_position
        else:
            last = self.batch.cu_text[1:].long() - 1
            behind = self.batch.text_positions.index_select(0, last.clamp(min=0)) + 1
            first = torch.where(lengths > 0, behind, config.first_position)
        self._check_lengths(int(first.max()))
        return first

    def _check_lengths(self, first: int) -> None:
        steps, rows = self.settings.steps, self.model.config.max_position_embeddings
        needed = first + self.settings.start + steps - 1  # the last token is never run, so it needs no position
        if needed > rows:
            raise VlscaleError(
                f"generate: {steps} new tokens from position {first} on need {needed} positions, the model has {rows}; "
                f"lower max_new_tokens (or max_length) to {max(steps - needed + rows, 0)}"
            )

    def _check_tables(self) -> None:
        config = self.model.config
        owned = {"target_type_id": config.type_vocab_size, "target_role_id": config.role_vocab_size}
        for name, size in {**owned, "target_turn_id": config.turn_vocab_size}.items():
            if getattr(self.settings, name) >= max(size, 1):
                raise VlscaleError(f"generate: {name} is {getattr(self.settings, name)}, the model has {size} of them")

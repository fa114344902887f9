"""What :func:`vlscale.models.generation.generate` takes, under Hugging Face's names, and checked."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from typing_extensions import Self

from vlscale.errors import VlscaleError

Scoring = Literal["official", "paddlenlp", "huggingface"]
TargetPositions = Literal["restart", "continue", "reference"]
DEFAULT_LENGTH = 20
"""Hugging Face's ``max_length`` where neither it nor ``max_new_tokens`` is given."""
MOST_TOKENS = 1 << 20
_HYPOTHESES = 1 << 16
Tokens = list[int]


class GenerationSettings(BaseModel):
    """How texts are generated. Names and meanings are Hugging Face's where it has them.

    Lengths: ``max_length`` and ``min_length`` count the generated text with its ``bos_token_id``, as Hugging Face does
    for models with a decoder; ``max_new_tokens`` and ``min_new_tokens`` count without it. The end token counts.

    ``scoring`` decides what beam search maximises (one beam is greedy search or sampling, whatever the scoring):

    * ``official``: the UNIMO authors' decoder. A hypothesis is worth its summed log-probability over
      ((5 + n) / 6)^length_penalty (GNMT) of its n tokens, recomputed at every step; ended hypotheses keep their worth
      and compete with live ones; the best worth wins, ended or not. An end token before its time and suppressed tokens
      are left out of the softmax; a candidate that repeats an n-gram loses 65000 after the best candidates were chosen.
    * ``paddlenlp``: ended hypotheses go to a pool of ``num_beams``, worth their sum over ((5 + n) / 6)^length_penalty,
      the end token not counted; suppressed tokens are left out of the softmax, other rules come after it.
    * ``huggingface``: the same pool, worth the sum over n^length_penalty, the end token counted; all rules come after
      the softmax.

    Attributes:
        bos_token_id: first token of every generated text ([CLS]); None: texts continue their source, whose last token
            predicts the first new one (PaddleNLP's ``generate`` of a prompt).
        eos_token_id: tokens that end a text ([SEP] for captions, [MASK] for texts in the published models); None: none.
        pad_token_id: fills what lies behind the end of shorter texts.
        no_repeat_ngram_size: no n consecutive tokens of the generated text occur twice; 0: no rule. With
            ``word_starts``, no n consecutive words.
        word_starts: bool [V], tokens that begin a word (``Detokenizer.word_starts``); the others continue one.
        bad_words_ids: token sequences that must not appear. suppress_tokens: tokens that must not.
        do_sample: draw tokens instead of taking the best; with ``temperature``, ``top_k`` (0: all) and ``top_p``.
        num_return_sequences: texts per example; of a beam search the best ones, at most ``num_beams``.
        early_stopping: when a pool counts as settled (``paddlenlp``, ``huggingface``): once it is full (true), once no
            live hypothesis of this length can enter (false), once none of any length can (``never``).
        seed: of the draws; or give ``generator``, of the device of the model.
        target_positions: ``restart``: the generated text counts its positions from the first one, as UNIMO is trained;
            ``continue``: behind the source's; ``reference``: from the number of source tokens, which the official
            decoder does with continuous positions although training continues. Default: ``restart``, without
            ``bos_token_id`` ``continue``.
        target_type_id, target_role_id, target_turn_id: of generated tokens, where the model has such tables.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    bos_token_id: int | None = Field(ge=0)
    eos_token_id: int | Tokens | None
    pad_token_id: int = Field(ge=0)
    max_new_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_length: int | None = Field(None, ge=1, le=MOST_TOKENS)
    min_new_tokens: int | None = Field(None, ge=0)
    min_length: int | None = Field(None, ge=0)
    num_beams: int = Field(1, ge=1, le=_HYPOTHESES)
    scoring: Scoring = "official"
    length_penalty: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False)
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: int = Field(0, ge=0)
    word_starts: Tensor | None = None
    bad_words_ids: list[Tokens] = Field(default_factory=list)
    suppress_tokens: Tokens = Field(default_factory=list)
    do_sample: bool = False
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    num_return_sequences: int = Field(1, ge=1, le=_HYPOTHESES)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    generator: torch.Generator | None = None
    target_positions: TargetPositions | None = None
    target_type_id: int = Field(0, ge=0)
    target_role_id: int = Field(0, ge=0)
    target_turn_id: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        for new, whole in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            if getattr(self, new) is not None and getattr(self, whole) is not None:
                raise ValueError(f"{new} and {whole} are both given; give one of them")
        if self.steps < 1:
            raise ValueError(f"max_length {self.max_length} leaves no token behind bos_token_id; raise it")
        if self.least > self.steps:
            raise ValueError(f"at least {self.least} new tokens are asked for, and at most {self.steps}")
        return self

    @model_validator(mode="after")
    def _ways_fit(self) -> Self:
        if self.num_beams > 1 and self.do_sample:
            raise ValueError("do_sample with num_beams > 1 is not supported; take one of them")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(f"num_return_sequences {self.num_return_sequences} exceeds num_beams {self.num_beams}")
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError("greedy search finds one text: num_return_sequences > 1 needs do_sample or num_beams")
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError("temperature, top_k and top_p belong to do_sample; set it, or leave them out")
        if self.early_stopping and self.scoring == "official":
            raise ValueError("early_stopping is of scoring paddlenlp and huggingface; official has no pool to stop")
        if self.seed is not None and self.generator is not None:
            raise ValueError("seed and generator are both given; give one of them")
        if self.bos_token_id is None and self.target_positions == "restart":
            raise ValueError("target_positions restart needs a bos_token_id: a text that goes on continues")
        if any(not words for words in self.bad_words_ids):
            raise ValueError("bad_words_ids holds an empty sequence, which would forbid everything; remove it")
        return self

    @property
    def start(self) -> int:
        """Tokens that a generated text has before the first step: its ``bos_token_id``."""
        return int(self.bos_token_id is not None)

    @property
    def steps(self) -> int:
        """Most new tokens."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return (DEFAULT_LENGTH if self.max_length is None else self.max_length) - self.start

    @property
    def least(self) -> int:
        """New tokens before which no text ends."""
        if self.min_new_tokens is not None:
            return self.min_new_tokens
        return max((self.min_length or 0) - self.start, 0)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        found = self.eos_token_id
        return () if found is None else (found,) if isinstance(found, int) else tuple(dict.fromkeys(found))

    @property
    def positions(self) -> TargetPositions:
        """How the generated text counts its positions."""
        return self.target_positions or ("continue" if self.bos_token_id is None else "restart")

    def check_vocabulary(self, size: int) -> None:
        """Compare with the model's vocabulary.

        Raises:
            VlscaleError: a token lies outside, there are more beams than tokens, or ``word_starts`` has another size.
        """
        listed = {
            "bos_token_id": [] if self.bos_token_id is None else [self.bos_token_id],
            "eos_token_id": self.ends,
            "pad_token_id": [self.pad_token_id],
            "bad_words_ids": [token for words in self.bad_words_ids for token in words],
            "suppress_tokens": self.suppress_tokens,
        }
        for name, tokens in listed.items():
            outside = [token for token in tokens if not 0 <= token < size]
            if outside:
                raise VlscaleError(f"generate: {name} {outside[0]} is not in the vocabulary (0 to {size - 1})")
        allowed = size - len({*self.suppress_tokens})
        if self.num_beams > allowed:
            raise VlscaleError(
                f"generate: num_beams {self.num_beams} exceeds the {allowed} tokens that may be generated; lower it"
            )
        if self.top_k > size:
            raise VlscaleError(f"generate: top_k {self.top_k} exceeds the vocabulary of {size} tokens; lower it")
        starts = self.word_starts
        if starts is not None and (starts.dtype != torch.bool or starts.shape != (size,)):
            raise VlscaleError(
                f"generate: word_starts is {starts.dtype} {list(starts.shape)}, expected torch.bool [{size}]"
            )

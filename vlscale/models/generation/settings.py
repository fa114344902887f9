"""What :func:`vlscale.models.generation.generate` takes, under Hugging Face's names, and checked."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
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
DEFAULT_TOP_K = 50
"""Hugging Face's ``top_k``, which says nothing without ``do_sample``."""
_HYPOTHESES = 1 << 16
_LARGEST_PENALTY = 1e30
"""A sum of log-probabilities times or over it is a float32, with all its digits."""
Tokens = list[int]


class GenerationSettings(BaseModel):
    """How texts are generated. Names and meanings are Hugging Face's where it has them; None is the default.

    What would change nothing is refused, such as ``length_penalty`` without beams; Hugging Face's own defaults may be
    written out all the same.

    Lengths: ``max_length`` and ``min_length`` count the generated text with its ``bos_token_id``, as Hugging Face does
    for models with a decoder; ``max_new_tokens`` and ``min_new_tokens`` count without it. The end token counts.

    ``scoring`` decides what beam search maximises (one beam is greedy search or sampling, whatever the scoring):

    * ``official``: the UNIMO authors' decoder. A hypothesis is worth its summed log-probability over
      ((5 + n) / 6)^length_penalty (GNMT) of its n tokens, recomputed at every step; ended hypotheses keep their worth
      and compete with live ones; the best worth wins, ended or not. An end token before its time and suppressed tokens
      are left out of the softmax; a candidate that repeats an n-gram loses 65000 after the best candidates were chosen,
      and is taken if there is no other.
    * ``paddlenlp``: ended hypotheses go to a pool of ``num_beams``, worth their sum over ((5 + n) / 6)^length_penalty,
      the end token not counted; suppressed tokens are left out of the softmax, other rules come after it.
    * ``huggingface``: the same pool, worth the sum over n^length_penalty, the end token counted; all rules come after
      the softmax.

    A hypothesis whose every next token the rules forbid stops where it is, without an end token; a text that they
    forbid is never returned.

    Attributes:
        bos_token_id: first token of every generated text ([CLS]); None: texts continue their source, whose last token
            predicts the first new one (PaddleNLP's ``generate`` of a prompt).
        eos_token_id: tokens that end a text ([SEP] for captions, [MASK] for texts in the published models); None: none.
        pad_token_id: fills what lies behind the end of shorter texts.
        no_repeat_ngram_size: no n consecutive tokens of the generated text occur twice; 0: no rule. With
            ``word_starts``, no n consecutive words.
        word_starts: bool [V], tensor or array: tokens that begin a word (``Detokenizer.word_starts``); the others
            continue one.
        length_penalty: of beam search, from -10 to 10.
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
        target_type_id, target_role_id, target_turn_id: of generated tokens, where the model has such tables and, for
            the last two, the sources have roles and turns.
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
    length_penalty: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False)
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

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: dict[str, Any]) -> dict[str, Any]:
        """None is the default; an array is a tensor."""
        needed = {name for name, field in cls.model_fields.items() if field.is_required()}
        given = {name: value for name, value in given.items() if value is not None or name in needed}
        starts = given.get("word_starts")
        if isinstance(starts, np.ndarray) and starts.dtype == np.bool_:
            given["word_starts"] = torch.from_numpy(starts.copy())
        elif starts is not None and not isinstance(starts, Tensor):
            kind = f"an array of {starts.dtype}" if isinstance(starts, np.ndarray) else f"a {type(starts).__name__}"
            raise ValueError(f"word_starts is {kind}, expected bool [V], a tensor or an array")
        return given

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        for new, whole, default in (
            ("max_new_tokens", "max_length", DEFAULT_LENGTH),
            ("min_new_tokens", "min_length", 0),
        ):
            if getattr(self, new) is not None and getattr(self, whole) not in (None, default):
                raise ValueError(f"{new} and {whole} are both given; give one of them")
        if self.steps < 1:
            raise ValueError(f"max_length {self.max_length} leaves no token behind bos_token_id; raise it")
        if self.least > self.steps:
            raise ValueError(f"at least {self.least} new tokens are asked for, and at most {self.steps}")
        if self.steps ** abs(self.length_penalty) > _LARGEST_PENALTY:
            raise ValueError(
                f"length_penalty {self.length_penalty} of {self.steps} tokens leaves float32; bring it nearer to 0"
            )
        return self

    @model_validator(mode="after")
    def _ways_fit(self) -> Self:
        if self.num_beams > 1 and self.do_sample:
            raise ValueError("do_sample with num_beams > 1 is not supported; take one of them")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(f"num_return_sequences {self.num_return_sequences} exceeds num_beams {self.num_beams}")
        if self.num_beams == 1 and self.num_return_sequences > 1 and not self.do_sample:
            raise ValueError("greedy search finds one text: num_return_sequences > 1 needs do_sample or num_beams")
        if self.seed is not None and self.generator is not None:
            raise ValueError("seed and generator are both given; give one of them")
        if self.bos_token_id is None and self.target_positions == "restart":
            raise ValueError("target_positions restart needs a bos_token_id: a text that goes on continues")
        if any(not words for words in self.bad_words_ids):
            raise ValueError("bad_words_ids holds an empty sequence, which would forbid everything; remove it")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        sampling = (self.temperature, self.top_k or DEFAULT_TOP_K, self.top_p) != (1.0, DEFAULT_TOP_K, 1.0)
        if not self.do_sample and sampling:
            raise ValueError("temperature, top_k and top_p belong to do_sample; set it, or leave them out")
        if not self.do_sample and (self.seed is not None or self.generator is not None):
            raise ValueError("seed and generator belong to do_sample; set it, or leave them out")
        if self.num_beams == 1 and (self.length_penalty != 1 or self.early_stopping):
            raise ValueError(
                "length_penalty and early_stopping belong to beam search; set num_beams, or leave them out"
            )
        if self.early_stopping and self.scoring == "official":
            raise ValueError("early_stopping is of scoring paddlenlp and huggingface; official has no pool to stop")
        if self.word_starts is not None and not self.no_repeat_ngram_size:
            raise ValueError("word_starts belongs to no_repeat_ngram_size; set it, or leave word_starts out")
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
    def suppressed(self) -> frozenset[int]:
        """Tokens that are never generated."""
        return frozenset({*self.suppress_tokens, *(words[0] for words in self.bad_words_ids if len(words) == 1)})

    @property
    def positions(self) -> TargetPositions:
        """How the generated text counts its positions."""
        return self.target_positions or ("continue" if self.bos_token_id is None else "restart")

    def check_vocabulary(self, size: int) -> None:
        """Compare with the model's vocabulary.

        Raises:
            VlscaleError: a token lies outside, no token may be generated, there are more beams than tokens that may be
                the first, or ``word_starts`` has another size.
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
        allowed = size - len(self.suppressed | {*(self.ends if self.least else ())})
        if not allowed:
            raise VlscaleError(
                "generate: suppress_tokens, bad_words_ids and the end tokens of a least length forbid every token; "
                "forbid fewer"
            )
        if self.num_beams > allowed:
            raise VlscaleError(
                f"generate: num_beams {self.num_beams} exceeds the {allowed} tokens that may come first; lower it"
            )
        if self.do_sample and self.top_k > size:
            raise VlscaleError(f"generate: top_k {self.top_k} exceeds the vocabulary of {size} tokens; lower it")
        starts = self.word_starts
        if starts is not None and (starts.dtype != torch.bool or starts.shape != (size,)):
            raise VlscaleError(
                f"generate: word_starts is {starts.dtype} {list(starts.shape)}, expected torch.bool [{size}]"
            )

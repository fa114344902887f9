"""What may be generated next: n-grams of words against the plain definition, sampling against transformers' warpers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from vlscale.models.generation.rules import Rules
from vlscale.models.generation.settings import GenerationSettings

VOCABULARY = 6
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_new_tokens": 20}


def rules_of(vocabulary: int = VOCABULARY, **more) -> Rules:
    return Rules(GenerationSettings(**SPECIAL, **more), vocabulary, torch.device("cpu"))


def _repeats(ids: list[int], size: int, starts: list[bool]) -> bool:
    """Whether the last n words occurred before, as written down: words first, then n-grams."""
    words: list[tuple[int, ...]] = []
    for token in ids:
        if starts[token] or not words:
            words.append((token,))
        else:
            words[-1] = (*words[-1], token)
    grams = [tuple(words[end - size : end]) for end in range(size, len(words) + 1)]
    return len(grams) > 1 and grams[-1] in grams[:-1]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 14).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, VOCABULARY - 1), min_size=length, max_size=length), min_size=1, max_size=3
        )
    ),
    st.integers(1, 4),
    st.lists(st.booleans(), min_size=VOCABULARY, max_size=VOCABULARY),
)
def test_repeated_ngrams_of_words_are_those_of_the_definition(rows, size, starts):
    rules = rules_of(no_repeat_ngram_size=size, word_starts=torch.tensor(starts))
    found = rules.repeating(torch.tensor(rows))
    expected = [[_repeats([*ids, token], size, starts) for token in range(VOCABULARY)] for ids in rows]
    assert found.tolist() == expected


def test_words_differ_from_tokens():
    """5 goes on with a word: (3 5)(4)(3 5) repeats no pair of words yet, but a pair of tokens."""
    ids = torch.tensor([[3, 5, 4, 3]])
    starts = torch.tensor([True, True, True, True, True, False])
    assert not rules_of(no_repeat_ngram_size=2, word_starts=starts).repeating(ids).any()
    assert rules_of(no_repeat_ngram_size=2).repeating(ids).nonzero().tolist() == [[0, 5]]


class Largest(TorchDispatchMode):
    """The most elements that a tensor has which an operator makes, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("size", [1, 3])
def test_ngrams_cost_no_square_of_the_length(size):
    ids = torch.randint(40, (2, 1000), generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        rules_of(40, no_repeat_ngram_size=size, word_starts=torch.arange(40) % 3 > 0).repeating(ids)
    assert largest.elements == ids.numel()


def test_forbidden_sequences_are_cut_before_their_last_token():
    rules = rules_of(bad_words_ids=[[3], [4, 5], [5, 5, 4], [5, 4]], suppress_tokens=[2])
    ids = torch.tensor([[0, 3, 4], [0, 5, 5], [0, 3, 3]])
    out = rules.suppress(torch.zeros(3, 6), ids).isinf()
    assert out.tolist() == [
        [False, False, True, True, False, True],
        [False, False, True, True, True, False],
        [False, False, True, True, False, False],
    ]
    assert torch.equal(rules.suppress(torch.zeros(1, 6), ids[:1, :0]).isinf()[0], torch.tensor([0, 0, 1, 1, 0, 0]) > 0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9},
    ],
)
def test_sampling_warps_as_transformers_does(arguments):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) * 3
    expected = logits / arguments.get("temperature", 1.0)
    if "top_k" in arguments:
        expected = process.TopKLogitsWarper(arguments["top_k"])(None, expected)
    if "top_p" in arguments:
        expected = process.TopPLogitsWarper(arguments["top_p"])(None, expected)
    found = rules_of(40, do_sample=True, **arguments).warp(logits)
    assert torch.equal(found.isinf(), expected.isinf())
    assert_close(found.softmax(1), expected.softmax(1))


def test_what_is_left_out_is_never_drawn():
    rules = rules_of(40, do_sample=True, top_k=3)
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).expand(2000, 40)
    noise = torch.empty(2000, 40).exponential_(generator=torch.Generator().manual_seed(1))
    drawn = rules.draw(logits, noise)
    assert {*drawn.tolist()} == {*logits[0].topk(3).indices.tolist()}

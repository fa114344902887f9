"""Decoding with kept keys and values: equal to encoding anew, and without waiting for a GPU more than once a token."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.generation_models import MIXED, SPEAKING, SPECIAL, WAYS, anew, model_of, sources_of, speaking
from tests.models.uncached import without_cache, without_tags
from tests.models.unimo_batches import unimo_batch
from vlscale.models.generation.decoder import Decoder
from vlscale.models.generation.settings import GenerationSettings
from vlscale.models.layers import Continuation, Visibility
from vlscale.models.unimo import UnimoBatch, UnimoForPretraining, generate
from vlscale.ragged import cumulative


@torch.no_grad()
def cached(model: UnimoForPretraining, batch: UnimoBatch, targets: Tensor, **more: Any) -> Tensor:
    """The same, one token after the other."""
    settings = GenerationSettings(**SPECIAL | {"bos_token_id": int(targets[0, 0]), "max_new_tokens": 12} | more)
    decoder = Decoder(model, batch, settings, 1)
    rows = torch.arange(len(batch))
    found = [decoder.begin()]
    found += [decoder.step(tokens, None, rows.tolist(), rows) for tokens in targets[:, 1:].unbind(1)]
    return torch.stack(found, 1)


@pytest.mark.parametrize("backend", ["padded", "packed"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("tables", [{}, SPEAKING], ids=["plain", "types, roles and turns"])
def test_decoding_with_a_cache_is_encoding_anew(norm, tables, backend):
    model = model_of(norm=norm, attention_backend=backend, **tables)
    batch = sources_of(unimo_batch(MIXED, seed=3))
    batch = speaking(batch) if tables else batch
    targets = torch.randint(5, 50, (len(batch), 6), generator=torch.Generator().manual_seed(1))
    targets[:, 0] = 2
    assert_close(cached(model, batch, targets), anew(model, batch, targets), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["continue", "reference"])
def test_positions_may_go_on_behind_the_source(kind):
    model, batch = model_of(), sources_of(unimo_batch(MIXED, seed=3))
    targets = torch.randint(5, 50, (len(batch), 4), generator=torch.Generator().manual_seed(1))
    targets[:, 0] = 2
    first = batch.text_lengths.long() + (2 if kind == "continue" else 0)
    found = cached(model, batch, targets, target_positions=kind)
    assert_close(found, anew(model, batch, targets, first), rtol=0, atol=1e-5)
    assert not torch.allclose(found, anew(model, batch, targets), atol=1e-3)


def test_hypotheses_that_change_their_parents_keep_the_right_keys():
    """Three hypotheses an example, reordered and dropped at random: each must score as its tokens encoded anew do."""
    model, batch, draw = model_of(), sources_of(unimo_batch(MIXED, seed=3)), torch.Generator().manual_seed(5)
    size, beams = len(batch), 3
    decoder = Decoder(model, batch, GenerationSettings(**SPECIAL, max_new_tokens=12), beams)
    with torch.no_grad():
        decoder.begin()
        history = torch.full((size * beams, 1), 2)
        alive = torch.ones(size * beams, dtype=torch.bool)
        for _ in range(6):
            parents = torch.randint(beams, (size, beams), generator=draw) + torch.arange(size)[:, None] * beams
            parents = torch.where(alive[parents], parents, torch.arange(size * beams).view(size, beams)).flatten()
            alive = alive[parents] & (torch.rand(size * beams, generator=draw) < 0.9)
            tokens = torch.randint(5, 50, (size * beams,), generator=draw)
            history = torch.cat([history[parents], tokens[:, None]], 1)
            live = alive.nonzero()[:, 0]
            logits = decoder.step(tokens, parents, live.tolist(), live)
            for which in range(beams):
                expected = anew(model, batch, history.view(size, beams, -1)[:, which])[:, -1]
                for place, row in enumerate(live.tolist()):
                    if row % beams == which:
                        assert_close(logits[place], expected[row // beams], rtol=0, atol=1e-5)
    assert 0 < alive.sum() < size * beams


@torch.no_grad()
@pytest.mark.parametrize("backend", ["padded", "packed"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_several_new_rows_at_once_see_the_kept_ones_and_each_other_in_order(norm, backend):
    encoder = model_of(norm=norm, attention_backend=backend).encoder
    sources, targets = torch.tensor([5, 40, 1]), torch.tensor([3, 1, 4])
    joint = torch.randn(int((sources + targets).sum()), 32, generator=torch.Generator().manual_seed(0))
    cu, cu_source, cu_target = (cumulative(each) for each in (sources + targets, sources, targets))
    is_target = torch.cat([torch.arange(s + t) >= s for s, t in zip(sources.tolist(), targets.tolist(), strict=True)])
    source, target = (~is_target).nonzero()[:, 0], is_target.nonzero()[:, 0]
    whole = encoder(joint, cu, 41, visibility=Visibility(source, cu_source, 40, target, cu_target, 4))
    caches = [torch.empty(joint.shape[0], 2, 4, 8) for _ in encoder.layers]
    first = encoder.extend(joint[source], caches, Continuation(source, None, cu_source, 40, cu_source, 40))
    every = torch.arange(joint.shape[0])
    then = encoder.extend(joint[target], caches, Continuation(target, every, cu_target, 4, cu, 41, causal=True))
    assert_close(first, whole[source], rtol=0, atol=1e-5)
    assert_close(then, whole[target], rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("way", WAYS)
def test_searches_find_the_same_without_a_cache(way, norm):
    model, batch = model_of(norm=norm), without_tags(sources_of(unimo_batch(["image", "pair", "text"], seed=3)))
    arguments = {**SPECIAL, "max_new_tokens": 8, "eos_token_id": [3, 14, 21], **WAYS[way]}
    found = generate(model, batch, **arguments)
    with without_cache():
        expected = generate(model, batch, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    assert_close(found.running_scores, expected.running_scores, rtol=0, atol=1e-4)


class Waiting(TorchDispatchMode):
    """Counts operators for whose result a host must wait for a GPU."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        of_unknown_size = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.names or by_mask or of_unknown_size:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", [*WAYS, "sampling"])
def test_one_answer_is_awaited_per_token_and_two_beside(way, monkeypatch):
    """What would wait for a GPU, counted on a CPU: once for the sources, for the living per token, and for the end."""
    model, batch = model_of(attention_backend="padded"), unimo_batch(MIXED, seed=3)
    chosen = WAYS.get(way, {"do_sample": True, "top_k": 5, "top_p": 0.9})
    lists: list[str] = []
    tolist = torch.Tensor.tolist

    def counted(self: Tensor) -> Any:
        code = sys._getframe(1).f_code
        if "generation" in code.co_filename:
            lists.append(code.co_name)
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr("vlscale.models.unimo.check_batch", lambda *_: None)  # looks at values on a CPU only
    waits = []
    for steps in (3, 9):
        lists.clear()
        with Waiting() as waiting:
            generate(model, batch, **SPECIAL | {"eos_token_id": None}, max_new_tokens=steps, **chosen)
        waits.append(sorted(waiting.found))
        assert lists == ["read", *["living"] * (steps - 1), "in_order"]
    assert waits == [[], []]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_generates_what_a_cpu_does(way):
    model, batch = model_of(hidden_size=64), unimo_batch(MIXED, seed=3)
    arguments = {**SPECIAL, "max_new_tokens": 6, **WAYS[way]}
    expected = generate(model, batch, **arguments)
    model, batch = model.cuda(), batch.to("cuda")
    found = generate(model, batch, **arguments)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    assert_close(found.scores.cpu(), expected.scores, rtol=0, atol=1e-4)

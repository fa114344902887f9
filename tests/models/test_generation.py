"""Searches: against trying everything, against lists, alone and in batches, in every precision."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch.testing import assert_close

from tests.models.generation_models import MIXED, SPECIAL, WAYS, anew, model_of, sources_of
from tests.models.unimo_batches import alone, unimo_batch
from vlscale.models.unimo import UnimoBatch, UnimoForPretraining, generate


@pytest.mark.parametrize("way", WAYS)
def test_what_else_is_in_the_batch_changes_nothing(way):
    model, batch = model_of(), unimo_batch(MIXED, seed=3)
    arguments = {**SPECIAL, "max_new_tokens": 8, "eos_token_id": [3, 14, 21], **WAYS[way]}
    together = generate(model, batch, **arguments)
    assert together.finished.any()
    for example in range(len(batch)):
        single = generate(model, alone(batch, example), **arguments)
        for which in range(arguments.get("num_return_sequences", 1)):
            assert together.tokens(example, which) == single.tokens(0, which)
        assert_close(together.scores[example], single.scores[0], rtol=0, atol=1e-4)


def _every_text(model: UnimoForPretraining, batch: UnimoBatch, steps: int) -> dict[tuple[int, ...], list[float]]:
    """Each text of at most ``steps`` tokens, ended by 3 where shorter, with its tokens' log-probabilities."""
    found: dict[tuple[int, ...], list[float]] = {}
    for text in itertools.product(range(model.config.vocab_size), repeat=steps):
        cut = text[: text.index(3) + 1] if 3 in text else text
        if cut not in found:
            log_probs = anew(model, batch, torch.tensor([[2, *cut[:-1]]]))[0].log_softmax(1)
            found[cut] = [float(log_probs[at, token]) for at, token in enumerate(cut)]
    return found


def test_beams_as_wide_as_the_vocabulary_find_the_best_of_all_texts():
    model = model_of(vocab_size=6, hidden_size=16)
    batch = dataclasses.replace(sources_of(unimo_batch(["image"])), input_ids=torch.zeros(0, dtype=torch.int64))
    texts = _every_text(model, batch, 2)
    worths = {
        "official": lambda scores, ended: sum(scores) / ((5 + len(scores)) / 6) ** 0.8,
        "paddlenlp": lambda scores, ended: sum(scores) / ((5 + len(scores) - ended) / 6) ** 0.8,
        "huggingface": lambda scores, ended: sum(scores) / len(scores) ** 0.8,
    }
    for scoring, worth in worths.items():
        wanted = max(texts, key=lambda text: worth(texts[text], text[-1] == 3))
        found = generate(
            model, batch, **SPECIAL, max_new_tokens=2, num_beams=6, scoring=scoring, length_penalty=0.8,
            early_stopping=False if scoring == "official" else "never",
        )  # fmt: skip
        assert found.tokens(0) == [2, *wanted]
        assert float(found.scores[0, 0]) == pytest.approx(worth(texts[wanted], wanted[-1] == 3), abs=1e-5)
        assert bool(found.finished[0, 0]) == (wanted[-1] == 3)


def _plain_pool(
    model: UnimoForPretraining, batch: UnimoBatch, end: int, steps: int, beams: int, exponent: float, early: bool
) -> list[tuple[float, list[int]]]:
    """PaddleNLP's beam search written down with lists: ended hypotheses and what they are worth, the best first."""

    def worth(summed: float, tokens: int) -> float:
        return summed / ((5 + tokens) / 6) ** exponent

    pool: list[tuple[float, list[int]]] = []
    live: list[tuple[float, list[int]]] = [(0.0, [2])]
    for step in range(steps):
        every = []
        for summed, ids in live:
            log_probs = anew(model, batch, torch.tensor([ids]))[0, -1].log_softmax(0).tolist()
            every += [(summed + log_prob, [*ids, token]) for token, log_prob in enumerate(log_probs)]
        every = sorted(every, key=lambda one: -one[0])[: 2 * beams]
        live = []
        for rank, (summed, ids) in enumerate(every):
            if ids[-1] != end:
                live.append((summed, ids))
            elif rank < beams:
                pool = sorted([*pool, (worth(summed, step), ids)], key=lambda one: -one[0])[:beams]
        live = live[:beams]
        if len(pool) == beams and (early or pool[-1][0] >= worth(every[0][0], step)):
            return pool
    return sorted(pool + [(worth(summed, steps), ids) for summed, ids in live], key=lambda one: -one[0])[:beams]


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("exponent", [0.6, 2.0])
def test_paddlenlps_pool_is_the_one_written_down_with_lists(exponent, early):
    model, batch = model_of(), sources_of(unimo_batch(["image", "pair", "text", "image and tags"], seed=3))
    endings = set()
    for end in (8, 14, 21, 25):
        found = generate(
            model, batch, **SPECIAL | {"eos_token_id": end}, max_new_tokens=6, num_beams=3, num_return_sequences=3,
            scoring="paddlenlp", length_penalty=exponent, early_stopping=early,
        )  # fmt: skip
        for example in range(len(batch)):
            expected = _plain_pool(model, alone(batch, example), end, 6, 3, exponent, early)
            assert [found.tokens(example, which) for which in range(3)] == [ids for _, ids in expected]
            assert found.scores[example].tolist() == pytest.approx([worth for worth, _ in expected], abs=1e-4)
            assert found.finished[example].tolist() == [ids[-1] == end for _, ids in expected]
            endings |= {len(ids) for _, ids in expected if ids[-1] == end}
    assert len(endings) > 2


def test_greedy_takes_the_best_token_each_time_and_sums_its_log_probabilities():
    model, batch = model_of(), unimo_batch(MIXED, seed=3)
    found = model.generate(batch, **SPECIAL, max_new_tokens=8)
    assert found.sequences.shape[:2] == (len(batch), 1)
    for example in range(len(batch)):
        tokens = found.tokens(example)
        source = sources_of(alone(batch, example))
        log_probs = anew(model, source, torch.tensor([tokens[:-1]]))[0].log_softmax(1)
        assert log_probs.argmax(1).tolist() == tokens[1:]
        assert float(log_probs.max(1).values.sum()) == pytest.approx(float(found.scores[example, 0]), abs=1e-4)
        assert bool(found.finished[example, 0]) == (tokens[-1] == 3)
        assert found.sequences[example, 0, len(tokens) :].eq(0).all()
    assert found.best() == [found.tokens(example) for example in range(len(batch))]


def test_a_text_goes_on_from_its_last_token_without_a_first_one():
    model, batch = model_of(), sources_of(unimo_batch(["text", "pair"], seed=3))
    found = model.generate(batch, **SPECIAL | {"bos_token_id": None}, max_new_tokens=1)
    encoded = model.encode(batch)
    last = encoded.cu[1:].long() - 1
    assert found.sequences[:, 0, 0].tolist() == model.word_head(encoded.hidden[last]).argmax(1).tolist()
    later = model.generate(batch, **SPECIAL | {"bos_token_id": None}, max_new_tokens=3)
    new = later.sequences[:, 0]
    expected = anew(model, batch, new[:, :2], batch.text_lengths.long() + 2).argmax(2)
    going_on = later.lengths[:, 0] == 3
    assert torch.equal(expected[going_on], new[going_on, 1:])


def test_sampling_is_reproducible_and_follows_the_distribution():
    model, batch = model_of(vocab_size=8, hidden_size=16), unimo_batch(["image"])
    batch = dataclasses.replace(batch, prefix_len=None, input_ids=torch.zeros(0, dtype=torch.int64))
    arguments = {**SPECIAL, "max_new_tokens": 1, "do_sample": True, "temperature": 1.5, "num_return_sequences": 8000}
    first = generate(model, batch, **arguments, seed=1)
    again = generate(model, batch, **arguments, generator=torch.Generator().manual_seed(1))
    other = generate(model, batch, **arguments, seed=2)
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    share = first.sequences[0, :, 1].bincount(minlength=8) / 8000
    expected = (anew(model, batch, torch.tensor([[2]]))[0, 0] / 1.5).softmax(0)
    assert_close(share, expected, rtol=0, atol=4 * 0.5 / 8000**0.5)
    assert first.scores[0].eq(first.scores[0].sort(descending=True).values).all()


def test_drawn_texts_end_differ_and_are_padded():
    model, batch = model_of(), unimo_batch(["pair", "image", "text"], seed=1)
    found = generate(
        model, batch, **SPECIAL | {"eos_token_id": list(range(3, 15))}, max_new_tokens=10, do_sample=True,
        temperature=2.0, top_k=40, top_p=0.95, num_return_sequences=4, seed=3,
    )  # fmt: skip
    assert found.sequences.shape[:2] == (3, 4)
    assert found.finished.any()
    for example, which in itertools.product(range(3), range(4)):
        tokens = found.tokens(example, which)
        ended = [at for at, token in enumerate(tokens) if 3 <= token < 15]
        assert ended == ([len(tokens) - 1] if found.finished[example, which] else [])
        assert found.sequences[example, which, len(tokens) :].eq(0).all()
    assert len({tuple(found.tokens(0, which)) for which in range(4)}) > 1


@pytest.mark.parametrize("way", [*WAYS, "sampling"])
def test_running_scores_stay_what_they_are_behind_the_end(way):
    chosen = WAYS.get(way, {"do_sample": True, "seed": 1, "num_return_sequences": 3})
    ending = {**SPECIAL, "eos_token_id": [3, 6, 14, 21, 30, 36]}
    found = generate(model_of(), unimo_batch(MIXED, seed=3), **ending, max_new_tokens=9, **chosen)
    last = found.running_scores.gather(2, found.lengths[:, :, None] - 1)
    behind = torch.arange(found.sequences.shape[2]) >= found.lengths[:, :, None]
    assert behind.any()
    assert torch.equal(found.running_scores[behind], last.expand_as(found.running_scores)[behind])
    assert last.lt(0).all()


def test_least_and_largest_lengths_count_as_in_hugging_face():
    model, batch = model_of(), unimo_batch(MIXED, seed=3)
    ending = {**SPECIAL, "eos_token_id": list(range(3, 45))}
    free = generate(model, batch, **ending, max_new_tokens=6)
    assert free.lengths.min() == 2
    for arguments in ({"min_new_tokens": 4, "max_new_tokens": 6}, {"min_length": 5, "max_length": 7}):
        for way in WAYS.values():
            chosen = {name: value for name, value in way.items() if name != "min_new_tokens"}
            found = generate(model, batch, **{**ending, **chosen, "eos_token_id": 3, **arguments})
            assert found.lengths.min() >= 5
            assert found.lengths.max() == 7
    assert generate(model, batch, **SPECIAL).sequences.shape[2] <= 20  # Hugging Face's default


def test_a_training_batch_gives_its_sources_only():
    model, batch = model_of(), unimo_batch(["caption", "text to text", "pair to text"], seed=2)
    changed = batch.input_ids.clone()
    inside = torch.cat([torch.arange(n) for n in batch.text_lengths.tolist()])
    changed[inside >= batch.prefix_len.long().repeat_interleave(batch.text_lengths.long())] = 11
    found = generate(model, batch, **SPECIAL, max_new_tokens=6)
    blind = generate(model, dataclasses.replace(batch, input_ids=changed), **SPECIAL, max_new_tokens=6)
    assert torch.equal(found.sequences, blind.sequences)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_in_float32(dtype):
    model, batch = model_of().to(dtype), unimo_batch(MIXED, seed=3)
    for way in WAYS.values():
        found = generate(model, batch, **SPECIAL, max_new_tokens=5, **way)
        assert found.scores.dtype == found.running_scores.dtype == torch.float32
        assert found.scores.isfinite().all()


def test_autocast_decodes_in_its_dtype():
    model, batch = model_of(), unimo_batch(MIXED, seed=3)
    plain = generate(model, batch, **SPECIAL, max_new_tokens=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = generate(model, batch, **SPECIAL, max_new_tokens=5, num_beams=3)
        first = generate(model, batch, **SPECIAL, max_new_tokens=1)
    assert found.scores.dtype == torch.float32
    assert found.scores.isfinite().all()
    assert_close(first.scores, plain.scores, rtol=0, atol=0.1)
    assert not torch.equal(first.scores, plain.scores)


def test_inference_mode_and_gradients_change_nothing():
    model, batch = model_of(), unimo_batch(MIXED, seed=3)
    for way in WAYS.values():
        plain = generate(model, batch, **SPECIAL, max_new_tokens=5, **way)
        with torch.inference_mode():
            inside = generate(model, batch, **SPECIAL, max_new_tokens=5, **way)
        assert torch.equal(plain.sequences, inside.sequences)
        assert not plain.scores.requires_grad

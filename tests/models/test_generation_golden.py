"""Generation against the hypotheses of UNIMO's authors' decoder, and of PaddleNLP's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.golden_batches import golden_folder
from tests.unimo_goldens import OUTPUT, _packed, load, official_batch, official_model, paddlenlp_model, read
from vlscale.convert.conversion import Wish, convert
from vlscale.models.generation.cache import KeyValueCache
from vlscale.models.generation.decoder import Decoder
from vlscale.models.unimo import UnimoBatch, UnimoForPretraining

pytestmark = pytest.mark.golden
BACKENDS = pytest.mark.parametrize("backend", ["padded", "packed"])
TAG = re.compile(r"(\w+)_beam(\d+)_min(\d+)_max(\d+)_trigram(True|False)_lp([\d.]+)_eos(MASK|SEP)")


def _searches() -> list[tuple[str, re.Match[str]]]:
    if not (golden_folder("unimo") / "official/beam_search.json").is_file():
        return []
    return [(name, match) for name in read("beam_search.json") if (match := TAG.fullmatch(name))]


def _arguments(match: re.Match[str], vocabulary: int) -> dict[str, Any]:
    """The golden run's arguments; special ids and what begins a word are told by the goldens' README."""
    return {
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": vocabulary - 1 if match[7] == "MASK" else 2,
        "num_beams": int(match[2]),
        "num_return_sequences": int(match[2]),
        "min_new_tokens": int(match[3]),
        "max_new_tokens": int(match[4]),
        **({"no_repeat_ngram_size": 3, "word_starts": torch.arange(vocabulary) % 3 != 0} if match[5] == "True" else {}),
        "length_penalty": float(match[6]),
        "target_positions": "reference" if match[1].endswith("contpos") else None,
    }


def test_there_are_golden_searches_of_every_kind():
    matches = [match for _, match in _searches()]
    assert {match[1] for match in matches} == {"seq2seq", "seq2seq_contpos", "dialog", "img2txt"}
    assert {match[5] for match in matches} == {"True", "False"}
    assert {match[7] for match in matches} == {"MASK", "SEP"}


@BACKENDS
@pytest.mark.parametrize(("name", "match"), _searches(), ids=[name for name, _ in _searches()])
def test_all_official_hypotheses_and_their_running_scores(name, match, backend):
    model = official_model(roles=match[1] == "dialog", attention_backend=backend)
    batch, _ = official_batch(load(match[1]))
    found = model.generate(batch, **_arguments(match, model.config.vocab_size))
    golden = read("beam_search.json")[name]
    assert len(golden) == len(batch)
    for example, hypotheses in enumerate(golden):
        assert [found.tokens(example, which) for which in range(len(hypotheses))] == [one["ids"] for one in hypotheses]
        for which, one in enumerate(hypotheses):
            running = found.running_scores[example, which, : len(one["ids"])]
            assert_close(running, torch.tensor(one["scores"]), **OUTPUT)
        assert_close(found.scores[example], found.scores[example].sort(descending=True).values)


def test_the_trigram_rule_decides_a_golden_search():
    """Otherwise the comparison above would not notice a rule that is never applied."""
    decided = 0
    for name, match in _searches():
        if match[5] == "True":
            model = official_model(roles=match[1] == "dialog")
            batch, _ = official_batch(load(match[1]))
            arguments = _arguments(match, model.config.vocab_size)
            del arguments["no_repeat_ngram_size"], arguments["word_starts"]
            free = model.generate(batch, **arguments)
            golden = read("beam_search.json")[name]
            decided += [free.tokens(i) for i in range(len(batch))] != [hypotheses[0]["ids"] for hypotheses in golden]
    assert decided


def _prompts(ids: Tensor) -> UnimoBatch:
    """Left-padded prompts, and one of nothing but padding, which PaddleNLP reads all the same, all at position 0."""
    real = ids != 0
    real |= ~real.any(1, keepdim=True)
    none = torch.zeros(len(ids), dtype=torch.int64)
    batch = _packed(ids, real, none, None, None, real[:, :0])
    batch.text_positions = ((ids != 0).long().cumsum(1) - 1).clamp(min=0)[real]
    return batch


def _forgetful(monkeypatch: pytest.MonkeyPatch, blank: Tensor) -> None:
    """Sources of nothing but padding: seen in the first step only, where the mask hides all alike, and not counted."""
    begin = Decoder.begin

    def begin_and_forget(self: Decoder) -> Tensor:
        logits = begin(self)
        cache: KeyValueCache = self.cache
        cache._of_source = cache._of_source.masked_fill(blank, 0)
        cache._lengths = cache._of_source.tolist()
        self._first = self._first.masked_fill(blank, 0)
        return logits

    monkeypatch.setattr(Decoder, "begin", begin_and_forget)


def _converted(file: str, folder: Path) -> UnimoForPretraining:
    """A published file after ``vlscale convert``."""
    source = golden_folder("unimo") / "paddlenlp"
    convert(Wish(source / file, folder / "ours", model=str(source / "config.json")))
    return UnimoForPretraining.from_pretrained(folder / "ours")


@pytest.mark.parametrize("form", ["padded", "packed", "model_state.pdparams", "model_state_protocol2.pdparams"])
def test_paddlenlp_greedy_and_beams(monkeypatch, tmp_path, form):
    golden, config = load("paddlenlp_io", "paddlenlp"), read("config.json", "paddlenlp")
    converted = form.endswith(".pdparams")
    model = _converted(form, tmp_path) if converted else paddlenlp_model(attention_backend=form)
    prompts = _prompts(golden["in.gen_ids"])
    _forgetful(monkeypatch, (golden["in.gen_ids"] == 0).all(1))
    special = {
        "bos_token_id": None,
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "suppress_tokens": [config[f"{name}_token_id"] for name in ("unk", "pad", "bos")],
    }
    assert {name for name in config["generate"]} == {"greedy", "beam4_lp0.6"}
    chosen = config["generate"]["greedy"]
    greedy = model.generate(prompts, max_new_tokens=chosen["max_length"], **special)
    assert greedy.sequences[:, 0].tolist() == golden["out.gen_greedy_ids"].tolist()
    assert_close(_mean_logits(model, prompts, greedy.sequences[:, 0])[:2], golden["out.gen_greedy_scores"][:2, 0])
    chosen = config["generate"]["beam4_lp0.6"]
    beams = model.generate(
        prompts,
        scoring="paddlenlp",
        num_beams=chosen["num_beams"],
        length_penalty=chosen["length_penalty"],
        max_new_tokens=chosen["max_length"],
        min_new_tokens=chosen["min_length"],
        **special,
    )
    assert beams.sequences[:, 0].tolist() == golden["out.gen_beam4_lp0.6_ids"].tolist()
    # Of the third prompt nothing but the mask's -1e4 is left in float32, there: it costs digits.
    assert_close(beams.scores[:2], golden["out.gen_beam4_lp0.6_scores"][:2], rtol=0, atol=2e-5)
    assert_close(beams.scores[2:], golden["out.gen_beam4_lp0.6_scores"][2:], rtol=0, atol=2e-3)


@torch.no_grad()
def _mean_logits(model: UnimoForPretraining, prompts: UnimoBatch, generated: Tensor) -> Tensor:
    """What PaddleNLP calls the score of a greedy text: the mean of its tokens' logits; encoded anew."""
    means = []
    for example in range(len(prompts)):
        of_text = slice(*prompts.cu_text[example : example + 2].tolist())
        text, new = prompts.input_ids[of_text], generated[example]
        ids = torch.cat([text, new])[None]
        counts = torch.zeros(1, dtype=torch.int64)
        batch = _packed(ids, torch.ones_like(ids, dtype=torch.bool), counts, None, None, torch.ones(1, 0).bool())
        batch.prefix_len = torch.tensor([text.numel()], dtype=torch.int32)
        at = torch.arange(text.numel() - 1, ids.numel() - 1)
        means.append(model.mlm_logits(model.encode(batch), at).gather(1, new[:, None]).mean())
    return torch.stack(means)

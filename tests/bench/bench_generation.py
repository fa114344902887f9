"""Generation with a cache of keys and values beside encoding every hypothesis anew, in one process on one thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.bench.timing import medians
from tests.models.uncached import without_cache
from vlscale.models.unimo import Generated, UnimoBatch, UnimoConfig, UnimoForPretraining
from vlscale.ragged import cumulative

RUNS = 3
SPECIAL = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
"""No end token: every text has the same length, whatever the random weights say."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam 5": {"num_beams": 5, "length_penalty": 0.6},
    "beam 5, trigrams": {"num_beams": 5, "length_penalty": 0.6, "no_repeat_ngram_size": 3},
}


@dataclass(frozen=True)
class Case:
    """One model and one kind of source."""

    name: str
    config: UnimoConfig
    examples: int
    regions: int
    words: int
    tokens: int
    ways: tuple[str, ...]


SMALL = UnimoConfig(
    vocab_size=8000, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024,
    initializer="fan_in",
)  # fmt: skip
CASES = (
    Case("6 layers of 256, captions of 36 regions", SMALL, 8, 36, 0, 20, tuple(WAYS)),
    Case("6 layers of 256, texts of 80 tokens", SMALL, 4, 0, 80, 24, ("greedy", "beam 5")),
    Case("unimo-base, captions of 36 regions", UnimoConfig(), 2, 36, 0, 20, ("greedy",)),
)


def sources(case: Case) -> UnimoBatch:
    """Random images or texts, of lengths around the case's."""
    draw = torch.Generator().manual_seed(0)

    def around(number: int) -> torch.Tensor:
        return torch.randint(number - number // 4, number + number // 4 + 1, (case.examples,), generator=draw)

    words, regions = around(case.words), around(case.regions)
    total, corner = int(regions.sum()), torch.rand(int(regions.sum()), 2, generator=draw) * 0.5
    rows = torch.arange(case.examples)
    return UnimoBatch(
        task="bench",
        dataset="bench",
        input_ids=torch.randint(4, case.config.vocab_size, (int(words.sum()),), generator=draw),
        cu_text=cumulative(words),
        features=torch.randn(total, case.config.feature_dim, generator=draw),
        boxes=torch.cat([corner, corner + 0.3], 1),
        cu_regions=cumulative(regions),
        passes=rows, examples=rows, images=rows, group=rows.int(),
        region_rows=torch.arange(total),
    )  # fmt: skip


def measure(case: Case, runs: int = RUNS) -> list[dict[str, Any]]:
    """Seconds of both ways to decode, and whether they found the same texts."""
    torch.manual_seed(0)
    model, batch, rows = UnimoForPretraining(case.config).eval(), sources(case), []
    for way in case.ways:
        arguments = {**SPECIAL, **WAYS[way], "max_new_tokens": case.tokens}

        def cached(arguments: dict[str, Any] = arguments) -> Generated:
            return model.generate(batch, **arguments)

        def anew(cached: Callable[[], Generated] = cached) -> Generated:
            with without_cache():
                return cached()

        same = torch.equal(cached().sequences, anew().sequences)
        seconds = medians({"cached": cached, "anew": anew}, runs)
        row = {"case": case.name, "way": way, "examples": case.examples, "tokens": case.tokens, "same_texts": same}
        row |= {"cached_s": seconds["cached"], "anew_s": seconds["anew"], "ratio": seconds["anew"] / seconds["cached"]}
        row["tokens_per_s"] = case.examples * case.tokens / seconds["cached"]
        print(
            f"{case.name:<42} {way:<17} {seconds['cached']:9.3f} {seconds['anew']:9.3f} {row['ratio']:7.1f} "
            f"{row['tokens_per_s']:10.1f}  {'same' if same else 'DIFFERENT'}",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> list[dict[str, Any]]:
    """Print both beside each other."""
    torch.set_num_threads(1)
    print(f"{'':<42} {'':<17} {'cached s':>9} {'anew s':>9} {'ratio':>7} {'tokens/s':>10}  texts")
    return [row for case in CASES for row in measure(case)]

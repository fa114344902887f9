"""Training the encoder on real tokens only, beside Hugging Face's models of the same size on padded ones.

A step is forward, backward and AdamW, on examples whose lengths are UNITER's (``uniter_lengths.npz``): texts of 5 to 60
word pieces with 10 to 100 regions (adaptive), or with 36 (fixed). Every model has the same width, layers and heads and
sees the same examples. ``dynamic`` pads to the longest of the batch, ``fixed`` to 62 + 100 positions; ``eager`` is
attention in plain operators on a mask, as UNITER's own code has it. Ratios are of real tokens per second, medians of
interleaved steps in one process. FLOPs are counted: 24 H^2 per token and layer in matrix products, 4 L H per token and
layer in attention, times three for a step. The model FLOPs utilisation (MFU) is of real tokens, and once more of all
positions that a model computes; its peak is the GPU's table value, on a CPU a large matrix product measured beside.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.bench.bench_plan import load_lengths
from tests.bench.timing import medians
from vlscale.models.uniter import UniterForPretraining
from vlscale.ragged import RaggedBatch, cumulative
from vlscale.train.metrics import peak_flops

FEATURES = 2048
LONGEST_TEXT, LONGEST_IMAGE, VOCABULARY = 62, 100, 1000
OURS, YARDSTICK = "vlscale, packed", "a large product"


@dataclass(frozen=True)
class Setting:
    """What is measured: examples of a batch, layers, width, and how often.

    Attributes:
        device, dtype: of the computation; half precision is autocast over float32 weights.
    """

    rows: int
    layers: int
    hidden: int
    runs: int = 5
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


SETTINGS = {
    "cpu": (Setting(32, 3, 768), Setting(16, 2, 1024)),
    "cuda": (
        Setting(256, 12, 768, 20, "cuda", torch.bfloat16),
        Setting(128, 24, 1024, 20, "cuda", torch.bfloat16),
    ),
}
"""On a CPU a few layers of uniter-base's and uniter-large's width; on a GPU all of them."""


@dataclass(frozen=True)
class Examples:
    """Lengths of a batch, and its content as both kinds of model take it.

    Attributes:
        text, regions: int64 [B].
        batch: packed.
    """

    text: np.ndarray
    regions: np.ndarray
    batch: RaggedBatch

    @property
    def lengths(self) -> np.ndarray:
        """Positions of each example."""
        return self.text + self.regions

    @property
    def tokens(self) -> int:
        """Real positions of all."""
        return int(self.lengths.sum())


def make_examples(adaptive: bool, rows: int, device: str = "cpu") -> Examples:
    """The first ``rows`` of the lengths, with random content."""
    lengths = load_lengths()
    text = np.minimum(lengths.tokens[:rows].astype(np.int64) + 2, LONGEST_TEXT)
    regions = lengths.regions[:rows].astype(np.int64) if adaptive else np.full(rows, 36)
    tokens, boxes = int(text.sum()), int(regions.sum())
    batch = RaggedBatch(
        task="mlm",
        dataset="bench",
        input_ids=torch.randint(5, VOCABULARY, (tokens,)),
        cu_text=cumulative(torch.from_numpy(text)),
        features=torch.randn(boxes, FEATURES),
        boxes=torch.tensor([0.1, 0.1, 0.6, 0.6]).repeat(boxes, 1),
        cu_regions=cumulative(torch.from_numpy(regions)),
        passes=torch.zeros(rows, dtype=torch.long),
        examples=torch.arange(rows),
        images=torch.arange(rows),
        group=torch.arange(rows, dtype=torch.int32),
        region_rows=torch.arange(boxes),
    )
    return Examples(text, regions, batch.to(torch.device(device)))


def flops(lengths: np.ndarray, layers: int, hidden: int) -> float:
    """Operations of a training step on sequences of these lengths."""
    return float(3 * layers * (24 * hidden**2 * lengths.sum() + 4 * hidden * (lengths.astype(np.float64) ** 2).sum()))


def _sizes(setting: Setting) -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": setting.hidden, "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.hidden // 64, "intermediate_size": 4 * setting.hidden,
    }  # fmt: skip


@dataclass(frozen=True)
class Way:
    """A model on the examples.

    Attributes:
        model: whose parameters are trained.
        loss: a forward pass.
        positions: lengths of the rows that it computes, padding included.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    positions: np.ndarray


def ours(examples: Examples, setting: Setting) -> Way:
    """vlscale's encoder on the packed batch."""
    config = {**_sizes(setting), "feature_dim": FEATURES, "num_classes": 2}
    model = UniterForPretraining(config).to(setting.device)
    return Way(model, lambda: model.encode(examples.batch).hidden.float().square().mean(), examples.lengths)


def visual_bert(examples: Examples, setting: Setting, fixed: bool) -> Way:
    """``VisualBertModel``: words and regions padded apart."""
    from transformers import VisualBertConfig, VisualBertModel

    wide = LONGEST_TEXT if fixed else int(examples.text.max())
    tall = LONGEST_IMAGE if fixed else int(examples.regions.max())
    ids, words = _pad(examples.batch.input_ids, examples.text, wide)
    features, boxes = _pad(examples.batch.features, examples.regions, tall)
    mask = torch.cat([words, boxes], 1)
    model = VisualBertModel(VisualBertConfig(**_sizes(setting), visual_embedding_dim=FEATURES)).to(setting.device)

    def loss() -> Tensor:
        out = model(
            input_ids=ids, attention_mask=words.long(), visual_embeds=features, visual_attention_mask=boxes.long()
        ).last_hidden_state
        return (out.float().square() * mask[..., None]).sum() / (mask.sum() * setting.hidden)

    return Way(model, loss, np.full(len(ids), wide + tall))


def bert(examples: Examples, setting: Setting, fixed: bool, attention: str = "sdpa") -> Way:
    """A ``BertModel`` over joint sequences of the same lengths, words throughout, padded once."""
    from transformers import BertConfig, BertModel

    longest = LONGEST_TEXT + LONGEST_IMAGE if fixed else int(examples.lengths.max())
    config = BertConfig(**_sizes(setting), max_position_embeddings=512, attn_implementation=attention)
    model = BertModel(config, add_pooling_layer=False).to(setting.device)
    lengths = torch.as_tensor(examples.lengths, device=setting.device)
    mask = torch.arange(longest, device=setting.device) < lengths[:, None]
    joined = torch.randint(5, VOCABULARY, mask.shape, device=setting.device)

    def loss() -> Tensor:
        out = model(input_ids=joined, attention_mask=mask.long()).last_hidden_state
        return (out.float().square() * mask[..., None]).sum() / (mask.sum() * setting.hidden)

    return Way(model, loss, np.full(len(mask), longest))


def _pad(rows: Tensor, lengths: np.ndarray, width: int) -> tuple[Tensor, Tensor]:
    """Rows [N, ...] as [B, width, ...], and bool [B, width] where they are."""
    mask = torch.arange(width, device=rows.device) < torch.as_tensor(lengths, device=rows.device)[:, None]
    out = rows.new_zeros(*mask.shape, *rows.shape[1:])
    out[mask] = rows
    return out, mask


def step_of(way: Way, setting: Setting) -> Callable[[], None]:
    """Forward, backward, optimiser."""
    optimiser = torch.optim.AdamW(way.model.parameters(), lr=1e-5, fused=True)
    way.model.train()

    def step() -> None:
        with torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32):
            loss = way.loss()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def rivals(examples: Examples, setting: Setting) -> dict[str, Callable[[], Way]]:
    """Name -> what makes the rival."""
    made: dict[str, Callable[[], Way]] = {}
    for kind, fixed in (("dynamic", False), ("fixed", True)):
        made[f"VisualBertModel, {kind}"] = partial(visual_bert, examples, setting, fixed)
        made[f"BertModel, {kind}"] = partial(bert, examples, setting, fixed)
        made[f"BertModel, {kind}, eager"] = partial(bert, examples, setting, fixed, "eager")
    return made


def measure(adaptive: bool, setting: Setting, only: str = "") -> list[dict[str, Any]]:
    """A row for every model on the same examples, ours first; of the rivals those whose name contains ``only``."""
    torch.manual_seed(0)
    examples = make_examples(adaptive, setting.rows, setting.device)
    ways = {OURS: ours(examples, setting)}
    ways |= {name: make() for name, make in rivals(examples, setting).items() if only in name}
    found = medians(
        {name: step_of(way, setting) for name, way in ways.items()} | _yardstick(setting), setting.runs, setting.device
    )
    peak = _peak(setting, found.pop(YARDSTICK, None))
    real = flops(examples.lengths, setting.layers, setting.hidden)
    return [
        {
            "regions": "10-100" if adaptive else "36", "layers": setting.layers, "hidden": setting.hidden,
            "examples": setting.rows, "dtype": str(setting.dtype), "way": name, "seconds": seconds,
            "times": seconds / found[OURS], "tokens_per_s": examples.tokens / seconds,
            "mfu_real": peak and real / seconds / peak,
            "mfu_padded": peak and flops(ways[name].positions, setting.layers, setting.hidden) / seconds / peak,
        }
        for name, seconds in found.items()
    ]  # fmt: skip


def _yardstick(setting: Setting) -> dict[str, Callable[[], object]]:
    """On a CPU the peak is what a large product reaches; a GPU's stands in a table."""
    if setting.device != "cpu":
        return {}
    a = torch.randn(2048, 2048, dtype=setting.dtype)
    return {YARDSTICK: lambda: a @ a}


def _peak(setting: Setting, seconds: float | None) -> float | None:
    if seconds is not None:
        return 2 * 2048.0**3 / seconds
    return peak_flops(torch.device(setting.device), "bf16" if setting.dtype == torch.bfloat16 else "fp32")


def main() -> list[dict[str, Any]]:
    """Print the tables and return their rows."""
    before, rows = torch.get_num_threads(), []
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for setting in SETTINGS["cuda" if torch.cuda.is_available() else "cpu"]:
        for adaptive in (True, False):
            regions = "10 to 100 regions" if adaptive else "36 regions"
            what = f"{setting.layers} layers of {setting.hidden}, {setting.dtype}, {setting.rows} examples, {regions}"
            print(f"\n{what}, {torch.get_num_threads()} thread(s)")
            found = measure(adaptive, setting)
            for row in found:
                utilised = (f"{100 * row[key]:5.1f} %" if row[key] else "   ?" for key in ("mfu_real", "mfu_padded"))
                print(f"{row['way']:26} {row['tokens_per_s']:9,.0f} real tokens/s   {row['times']:5.2f}x the time   "
                      f"MFU {' real, '.join(utilised)} padded", flush=True)  # fmt: skip
            rows += found
    torch.set_num_threads(before)
    return rows


if __name__ == "__main__":
    main()

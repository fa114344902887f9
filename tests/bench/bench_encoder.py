"""Training the encoder on real tokens only, beside Hugging Face's models of the same size on padded ones.

A step is forward, backward and AdamW, on examples whose lengths are UNITER's (``uniter_lengths.npz``): texts of 5 to 60
word pieces with 10 to 100 regions (adaptive), or with 36 (fixed). Every model has the same width, layers and heads and
sees the same examples. ``dynamic`` pads to the longest of the batch, ``fixed`` to 62 + 100 positions; ``eager`` is
attention in plain operators on a mask, as UNITER's own code has it. ``UNITER, padded`` is vlscale's own UNITER computed
that way, all else being equal. Ratios are of real tokens per second, medians of interleaved steps in one process. FLOPs
are counted: 24 H^2 per token and layer in matrix products, 4 L H per token and layer in attention, times three for a
step. The model FLOPs utilisation (MFU) is of real tokens, and once more of all positions that a model computes. Its
peak is the table value of a GPU; on a CPU the best run of two products measured between the steps, a large square and
the model's own widest. A row above its peak is marked: then the peak is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.bench_plan import load_lengths
from tests.bench.timing import with_best
from vlscale.models.layers import SelfAttention
from vlscale.models.uniter import UniterForPretraining
from vlscale.ragged import RaggedBatch, cumulative
from vlscale.train.metrics import peak_flops

FEATURES = 2048
LONGEST_TEXT, LONGEST_IMAGE, VOCABULARY = 62, 100, 1000
OURS = "vlscale, packed"
SQUARE = 2048


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
    "cpu": (Setting(32, 3, 768), Setting(32, 2, 1024)),
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
    model = _uniter(setting)
    return Way(model, lambda: model.encode(examples.batch).hidden.float().square().mean(), examples.lengths)


def _uniter(setting: Setting) -> UniterForPretraining:
    return UniterForPretraining({**_sizes(setting), "feature_dim": FEATURES, "num_classes": 2}).to(setting.device)


def padded_uniter(examples: Examples, setting: Setting, fixed: bool) -> Way:
    """vlscale's UNITER with the same parameters on padded rows, its attention in plain operators on a mask."""
    model, longest = _uniter(setting), LONGEST_TEXT + LONGEST_IMAGE if fixed else int(examples.lengths.max())
    rows = Padded.of(examples, longest, setting.device)

    def loss() -> Tensor:
        hidden = padded_hidden(model, examples.batch, rows)
        return (hidden.float().square() * rows.mask[..., None]).sum() / (rows.mask.sum() * setting.hidden)

    return Way(model, loss, np.full(len(rows.mask), longest))


@dataclass(frozen=True)
class Padded:
    """Where the positions of a batch lie in rows of one length L.

    Attributes:
        mask: bool [B, L], true at real positions.
        text_slots, region_slots: int64 [Nt] and [Nr], position in the flattened rows.
    """

    mask: Tensor
    text_slots: Tensor
    region_slots: Tensor

    @classmethod
    def of(cls, examples: Examples, longest: int, device: str) -> Padded:
        """Text first, its regions behind it, then padding."""
        starts = np.arange(len(examples.text)) * longest
        text, regions = (
            np.concatenate([start + np.arange(count) for start, count in zip(begin, counts, strict=True)])
            for begin, counts in ((starts, examples.text), (starts + examples.text, examples.regions))
        )
        mask = np.arange(longest) < examples.lengths[:, None]
        return cls(*(torch.from_numpy(array).to(device) for array in (mask, text, regions)))


def padded_hidden(model: UniterForPretraining, batch: RaggedBatch, rows: Padded) -> Tensor:
    """Return [B, L, H], what the (post-norm) encoder makes of padded rows; linear maps and norms run on all of them."""
    examples, longest = rows.mask.shape
    text, regions = model.embed_text(batch), model.embed_regions(batch)
    slots = torch.cat([rows.text_slots, rows.region_slots])
    flat = text.new_zeros(examples * longest, text.shape[1]).index_copy(0, slots, torch.cat([text, regions]))
    hidden = flat.view(examples, longest, -1)
    bias_B11L = torch.where(rows.mask, 0.0, -10_000.0)[:, None, None]
    for layer in model.encoder.layers:
        hidden = layer.attention_norm(hidden + layer.dropout(_eager_attention(layer.attention, hidden, bias_B11L)))
        hidden = layer.ffn_norm(hidden + layer.dropout(layer.ffn(hidden)))
    return hidden


def _eager_attention(attention: SelfAttention, hidden_BLH: Tensor, bias_B11L: Tensor) -> Tensor:
    examples, longest, width = hidden_BLH.shape
    parts = attention.qkv(hidden_BLH).view(examples, longest, 3, attention.heads, width // attention.heads)
    q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
    scores = q @ k.transpose(2, 3) / (width // attention.heads) ** 0.5 + bias_B11L
    weights = F.dropout(scores.softmax(-1), attention.dropout, attention.training)
    return attention.out((weights @ v).transpose(1, 2).reshape(examples, longest, width))


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
        made[f"UNITER, padded, {kind}, eager"] = partial(padded_uniter, examples, setting, fixed)
    return made


def measure(adaptive: bool, setting: Setting, only: Collection[str] = ()) -> list[dict[str, Any]]:
    """A row for every model on the same examples, ours first; if ``only`` names rivals, of these alone.

    ``above_peak`` is true where a model computes more than the machine can, by what was measured.
    """
    torch.manual_seed(0)
    examples = make_examples(adaptive, setting.rows, setting.device)
    ways = {OURS: ours(examples, setting)}
    ways |= {name: make() for name, make in rivals(examples, setting).items() if not only or name in only}
    steps = {name: step_of(way, setting) for name, way in ways.items()}
    found, best = with_best(steps, yardsticks(examples, setting), setting.runs, setting.device)
    peak = best or peak_flops(torch.device(setting.device), "bf16" if setting.dtype == torch.bfloat16 else "fp32")
    rows = []
    for name, seconds in found.items():
        real, padded = (
            peak and flops(lengths, setting.layers, setting.hidden) / seconds / peak
            for lengths in (examples.lengths, ways[name].positions)
        )
        rows.append({
            "regions": "10-100" if adaptive else "36", "layers": setting.layers, "hidden": setting.hidden,
            "examples": setting.rows, "dtype": str(setting.dtype), "way": name, "seconds": seconds,
            "times": seconds / found[OURS], "tokens_per_s": examples.tokens / seconds,
            "mfu_real": real, "mfu_padded": padded, "above_peak": padded and padded > 1,
        })  # fmt: skip
    return rows


def yardsticks(examples: Examples, setting: Setting) -> dict[str, tuple[Callable[[], object], float]]:
    """On a CPU, products and their operations; a GPU's peak stands in a table."""
    if setting.device != "cpu":
        return {}
    square = torch.randn(SQUARE, SQUARE, dtype=setting.dtype)
    rows, wide = (
        torch.randn(size, setting.hidden, dtype=setting.dtype) for size in (examples.tokens, 4 * setting.hidden)
    )
    return {
        "a large product": (lambda: square @ square, 2.0 * SQUARE**3),
        "a layer's product": (lambda: rows @ wide.T, 2.0 * rows.numel() * len(wide)),
    }


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
                flag = "  ABOVE THE PEAK" if row["above_peak"] else ""
                print(f"{row['way']:30} {row['tokens_per_s']:9,.0f} real tokens/s   {row['times']:5.2f}x the time   "
                      f"MFU {' real, '.join(utilised)} padded{flag}", flush=True)  # fmt: skip
            rows += found
    torch.set_num_threads(before)
    return rows


if __name__ == "__main__":
    main()

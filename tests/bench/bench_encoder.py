"""Training the encoder on real tokens only, beside Hugging Face's models of the same size on padded ones.

A step is forward, backward and AdamW, on examples whose lengths are UNITER's (``uniter_lengths.npz``): texts of 5 to 60
word pieces with 10 to 100 regions (adaptive), or with 36 (fixed). Every model has the same width, layers and heads and
sees the same examples. ``dynamic`` pads to the longest of the batch, ``fixed`` to 62 + 100 positions. Attention is
PyTorch's, as each model chooses it. Ratios are of real tokens per second, medians of interleaved steps in one process.
FLOPs are counted: 24 H^2 per token and layer in matrix products, 4 L H per token and layer in attention, times three
for a step.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tests.bench.bench_plan import load_lengths
from vlscale.models.uniter import UniterForPretraining
from vlscale.ragged import RaggedBatch, cumulative

ROWS, RUNS, LAYERS, HIDDEN, FEATURES = 32, 5, 3, 768, 2048
LONGEST_TEXT, LONGEST_IMAGE, VOCABULARY = 62, 100, 1000


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
    def tokens(self) -> int:
        """Real positions."""
        return int(self.text.sum() + self.regions.sum())


def make_examples(adaptive: bool, rows: int = ROWS, device: str = "cpu") -> Examples:
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


def ours(examples: Examples, layers: int, hidden: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """vlscale's encoder on the packed batch."""
    model = UniterForPretraining({
        "vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden, "feature_dim": FEATURES, "num_classes": 2,
    })  # fmt: skip
    return model, lambda: model.encode(examples.batch).hidden.float().square().mean()


def padded(
    examples: Examples, layers: int, hidden: int, kind: str, fixed: bool
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """``VisualBertModel``, or a ``BertModel`` as long, on padded rows; the padding does not enter the loss."""
    from transformers import BertConfig, BertModel, VisualBertConfig, VisualBertModel

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "intermediate_size": 4 * hidden,
    }  # fmt: skip
    wide = LONGEST_TEXT if fixed else int(examples.text.max())
    tall = LONGEST_IMAGE if fixed else int(examples.regions.max())
    device = examples.batch.features.device
    ids, words = _pad(examples.batch.input_ids, examples.text, wide)
    features, boxes = _pad(examples.batch.features, examples.regions, tall)
    if kind == "VisualBertModel":
        model: nn.Module = VisualBertModel(VisualBertConfig(**sizes, visual_embedding_dim=FEATURES)).to(device)

        def loss() -> Tensor:
            mask = torch.cat([words, boxes], 1)
            out = model(
                input_ids=ids, attention_mask=words.long(), visual_embeds=features, visual_attention_mask=boxes.long()
            ).last_hidden_state
            return (out.float().square() * mask[..., None]).sum() / (mask.sum() * hidden)

        return model, loss
    model = BertModel(BertConfig(**sizes, max_position_embeddings=512), add_pooling_layer=False).to(device)
    total = (examples.text + examples.regions) if not fixed else np.full(len(examples.text), wide + tall)
    longest = int(total.max())
    mask = (
        torch.arange(longest, device=device) < torch.as_tensor(examples.text + examples.regions, device=device)[:, None]
    )
    joined = torch.randint(5, VOCABULARY, (len(examples.text), longest), device=device)

    def joint_loss() -> Tensor:
        out = model(input_ids=joined, attention_mask=mask.long()).last_hidden_state
        return (out.float().square() * mask[..., None]).sum() / (mask.sum() * hidden)

    return model, joint_loss


def _pad(rows: Tensor, lengths: np.ndarray, width: int) -> tuple[Tensor, Tensor]:
    """Rows [N, ...] as [B, width, ...], and bool [B, width] where they are."""
    mask = torch.arange(width, device=rows.device) < torch.as_tensor(lengths, device=rows.device)[:, None]
    out = rows.new_zeros(*mask.shape, *rows.shape[1:])
    out[mask] = rows
    return out, mask


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward, optimiser."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def step() -> None:
        loss().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def times(steps: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Median seconds of interleaved steps."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(runs):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measure(
    adaptive: bool, rows: int = ROWS, layers: int = LAYERS, hidden: int = HIDDEN, runs: int = RUNS
) -> dict[str, float]:
    """Seconds per step of every model, on the same examples."""
    torch.manual_seed(0)
    examples = make_examples(adaptive, rows)
    steps = {"vlscale, packed": step_of(*ours(examples, layers, hidden))}
    for kind in ("VisualBertModel", "BertModel"):
        for fixed in (False, True):
            name = f"{kind}, {'fixed' if fixed else 'dynamic'}"
            steps[name] = step_of(*padded(examples, layers, hidden, kind, fixed))
    return times(steps, runs)


def main() -> None:
    """Print the tables."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"{LAYERS} layers of {HIDDEN}, {ROWS} examples, {torch.get_num_threads()} thread(s)")
    for adaptive in (True, False):
        examples = make_examples(adaptive)
        real = flops(examples.text + examples.regions, LAYERS, HIDDEN)
        print(f"\n{'10 to 100 regions' if adaptive else '36 regions'}: {examples.tokens} real tokens")
        found = measure(adaptive)
        base = found["vlscale, packed"]
        for name, seconds in found.items():
            print(f"{name:26} {examples.tokens / seconds:8,.0f} tokens/s   {seconds / base:5.2f}x the time   "
                  f"{real / seconds / 1e9:6.1f} GFLOP/s of real tokens")  # fmt: skip
    torch.set_num_threads(before)


if __name__ == "__main__":
    main()

"""What fusing would pay at UNITER's shapes: compiled blocks of the encoder beside the operators that it runs.

Forward and backward on the rows of one packed batch, dropout .1. "bias + gelu" and "dropout + residual + norm" are the
two row-wise chains of a layer, with the products around them left out; "layer" is the whole of one, products and
attention included; "word head" is the masked-language head on masked rows only, as vlscale computes it, beside all
rows. torch.compile takes any number of rows (dynamic). A chain pays as far as its share of the layer goes: the last
column is what the layer would gain if the chain alone were compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.bench_encoder import make_examples
from tests.bench.timing import medians
from vlscale.models.encoder import EncoderConfig, EncoderLayer

RUNS = {"cpu": 5, "cuda": 50}
ROWS = {"cpu": 16, "cuda": 256}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float16)}
MASKED = 0.15
VOCABULARY = 28_996


def trained(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward of ``function``, to its inputs and the parameters that it closes over."""

    def step() -> None:
        out = function(*inputs)
        out.backward(torch.ones_like(out))
        for tensor in inputs:
            tensor.grad = None

    return step


def gelu_of_bias(rows: Tensor, bias: Tensor) -> Tensor:
    """The middle of a feed-forward block."""
    return F.gelu(rows + bias)


def residual_norm(rows: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The end of each block."""
    return F.layer_norm(rows + F.dropout(branch, 0.1, True), rows.shape[-1:], weight, bias, 1e-12)


def measure(hidden: int, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of the table for one width and dtype."""
    torch.manual_seed(0)
    examples = make_examples(True, ROWS[device], device)
    cu, longest = examples.batch.cu_joint.to(torch.int32), int(examples.lengths.max())

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(True)

    rows, branch, wide = draw(examples.tokens, hidden), draw(examples.tokens, hidden), draw(examples.tokens, 4 * hidden)
    layer = EncoderLayer(
        EncoderConfig(hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=4 * hidden)
    ).to(device, dtype)
    head = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, VOCABULARY))
    head.to(device, dtype)
    fused = torch.compile(layer, dynamic=True)
    masked = torch.randperm(examples.tokens, device=device)[: int(MASKED * examples.tokens)]
    compiled = {function: torch.compile(function, dynamic=True) for function in (gelu_of_bias, residual_norm)}
    ways = {
        "layer": trained(lambda x: layer(x, cu, longest), rows),
        "layer, compiled": trained(lambda x: fused(x, cu, longest), rows),
        "bias + gelu": trained(gelu_of_bias, wide, draw(4 * hidden)),
        "bias + gelu, compiled": trained(compiled[gelu_of_bias], wide, draw(4 * hidden)),
        "dropout + residual + norm": trained(residual_norm, rows, branch, draw(hidden), draw(hidden)),
        "dropout + residual + norm, compiled": trained(
            compiled[residual_norm], rows, branch, draw(hidden), draw(hidden)
        ),
        "word head on all rows": trained(head, rows),
        "word head on masked rows": trained(lambda x: head(x[masked]), rows),
    }
    found = medians(ways, RUNS[device], device)
    return _table(found, {"hidden": hidden, "dtype": str(dtype), "tokens": examples.tokens})


def _table(found: dict[str, float], common: dict[str, Any]) -> list[dict[str, Any]]:
    """Pairs of a plain and a fused way; ``gain`` is the plain layer's time over the same layer with this part fused."""
    layer, rows = found["layer"], []
    for plain, fused, uses in (
        ("layer", "layer, compiled", 1),
        ("bias + gelu", "bias + gelu, compiled", 1),
        ("dropout + residual + norm", "dropout + residual + norm, compiled", 2),
        ("word head on all rows", "word head on masked rows", 0),
    ):
        saved = uses * (found[plain] - found[fused])
        gain = layer / (layer - saved) if uses and saved < layer else None
        rows.append({**common, "part": fused, "plain_s": found[plain], "fused_s": found[fused], "layer_gain": gain})
    return rows


def main() -> list[dict[str, Any]]:
    """Print the table and return its rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, rows = torch.get_num_threads(), []
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"{'hidden':>6} {'dtype':9} {'part':36} {'plain':>10} {'fused':>10} {'times':>6} {'the layer':>10}")
    for hidden in (768, 1024):
        for dtype in DTYPES[device]:
            torch.compiler.reset()
            for row in measure(hidden, device, dtype):
                plain, fused = (f"{1000 * row[key]:7.2f} ms" for key in ("plain_s", "fused_s"))
                gain = f"{row['layer_gain']:9.2f}x" if row["layer_gain"] else ""
                head = f"{hidden:6} {str(dtype).removeprefix('torch.'):9} {row['part']:36}"
                print(head, plain, fused, f"{row['plain_s'] / row['fused_s']:6.2f} {gain}", flush=True)
                rows.append(row)
    torch.set_num_threads(before)
    return rows


if __name__ == "__main__":
    main()

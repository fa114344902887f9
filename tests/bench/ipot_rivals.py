"""What IPOT is measured beside: the loop in PyTorch, compiled and graphed, and transport solvers of other libraries.

All of them take the same padded tensors and make as many iterations. Only the loops compute IPOT; the others compute
Sinkhorn distances or proximal steps of their own, on the same cost, and are told apart by their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlscale.kernels.ipot import cosine_cost, reference
from vlscale.kernels.ipot.function import Settings
from vlscale.ragged import cumulative

BETA, ITERATIONS = 0.5, 50
NOTHING = 1e-8
"""Weight of padding for POT, whose proximal steps take the logarithm of it and make NaN of none at all."""
Distance = Callable[[], Tensor]


@dataclass(frozen=True)
class Pairs:
    """One batch, packed for the kernels and padded for the rivals.

    Attributes:
        words, regions: packed, requiring gradients.
        cu_words, cu_regions: cumulative lengths.
        padded_words, padded_regions: [B, T, H], [B, R, H], requiring gradients.
    """

    words: Tensor
    regions: Tensor
    cu_words: Tensor
    cu_regions: Tensor
    padded_words: Tensor
    padded_regions: Tensor

    @classmethod
    def draw(
        cls, size: tuple[int, int, int, int], ragged: bool, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Pairs:
        """``size`` is examples, words, regions, hidden; ragged lengths lie between a third and all of them."""
        examples, words, regions, hidden = size
        generator = torch.Generator().manual_seed(0)

        def side(most: int) -> tuple[Tensor, Tensor, Tensor]:
            low = most // 3 if ragged else most
            counts = torch.randint(low, most + 1, (examples,), generator=generator)
            padded = torch.randn(examples, most, hidden, generator=generator).to(device, dtype)
            valid = (torch.arange(most) < counts[:, None]).to(device)
            return padded[valid].requires_grad_(True), cumulative(counts).to(device), padded.requires_grad_(True)

        (x, cu_x, wide), (y, cu_y, tall) = side(words), side(regions)
        return cls(x, y, cu_x, cu_y, wide, tall)

    @property
    def cells(self) -> int:
        """Entries of all plans, padding left out."""
        return int((self.cu_words.diff().long() * self.cu_regions.diff()).sum())

    @property
    def cost_flops(self) -> float:
        """Operations of the products that the cost cannot do without; with both gradients it is three times as many."""
        return 2.0 * self.cells * self.words.shape[1]

    @property
    def settings(self) -> Settings:
        """UNITER's, with the padded sizes."""
        return Settings(BETA, ITERATIONS, 1, self.padded_words.shape[1], self.padded_regions.shape[1])


def loop(pairs: Pairs) -> Distance:
    """The reference backend: about ten operators in each of 50 iterations."""
    lengths, counts = pairs.cu_words.diff(), pairs.cu_regions.diff()
    return lambda: reference.ipot_padded(pairs.padded_words, pairs.padded_regions, lengths, counts, pairs.settings)[0]


def compiled_loop(pairs: Pairs) -> Distance:
    """The same loop under ``torch.compile``."""
    lengths, counts, settings = pairs.cu_words.diff(), pairs.cu_regions.diff(), pairs.settings

    @torch.compile(dynamic=False)
    def compiled(words: Tensor, regions: Tensor) -> Tensor:
        return reference.ipot_padded(words, regions, lengths, counts, settings)[0]

    return lambda: compiled(pairs.padded_words, pairs.padded_regions)


def graphed_loop(pairs: Pairs) -> Distance:
    """The same loop as a CUDA graph, forward and backward: no launch costs the host anything."""
    lengths, counts, settings = pairs.cu_words.diff(), pairs.cu_regions.diff(), pairs.settings

    def run(words: Tensor, regions: Tensor) -> Tensor:
        return reference.ipot_padded(words, regions, lengths, counts, settings)[0]

    graphed = torch.cuda.make_graphed_callables(run, (pairs.padded_words, pairs.padded_regions))
    return lambda: graphed(pairs.padded_words, pairs.padded_regions)


def pot(pairs: Pairs, method: str) -> Distance:
    """POT's batched solvers: ``sinkhorn`` with the temperature beta, or ``proximal`` steps of beta."""
    import ot

    lengths, counts = pairs.cu_words.diff(), pairs.cu_regions.diff()
    sides = ((lengths, pairs.padded_words), (counts, pairs.padded_regions))
    a, b = (_weights(n, side).clamp_min(NOTHING) for n, side in sides)
    how = {"reg": BETA} if method == "sinkhorn" else {"reg": None, "inner_reg": BETA, "inner_iter": 1}

    def run() -> Tensor:
        cost = cosine_cost(pairs.padded_words, pairs.padded_regions, lengths, counts)
        found = ot.batch.solve_batch(
            cost.detach(), a=a, b=b, max_iter=ITERATIONS, tol=0, method=method, grad="detach", **how
        )
        return (cost * found.plan).sum((1, 2))

    return run


def geomloss(pairs: Pairs) -> Distance:
    """geomloss' tensorized Sinkhorn divergence, not debiased, annealed down to beta in about 50 steps."""
    from geomloss import SamplesLoss

    # Annealed from the largest squared distance, 4, down to beta.
    scaling = (BETA / 4) ** (1 / (2 * ITERATIONS))
    loss = SamplesLoss(
        "sinkhorn", p=2, blur=BETA**0.5, diameter=2.0, scaling=scaling, debias=False, backend="tensorized"
    )
    return _of_points(pairs, loss)


def flash_sinkhorn(pairs: Pairs) -> Distance:
    """flash-sinkhorn (Triton, GPUs only), the whole batch at once, alternating updates at the temperature beta."""
    from flash_sinkhorn import SamplesLoss

    loss = SamplesLoss(
        "sinkhorn", backend="alternating", eps=BETA, n_iters=ITERATIONS, half_cost=True, use_epsilon_scaling=False,
        allow_tf32=False,
    )  # fmt: skip
    return _of_points(pairs, loss)


def _of_points(pairs: Pairs, loss: Callable[..., Tensor]) -> Distance:
    """A solver of weighted points: unit vectors, whose squared distance over two is the cosine cost."""
    a, b = (
        _weights(cu.diff(), side)
        for cu, side in ((pairs.cu_words, pairs.padded_words), (pairs.cu_regions, pairs.padded_regions))
    )

    def run() -> Tensor:
        sides = (pairs.padded_words, pairs.padded_regions)
        x, y = (torch.nn.functional.normalize(side.float(), dim=-1) for side in sides)
        return loss(a, x, b, y)

    return run


def _weights(lengths: Tensor, side: Tensor) -> Tensor:
    return reference.valid(lengths, side.shape[1]).float() / lengths[:, None].float()

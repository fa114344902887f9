"""What a run says of its data before the first step: shares, and everything that is left out."""

from __future__ import annotations

from collections.abc import Mapping

from vlscale.data.plan import Plan


def data_lines(plan: Plan, held_out_left_out: Mapping[str, int]) -> list[str]:
    """One line of shares, and one for each loss of data.

    Args:
        plan: of the training.
        held_out_left_out: validation set -> texts that are too long.
    """
    too_long = [*plan.left_out.items(), *held_out_left_out.items()]
    return [
        f"data: {_shares(plan)}",
        *(f"data: {name}: {count} texts over data.max_text_tokens left out" for name, count in too_long if count),
        *(
            f"data: {name}: {count} rewritten captions over data.max_text_tokens left out"
            for name, count in plan.left_out_views.items()
            if count
        ),
        *(
            f"data: {name}: {count} texts of the first pass dropped, as UNITER's sampler drops them"
            for name, count in plan.dropped.items()
            if count
        ),
    ]


def _shares(plan: Plan) -> str:
    if plan.unit_shares:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in plan.unit_shares.items())
        return f"{plan.pairs[0][1]}, of the units of every step: {parts}"
    return ", ".join(f"{name}/{task} {share:.0%}" for (name, task), share in zip(plan.pairs, plan.shares, strict=True))

"""What fine-tuning added to a checkpoint: kept beside the model under its published names, after a prefix of ours."""

from __future__ import annotations

TASK_HEAD = "task_head."
TASK_NAMES = {
    "uniter": (
        "vqa_output.", "vcr_output.", "nlvr2_output.", "re_output.", "rank_output.", "attn1.", "attn2.", "fc.",
        "attn_pool.",
    ),
    "unimo": ("cls_out_",),
}  # fmt: skip
"""Model -> what the published names of its fine-tuned heads begin with."""


def is_task_name(name: str) -> bool:
    """Whether one of our names is of what fine-tuning added."""
    known = tuple(prefix for prefixes in TASK_NAMES.values() for prefix in prefixes)
    return name.startswith(TASK_HEAD) and name.removeprefix(TASK_HEAD).startswith(known)

"""What the names in a checkpoint say about where it comes from, and how old spellings of a name are read.

A layout is recognised by names that only it has. Those without a model in vlscale yet (ViLBERT, UniT) are still read,
cleaned of prefixes and buffers, compared and written under their published names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vlscale.convert import uniter
from vlscale.convert.fluid import is_optimizer_variable
from vlscale.convert.source import TensorSource
from vlscale.convert.steps import KeyPlan, Step
from vlscale.errors import VlscaleError, nearest


@dataclass(frozen=True)
class Layout:
    """The names of one family of checkpoints.

    Attributes:
        title: for people.
        marks: patterns; a checkpoint is of this layout if each matches the beginning of a name.
        spellings: (pattern, replacement): old or wrapped names and what they are called today.
        ignored: (pattern, why): what no model needs.
    """

    title: str
    marks: tuple[str, ...]
    spellings: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()


_NORMS = ((r"(LayerNorm\d?)\.gamma$", r"\1.weight"), (r"(LayerNorm\d?)\.beta$", r"\1.bias"))
_INDEX_BUFFERS = ((r"(.*\.)?position_ids$", "an index buffer of older versions of transformers"),)

LAYOUTS: dict[str, Layout] = {
    "vlscale": Layout("vlscale's own names", (r"text_embedder\.word\.weight$", r"(image_embedder|encoder)\.")),
    "uniter": Layout("UNITER, as published", (r"uniter\.embeddings\.word_embeddings\.weight$",)),
    "vilbert": Layout(
        "ViLBERT: beta, multi-task (12-in-1) and MMF", (r"bert\.encoder\.c_layer\.0\.", r"bert\.v_embeddings\."),
        (*_NORMS, (r"^model\.(?=bert\.|cls\.)", "")), _INDEX_BUFFERS,
    ),
    "unit": Layout(
        "UniT, as published in MMF", (r"unit_base_model\.transformer\.",),
        ((r"^detr_model\.", "unit_base_model."),), _INDEX_BUFFERS,
    ),
    "unimo": Layout("UNIMO, Paddle fluid's variables", (r"encoder_layer_0_multi_head_att_query_fc\.w_0$",)),
    "unimo-text": Layout(
        "UNIMO-text of PaddleNLP",
        (r"(unimo\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight$", r"(unimo\.)?encoder_norm\.weight$"),
    ),
    "detr": Layout(
        "DETR", (r"transformer\.encoder\.layers\.0\.self_attn\.in_proj_weight$", r"backbone\.0\.body\.conv1\.weight$")
    ),
    "resnet": Layout(
        "a torchvision ResNet", (r"conv1\.weight$", r"layer1\.0\.conv1\.weight$", r"bn1\.running_mean$"), (),
        ((r"(.*\.)?num_batches_tracked$", "a counter that evaluation does not use"),),
    ),
}  # fmt: skip
STATE_DICT = "state-dict"
"""The layout of whatever is not recognised: names are kept."""
_WRAPPERS = ("module.", "_orig_mod.")


def layout_of(names: Iterable[str], where: str, wanted: str | None = None) -> str:
    """Return the layout whose marks the names bear, or :data:`STATE_DICT`; of several the one that is ``wanted``.

    Raises:
        VlscaleError: several do and none is wanted, or the wanted one is unknown or not among them.
    """
    known = [*names]
    found = [key for key, layout in LAYOUTS.items() if _bears(known, layout)]
    if wanted is not None:
        everything = (*LAYOUTS, STATE_DICT)
        if wanted not in everything:
            raise VlscaleError(f"no layout {wanted!r}{nearest(wanted, everything)} (known: {', '.join(everything)})")
        if wanted not in (*found, STATE_DICT):
            borne = " and ".join(found) or STATE_DICT
            raise VlscaleError(f"{where}: its names are those of {borne}, not of {wanted!r}; drop --from")
        return wanted
    if len(found) > 1:
        raise VlscaleError(f"{where}: may be {' or '.join(found)}; say which with --from")
    return found[0] if found else STATE_DICT


BACKBONES = {
    "detr": (r"(backbone\.0\.body\..*)", r"unit_base_model.\1"),
    "resnet": (r"(?!fc\.)(.*)", r"unit_base_model.backbone.0.body.\1"),
}
"""Layout -> what of it UniT begins from, and its name there."""


def backbone_plan(source: TensorSource, layout: str) -> KeyPlan:
    """UniT's backbone out of a DETR or a torchvision ResNet; the rest is ignored."""
    pattern, replacement = BACKBONES[layout]
    spelled, ignored = _today(source, layout)
    taken = {today: name for today, name in spelled.items() if re.fullmatch(pattern, today)}
    steps = tuple(Step(re.sub(f"^{pattern}$", replacement, today), (name,)) for today, name in taken.items())
    why = "UniT begins from the backbone alone"
    return KeyPlan(steps, ignored=ignored | {name: why for today, name in spelled.items() if today not in taken})


def plan_of(source: TensorSource, layout: str) -> KeyPlan:
    """Lay out what becomes of each tensor: a UNITER's get vlscale's names, all others today's published ones.

    Raises:
        VlscaleError: two spellings of one name, or see :func:`vlscale.convert.uniter.import_plan`.
    """
    spelled, ignored = _today(source, layout)
    if layout == "uniter":
        plan = uniter.import_plan(spelled, heads=None)
        steps = tuple(
            Step(step.target, tuple(spelled[name] for name in step.sources), step.operation) for step in plan.steps
        )
        tied = {spelled[second]: spelled[first] for second, first in plan.tied.items()}
        return KeyPlan(steps, tied, ignored=ignored, unexpected=tuple(spelled[name] for name in plan.unexpected))
    stored = {name: today for today, name in spelled.items()}
    copies = {
        stored[second]: stored[first]
        for second, first in source.aliases.items()
        if second in stored and first in stored
    }
    steps = tuple(Step(today, (name,)) for today, name in spelled.items() if today not in copies)
    return KeyPlan(steps, copies=copies, ignored=ignored)


def _bears(names: list[str], layout: Layout) -> bool:
    today = [_spell(name, layout) for name in names]
    return all(any(re.match(mark, name) for name in today) for mark in layout.marks)


def _today(source: TensorSource, layout: str) -> tuple[dict[str, str], dict[str, str]]:
    """Today's name -> stored name, and stored name -> why it is ignored."""
    known = LAYOUTS.get(layout, Layout("", ()))
    spelled: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for name in source.tensors:
        today = _spell(name, known)
        why = next((why for pattern, why in known.ignored if re.match(pattern, today)), None)
        if layout == "unimo" and is_optimizer_variable(name, source.tensors.keys()):
            why = "the optimiser's"
        if why is not None:
            ignored[name] = why
        elif spelled.setdefault(today, name) != name:
            raise VlscaleError(f"{source.path}: {name} and {spelled[today]} are spellings of one name; remove one")
    return spelled, ignored


def _spell(name: str, layout: Layout) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    for pattern, replacement in layout.spellings:
        name = re.sub(pattern, replacement, name)
    return name


def titles() -> Mapping[str, str]:
    """Layout -> what it is, for help texts."""
    return {name: layout.title for name, layout in LAYOUTS.items()} | {STATE_DICT: "any other state dict, names kept"}

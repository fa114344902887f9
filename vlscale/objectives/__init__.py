"""Pre-training objectives: each masks a batch and turns (model, batch) into named loss terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vlscale.config import ObjectivesSection
from vlscale.data.schema import Vocabulary
from vlscale.errors import VlscaleError, nearest
from vlscale.kernels.ipot import resolve_backend
from vlscale.objectives.base import Objective, PretrainingModel, Term
from vlscale.objectives.itm import ImageTextMatching
from vlscale.objectives.masking import TokenMasking
from vlscale.objectives.mlm import MaskedLanguageModeling
from vlscale.objectives.mrm import RegionClassification, RegionClassificationKL, RegionFeatureRegression
from vlscale.objectives.unified import UnifiedLearning
from vlscale.objectives.wra import WordRegionAlignment

__all__ = ["Objective", "PretrainingModel", "Term", "build_objectives"]


def build_objectives(section: ObjectivesSection, tasks: Iterable[str], vocabulary: Vocabulary) -> dict[str, Objective]:
    """Build the objectives of ``tasks`` after the recipe's section, in the order of ``tasks``.

    Raises:
        VlscaleError: unknown task or IPOT backend, or function words that do not fit the vocabulary.
    """
    tasks = list(tasks)
    unknown = [task for task in tasks if task not in _BUILDERS]
    if unknown:
        raise VlscaleError(
            f"no objective {unknown[0]!r}{nearest(unknown[0], _BUILDERS)} (known: {', '.join(_BUILDERS)})"
        )
    return {task: _BUILDERS[task](section, vocabulary) for task in tasks}


def _mlm(section: ObjectivesSection, vocabulary: Vocabulary) -> Objective:
    joint = section.mrm.probability if section.masking == "joint" else None
    return MaskedLanguageModeling(TokenMasking.build(section.mlm, vocabulary), joint)


def _joint_tokens(section: ObjectivesSection, vocabulary: Vocabulary) -> TokenMasking | None:
    return TokenMasking.build(section.mlm, vocabulary) if section.masking == "joint" else None


def _mrfr(section: ObjectivesSection, vocabulary: Vocabulary) -> Objective:
    return RegionFeatureRegression(section.mrm.probability, _joint_tokens(section, vocabulary))


def _mrc(section: ObjectivesSection, vocabulary: Vocabulary) -> Objective:
    tokens, background = _joint_tokens(section, vocabulary), section.mrm.background_class
    return RegionClassification(section.mrm.probability, tokens, background_class=background)


def _mrckl(section: ObjectivesSection, vocabulary: Vocabulary) -> Objective:
    tokens, background = _joint_tokens(section, vocabulary), section.mrm.background_class
    return RegionClassificationKL(section.mrm.probability, tokens, background_class=background)


def _itm(section: ObjectivesSection, vocabulary: Vocabulary) -> Objective:
    if section.wra.loss == "off":
        return ImageTextMatching()
    # An unknown backend should stop the program when it starts, not at its first matching step.
    resolve_backend(section.wra.backend)
    return ImageTextMatching(WordRegionAlignment.build(section.wra, vocabulary))


def _unified(section: ObjectivesSection, vocabulary: Vocabulary) -> Objective:
    return UnifiedLearning.build(section.unified, vocabulary)


_BUILDERS: dict[str, Callable[[ObjectivesSection, Vocabulary], Objective]] = {
    "mlm": _mlm,
    "mrfr": _mrfr,
    "mrc": _mrc,
    "mrckl": _mrckl,
    "itm": _itm,
    "unified": _unified,
}

"""BLEU-4 and CIDEr of generated captions, by the scorers of COCO's caption evaluation.

The published evaluation splits words with a tokenizer that needs Java. Here captions are lower-cased and cut into runs
of letters and digits, which on captions without contractions is the same; punctuation does not count in either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlscale.errors import VlscaleError

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class CaptionScores:
    """Scores of N captions.

    Attributes:
        bleu4: of all of them together, 0..1.
        cider: float64 [N], of each; the corpus' is their mean. How much a word says is counted in the references.
    """

    bleu4: float
    cider: NDArray[np.float64]


def words_of(caption: str) -> list[str]:
    """The words of a caption, in lower case, without punctuation."""
    return _WORD.findall(caption.lower())


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Compare each caption with the references of its image.

    Args:
        captions: N of them; an empty one scores 0.
        references: at least one for each.

    Raises:
        VlscaleError: the scorers are not installed, there is nothing to score, or an image has no reference.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ImportError as error:
        raise VlscaleError(f"captions cannot be scored: {error}; pip install 'vlscale[demo]'") from None
    if not captions or len(captions) != len(references):
        raise VlscaleError(f"{len(captions)} captions and {len(references)} lists of references; give one for each")
    lacking = next((number for number, group in enumerate(references) if not group), None)
    if lacking is not None:
        raise VlscaleError(f"image {lacking} has no reference caption; leave it out")
    told = {number: [" ".join(words_of(each)) for each in group] for number, group in enumerate(references)}
    said = {number: [" ".join(words_of(caption))] for number, caption in enumerate(captions)}
    bleu, _ = Bleu(4).compute_score(told, said, verbose=0)
    _, cider = Cider().compute_score(told, said)
    return CaptionScores(float(bleu[3]), np.asarray(cider, np.float64))

"""The sentences of ``data_tools/demo/text``, in lower case, and which of them are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from data_tools.packing_texts import split_sentences
from vlscale.errors import VlscaleError

TEXTS = Path(__file__).parent / "demo" / "text"
FILES = ("wordnet_glosses.txt", "wordnet_examples.txt", "persuasion.txt")
_MOST_BYTES = 64 << 20
_LEAST_WORDS = 4


def sentences(folder: Path, most: int | None = None) -> Iterator[str]:
    """Yield the sentences of the three files, as UNIMO's texts are: in lower case.

    Args:
        folder: holds :data:`FILES`.
        most: of each file; None: all. Sentences of fewer than four words are left out.

    Raises:
        VlscaleError: a file is missing, too large or not UTF-8.
    """
    for name in FILES:
        path = folder / name
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise VlscaleError(f"{path}: larger than {_MOST_BYTES >> 20} MiB; the demo's texts are small")
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise VlscaleError(f"{path}: cannot be read ({error.strerror}); give --texts a folder with it") from None
        except UnicodeDecodeError as error:
            raise VlscaleError(f"{path}: not UTF-8 (byte {error.start}); restore the file") from None
        found = (each for line in lines for each in split_sentences(line) if len(each.split()) >= _LEAST_WORDS)
        for number, sentence in enumerate(found):
            if number == most:
                break
            yield sentence.lower()


def is_held_out(sentence: str, every: int) -> bool:
    """Whether a sentence is among the one in ``every`` that training does not see; equal sentences agree."""
    return int.from_bytes(hashlib.blake2b(sentence.encode(), digest_size=8).digest(), "big") % every == 0

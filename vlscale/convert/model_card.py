"""The model card of a folder that goes to the Hugging Face hub.

Much of it was said by a file: it is made plain, so that it can be neither YAML nor Markdown of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vlscale.convert.report import Report
from vlscale.models.registry import ModelConfig
from vlscale.models.unimo_config import UnimoConfig

_MOST = 120
"""Characters of a value."""
_MOST_VALUES = 32
_LICENCE = re.compile(r"[\w.+-]{1,64}", re.ASCII)
_BARE = re.compile(r"(?!(y|yes|n|no|on|off|true|false|null)$)[a-z][\w.+-]*", re.ASCII)
"""What YAML reads as a string without quotes."""
_CARD = """\
---
library_name: vlscale
license: {licence}
tags:
- {tag}
- vision-language
---

# {title}

{model} ({layers} layers, {hidden} wide, {vocabulary} word pieces, region features {features} wide), converted with
vlscale from `{source}` ({kind}, {layout}). Pre-training heads: {heads}.

```python
import vlscale.hf  # registers the model with transformers' Auto classes
from transformers import AutoModel

model = AutoModel.from_pretrained({name})
```

## Where the weights come from

{provenance}

The licence of the weights is that of their source: {licence_note}
"""


def model_card(config: ModelConfig, report: Report) -> str:
    """Return the text of ``README.md``: what the model is, how it is loaded, provenance and licence.

    A licence that is no identifier of the usual form (``apache-2.0``) counts as unknown.
    """
    licence = report.provenance.get("licence")
    if not isinstance(licence, str) or not _LICENCE.fullmatch(licence):
        licence = None
    key = (licence or "other").lower()
    name = plain(report.target.rstrip("/").rpartition("/")[2])
    files = [
        f"- `{plain(file)}`: {plain(size)} bytes, sha256 `{plain(digest)}`"
        for file, (size, digest) in report.source_files.items()
    ]
    told = [f"- {plain(what)}: `{plain(value)}`" for what, value in _told(report.provenance)]
    model = "UNIMO" if isinstance(config, UnimoConfig) else "UNITER"
    return _CARD.format(
        model=model,
        tag=model.lower(),
        licence=key if _BARE.fullmatch(key) else f'"{key}"',
        licence_note=f"`{licence}`." if licence else "the source does not name it; look it up and state it above.",
        title=f"`{name}`" if re.search(r"[^\w .+-]", name) else name,
        name=json.dumps(name, ensure_ascii=False),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        features=config.feature_dim,
        source=plain(report.source.rstrip("/").rpartition("/")[2]),
        kind=plain(report.kind),
        layout=plain(report.layout),
        heads=", ".join(config.heads) or "none",
        provenance="\n".join([*files, *told[:_MOST_VALUES]]),
    )


def plain(value: object) -> str:
    """One line of at most 120 printable characters without backticks and pipes: text for a code span or a cell."""
    line = " ".join(str(value).split())
    line = "".join(each for each in line if each.isprintable() and each not in "`|")
    return line if len(line) <= _MOST else f"{line[: _MOST - 3]}..."


def _told(provenance: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a source says of itself; a vocabulary has several entries."""
    for key, value in provenance.items():
        if key == "licence":
            continue
        parts = {f"{key} {part}": each for part, each in value.items()} if isinstance(value, Mapping) else {key: value}
        yield from ((what, each) for what, each in parts.items() if each is not None)

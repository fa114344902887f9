"""The model card of a folder that goes to the Hugging Face hub."""

from __future__ import annotations

from vlscale.convert.report import Report
from vlscale.models.uniter import UniterConfig

_CARD = """\
---
library_name: vlscale
license: {licence}
tags:
- uniter
- vision-language
---

# {name}

UNITER ({layers} layers, {hidden} wide, {vocabulary} word pieces, region features {features} wide), converted with
vlscale from `{source}` ({kind}, {layout}). Pre-training heads: {heads}.

```python
import vlscale.hf  # registers the model with transformers' Auto classes
from transformers import AutoModel

model = AutoModel.from_pretrained("{name}")
```

## Where the weights come from

{provenance}

The licence of the weights is that of their source: {licence_note}
"""


def model_card(config: UniterConfig, report: Report) -> str:
    """Return the text of ``README.md``: what the model is, how it is loaded, provenance and licence."""
    licence = report.provenance.get("licence")
    files = [f"- `{name}`: {size} bytes, sha256 `{digest}`" for name, (size, digest) in report.source_files.items()]
    told = [f"- {key}: {value}" for key, value in report.provenance.items() if key != "licence" and value is not None]
    return _CARD.format(
        licence=str(licence or "other").lower(),
        licence_note=f"{licence}." if licence else "the source does not name it; look it up and state it above.",
        name=report.target.rstrip("/").rpartition("/")[2],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        features=config.feature_dim,
        source=report.source.rstrip("/").rpartition("/")[2],
        kind=report.kind,
        layout=report.layout,
        heads=", ".join(config.heads) or "none",
        provenance="\n".join([*files, *told]),
    )

"""UNITER's second stage on VCR, small: databases, import commands, a grown first-stage model, three tasks trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from data_tools import import_images, import_texts
from tests.data_tools.vcr_files import ADDED, CLASSES, TOKENS, WIDTH, import_arguments, write_vcr
from tests.multiprocess.launcher import all_well, run_many
from tests.multiprocess.recipes import recipe, write_ds_config, write_recipe
from vlscale.models.uniter import UniterConfig, UniterForPretraining

STEPS = 40
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def first_stage(folder: Path, vocabulary: str) -> UniterForPretraining:
    """A model of the vocabulary without the added word pieces, and of two types."""
    torch.manual_seed(1)
    sizes = {"vocab_size": len(TOKENS), "feature_dim": WIDTH, "num_classes": CLASSES, "max_position_embeddings": 24}
    more = {"norm": "pre", "initializer": "fan_in", "vocab_fingerprint": vocabulary}
    model = UniterForPretraining({**SHAPE, **sizes, **more})
    model.save_pretrained(folder)
    return model


def command(root: Path, tables: str, **sections) -> list[str]:
    content = recipe(root, schedule={"warmup_steps": 4, "total_steps": STEPS}, **sections)
    content["data"]["datasets"] = [
        {"name": "vcr", "root": str(root / "train"), "mix": {"mlm": 2, "mrfr": 1, "mrckl": 1}}
    ]
    content["data"]["validation"] = [{"name": "vcr-val", "root": str(root / "val")}]
    content["data"] |= {"workers": 1, "max_text_tokens": 20}
    content["model"]["config"] |= {"vocab_size": len(TOKENS) + ADDED, "type_vocab_size": 4}
    content["model"] |= {"init_from": str(root / "first"), "init_tables": tables}
    content["objectives"] = {"mrm": {"background_class": 0}}
    content["optimizer"] = {"lr": 4e-3}
    return [
        "--recipe", str(write_recipe(root / f"{tables}.yaml", content)),
        "--ds_config", str(write_ds_config(root / "vcr.json", 2)),
        "--run_dir", str(root / f"run_{tables}"),
    ]  # fmt: skip


@pytest.mark.multiprocess
def test_the_second_stage_trains_all_three_tasks(tmp_path):
    for seed, name in enumerate(("train", "val")):
        write_vcr(tmp_path / f"{name}_db", images=16, questions=4, seed=seed)
        images, texts = import_arguments(tmp_path / f"{name}_db", tmp_path / name)
        import_images.run(images)
        import_texts.run(texts)
    base = import_texts.load_grown(tmp_path / "train_db/vocab.txt", 0).vocabulary
    before = first_stage(tmp_path / "first", base.fingerprint)
    results = run_many([command(tmp_path, "exact"), command(tmp_path, "grow")], tmp_path / "todo.json", 2)
    refused = [lines.pop(0) for lines in results]
    assert [line["status"] for line in refused] == [2, 2]
    told = "".join(line["err"] for line in refused)
    assert "vocab_size is 30, the model's is 33; if its first 30 words mean the same" in told
    all_well(results)

    run = tmp_path / "run_grow"
    (start,) = json.loads((run / "provenance.json").read_bytes())["starts"]
    assert "2 types added, as type 0; 3 words added, random; word head kept" in start["weights"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for key in ("mlm/mlm", "mrfr/mrfr", "mrckl/mrckl"):
        losses = [row[key] for row in rows if key in row]
        assert len(losses) >= 6
        assert all(map(math.isfinite, losses))
        assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), key
    trained = UniterForPretraining.from_pretrained(run / "model")
    assert isinstance(trained.config, UniterConfig)
    assert (trained.config.vocab_size, trained.config.type_vocab_size) == (33, 4)
    assert trained.config.vocab_fingerprint == base.grown(ADDED).fingerprint
    # Each type has been learnt by itself, and the old words are still near where they were.
    types = trained.type_embedding.weight
    assert len({tuple(row) for row in types.tolist()}) == 4
    old = before.text_embedder.word.weight
    assert torch.nn.functional.cosine_similarity(trained.text_embedder.word.weight[:30], old).mean() > 0.5

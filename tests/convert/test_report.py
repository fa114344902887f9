"""What a report says of every tensor, and a model card that no file can write into."""

from __future__ import annotations

import pytest
import yaml

from vlscale.convert.model_card import model_card, plain
from vlscale.convert.report import Report
from vlscale.convert.steps import KeyPlan, Step
from vlscale.models.registry import load_preset
from vlscale.models.uniter import UniterConfig

QKV = ("q.w", "k.w", "v.w")


@pytest.fixture
def report():
    return Report("in.pt", "runs/out", "torch", "uniter", "vlscale", "fp32")


def made(sources, operation, **more):
    return {"sources": [*sources], "operation": operation, **more}


def test_every_tensor_is_named_through_all_key_maps(report):
    report.add_plan(KeyPlan((Step("qkv", QKV, "concatenate"), Step("mask", ("m",), "second row"), Step("b", ("b0",)))))
    assert report.tensors == {
        "qkv": made(QKV, "concatenate"), "mask": made("m", "second row"), "b": made(["b0"], "copy"),
    }  # fmt: skip
    thirds = [
        Step(name, ("qkv",), f"{part} third") for name, part in zip("qkv", ("first", "second", "last"), strict=True)
    ]
    steps = (*thirds, Step("m", ("mask",), "below zeros"), Step("b", ("b",)), Step("new", ("head",), "transpose"))
    report.add_plan(KeyPlan(steps, copies={"tied": "k"}, ignored={"x": "why"}))
    assert report.tensors == {
        "q": made(QKV, "concatenate, first third"),
        "k": made(QKV, "concatenate, second third"),
        "v": made(QKV, "concatenate, last third"),
        "m": made("m", "second row, below zeros"),
        "b": made(["b0"], "copy"),
        "new": made([], "a new model's values, transpose"),
        "tied": made(QKV, "concatenate, second third", shares="k"),
    }
    assert report.operations == {
        "concatenate": 1, "second row": 1, "first third": 1, "second third": 1, "last third": 1, "below zeros": 1,
        "transpose": 1,
    }  # fmt: skip
    before = report.tensors
    report.add_plan(KeyPlan(tuple(Step(name, (name,)) for name in "qkvm"), copies={"tied": "q"}))
    assert report.tensors == {name: before[name] for name in "qkvm"} | {"tied": {**before["q"], "shares": "q"}}
    assert "q.w" not in report.text()


def test_entries_come_before_the_first_key_map(report):
    entries = {"uq": (("bert.q",), "transpose"), "uk": (("bert.k",), "transpose"), "w": (("words", "types"), "fold"),
               "n": (("norm",), "copy")}  # fmt: skip
    report.add_entries(entries)
    report.add_plan(KeyPlan((Step("qk", ("uq", "uk"), "concatenate"), Step("word", ("w",)), Step("norm", ("n",)))))
    assert report.tensors == {
        "qk": made(["bert.q", "bert.k"], "transpose, concatenate"),
        "word": made(["words", "types"], "fold"),
        "norm": made(["norm"], "copy"),
    }
    assert report.operations == {"transpose": 2, "fold": 1, "concatenate": 1}


def test_values_that_vanished_are_told(report):
    report.vanished = {"a.weight": 3}
    assert "1 WITH VALUES ROUNDED TO ZERO: a.weight (3 values)" in report.text()


def card_of(report):
    config = UniterConfig(**{key: value for key, value in load_preset("uniter-base").items() if key != "model_type"})
    text = model_card(config, report)
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


@pytest.mark.parametrize("licence", ["mit", "Apache-2.0", "cc-by-nc-4.0", "true", "1e3", "-", "null", "a" * 64])
def test_a_licence_is_told(licence, report):
    report.provenance = {"licence": licence}
    head, body = card_of(report)
    assert head == {"library_name": "vlscale", "license": licence.lower(), "tags": ["uniter", "vision-language"]}
    assert f"that of their source: `{licence}`." in body


@pytest.mark.parametrize(
    "licence",
    ["mit\n---\n# PWNED\nlicense: x", "mit\n", "", "a" * 65, "[x]", "mit: x", "é", ["mit"], {"a": 1}, 7, None],
)
def test_what_is_no_licence_is_unknown(licence, report):
    report.provenance = {"licence": licence}
    head, body = card_of(report)
    assert head["license"] == "other"
    assert "the source does not name it" in body
    assert "PWNED" not in body


def test_what_files_say_stays_on_its_line(report):
    evil = "x`\n---\n# PWNED | a\r\x85\u2028<b>\x1b[1m\u202e" + "y" * 300
    report.source, report.target = f"/a/{evil}", f'/b/out"+evil()+"{evil}'
    report.source_files = {evil: [3, "ab12"]}
    report.provenance = {
        "step": 3,
        "vocabulary": {"fingerprint": "f" * 64, evil: evil, "problem": None},
        "precision": evil,
    }
    head, body = card_of(report)
    assert head["license"] == "other"
    assert not [line for line in body.splitlines() if line.lstrip("# -").startswith("PWNED")]
    assert body.count("```") == 2
    assert not [line for line in body.splitlines() if line.replace("```", "").count("`") % 2]
    assert not {"|", "\x1b", "\u202e", "\u2028"} & {*body}
    assert f"- vocabulary fingerprint: `{'f' * 64}`" in body
    assert "- step: `3`" in body
    assert max(map(len, body.splitlines())) < 300
    code = body.split("```")[1].removeprefix("python\n")
    compile(code, "card", "exec")
    assert code.count("\n") == 4


def test_plain():
    assert plain(" a\n\n b|`c`\t") == "a bc"
    assert len(plain("x" * 121)) == 120
    assert plain("x" * 120) == "x" * 120

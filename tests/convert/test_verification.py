"""What counts as equal, and comparing a beginning with what it was made of."""

from __future__ import annotations

import re

import pytest
import torch

from vlscale.convert import verification
from vlscale.convert.conversion import Wish, convert
from vlscale.convert.verification import Comparison, verify
from vlscale.errors import VlscaleError

NAN, INF = float("nan"), float("inf")
ODD_NAN = torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32)


@pytest.fixture(autouse=True, params=[1 << 20, 3])
def pieces(request, monkeypatch):
    monkeypatch.setattr(verification, "_PIECE", request.param)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ([NAN, INF, 0, 1], [0, 3.4e38, -0.0, 1], "3 of 4 values, 2 with NaN or infinity, 1 in the sign of zero"),
        ([NAN, 1.0], [1.0, NAN], "2 of 2 values, 2 with NaN or infinity"),
        ([INF, 1.0], [-INF, 1.0], "1 of 2 values, 1 with NaN or infinity"),
        ([INF, -INF, NAN, -0.0], [INF, -INF, NAN, -0.0], ""),
        ([1.0, 2.0, 3.0, 4.0, 5.5], [1.0, 2.5, 3.0, 4.0, 5.0], "2 of 5 values, by up to 0.5"),
        ([0.0], [-0.0], "1 of 1 values, 1 in the sign of zero"),
        ([], [], ""),
        ([[1.0], [2.0]], [[1.0, 2.0]], "[2, 1] instead of [1, 2]"),
        ([1, 2], [1.0, 2.0], "torch.int64 instead of torch.float32"),
        ([1.0, 2.0], [1, 2], "torch.float32 instead of torch.int64"),
        ([True, False], [1, 0], "torch.bool instead of torch.int64"),
        ([1.0, 0.0], [True, False], "torch.float32 instead of torch.bool"),
        ([True, False], [True, True], "1 of 2 values, by up to 1"),
        ([2**53, 7], [2**53 + 1, 7], "1 of 2 values"),
        ([1 + 2j, 3j], [1 + 2j, 3.5j], "1 of 4 values, by up to 0.5"),
    ],
)
def test_equal_means_the_same_bits(ours, theirs, says):
    assert verification._difference(torch.tensor(ours), torch.tensor(theirs)) == says


def test_whole_numbers_of_another_width_and_other_nans():
    assert verification._difference(torch.ones(2).int(), torch.ones(2).long()) == "torch.int32 instead of torch.int64"
    assert verification._difference(torch.tensor([NAN]), ODD_NAN) == ""
    assert verification._difference(torch.ones(()), torch.ones(())) == ""
    one = torch.ones(4).to(torch.float8_e5m2)
    assert verification._difference(one, one.clone()) == ""
    assert verification._difference(one, (-one.float()).to(one.dtype)) == "4 of 4 values, by up to 2"


@pytest.mark.parametrize(
    ("dtype", "theirs", "change", "says"),
    [
        (torch.float16, [0.1, NAN, INF, -0.0, 6e-9], None, ""),
        (torch.float16, [0.1, 7e4, INF, -7e4], None, "2 of 4 values, 2 with NaN or infinity"),
        (torch.bfloat16, [0.1, 7e4, -3.4e38], None, "1 of 3 values, 1 with NaN or infinity"),
        (torch.float16, [0.5, 0.25], (1, 0.75), "1 of 2 values, by up to 0.5"),
        (torch.float16, [0.5, NAN], (1, 0.0), "1 of 2 values, 1 with NaN or infinity"),
        (torch.float64, [0.1, NAN, -0.0], None, ""),
        (torch.float64, [0.1, NAN, -0.0], (2, 0.0), "1 of 3 values, 1 in the sign of zero"),
    ],
)
def test_a_cast_is_repeated(dtype, theirs, change, says):
    source = torch.tensor(theirs)
    made = source.to(dtype)
    if change:
        made[change[0]] = change[1]
    assert verification._difference(made, source) == says


def test_what_only_the_source_holds_may_be_allowed(tmp_path):
    torch.save({"a": torch.ones(2), "b": torch.ones(2), "c.x": torch.ones(1), "c.y": torch.ones(1)}, tmp_path / "in.pt")
    torch.save({"a": torch.ones(2), "b": torch.ones(2), "d": torch.ones(1)}, tmp_path / "out.pt")
    assert not (found := verify(tmp_path / "out.pt", tmp_path / "in.pt", allowed=("c.x", "a"))).same
    assert (found.only_source, found.allowed, found.equal) == (("c.y",), ("c.x",), ("a", "b"))
    assert (found := verify(tmp_path / "out.pt", tmp_path / "in.pt", allowed=("c.*",))).same
    assert found == Comparison(("a", "b"), {}, ("d",), (), ("c.x", "c.y"))
    assert "2 only in the source, as is allowed: c.x, c.y" in found.text()


def test_a_bert_against_what_it_began(tmp_path):
    pytest.importorskip("transformers")
    from tests.convert.bert_folders import bert, roberta, saved

    one, other = saved(bert(), tmp_path / "bert"), saved(roberta(), tmp_path / "roberta")
    for source, to in ((one, "vilbert"), (one, "unit"), (one, "unimo"), (other, "unimo"), (other, "vilbert")):
        target = tmp_path / f"{source.name}-{to}{'' if to == 'unimo' else '.pt'}"
        report = convert(Wish(source, target, to=to))
        found = verify(target, source, to=to)
        assert found.same, found.text()
        assert len(found.equal) == report.mapped > 30
        assert not found.only_target
    state = torch.load(tmp_path / "bert-vilbert.pt", weights_only=True)
    state["bert.embeddings.LayerNorm.weight"][3] += 0.5
    del state["cls.predictions.bias"]
    torch.save(state, tmp_path / "bert-vilbert.pt")
    found = verify(tmp_path / "bert-vilbert.pt", one, to="vilbert")
    assert not found.same
    assert [*found.different] == ["bert.embeddings.LayerNorm.weight"]
    assert found.only_source == ("cls.predictions.bias",)
    for to, target in ((None, "bert-vilbert.pt"), ("unit", "bert-vilbert.pt"), ("vilbert", "bert-unimo")):
        with pytest.raises(VlscaleError, match=r"no names in common; give .* --to"):
            verify(tmp_path / target, one, to=to)
    with pytest.raises(VlscaleError, match=re.escape("--to 'vilbrt' is unknown; did you mean 'vilbert'")):
        verify(tmp_path / "bert-vilbert.pt", one, to="vilbrt")


def test_a_resnet_against_the_unit_that_it_began(tmp_path):
    names = ("conv1.weight", "layer1.0.conv1.weight", "bn1.running_mean", "fc.weight")
    torch.save({name: torch.randn(4) for name in names}, tmp_path / "resnet.pth")
    convert(Wish(tmp_path / "resnet.pth", tmp_path / "unit.pt", to="unit"))
    found = verify(tmp_path / "unit.pt", tmp_path / "resnet.pth", to="unit")
    assert found.same
    assert len(found.equal) == 3

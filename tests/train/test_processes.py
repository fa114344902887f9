"""Agreement, with a stand-in for the other processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlscale.errors import VlscaleError
from vlscale.train.processes import Processes, launched, run_and_exit


class Pair(Processes):
    """Rank 0 or 1 of two processes; ``other`` is what the other one sends."""

    def __init__(self, rank: int, other: Any = None) -> None:
        super().__init__(rank, 2, torch.device("cpu"), program="prog")
        self.other = other

    def gather(self, item: Any) -> list[Any]:
        return [item, self.other] if self.rank == 0 else [self.other, item]


def test_nothing_happens_when_all_is_well() -> None:
    with Pair(0).agreed():
        pass


def test_the_main_process_speaks_for_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VlscaleError, match=r"\[rank 1\] bad row") as caught, Pair(0, "bad row").agreed():
        pass
    assert capsys.readouterr().err == "prog: error: [rank 1] bad row\n"
    assert caught.value.reported


def test_the_others_fail_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VlscaleError, match="missing"), Pair(1, "missing").agreed():
        raise VlscaleError("missing")
    assert capsys.readouterr().err == ""


def test_a_failure_of_all_names_no_rank(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(VlscaleError, match=r"^missing$"), Pair(0, "missing").agreed():
        raise VlscaleError("missing")
    assert capsys.readouterr().err == "prog: error: missing\n"


def test_an_agreed_error_is_not_printed_again(capsys: pytest.CaptureFixture[str]) -> None:
    processes = Pair(0, "bad row")
    with pytest.raises(SystemExit) as caught, launched("prog"), processes.agreed(), processes.agreed():
        pass
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("bad row") == 1


def test_a_bug_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError), Pair(0).agreed():
        _ = 1 / 0


def test_ctrl_c_has_its_usual_status() -> None:
    with pytest.raises(SystemExit) as caught, launched("prog"):
        raise KeyboardInterrupt
    assert caught.value.code == 130


@pytest.mark.parametrize(
    ("raised", "status"), [(None, 0), (SystemExit(2), 2), (SystemExit(None), 0), (ValueError("x"), 1)]
)
def test_the_exit_status_is_that_of_main(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException | None, status: int
) -> None:
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    def main() -> None:
        if raised is not None:
            raise raised

    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(Left) as caught:
        run_and_exit(main)
    assert caught.value.args == (status,)

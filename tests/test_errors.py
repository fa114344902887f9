"""One line on stderr and a non-zero exit for what a user can mend; a traceback for bugs."""

from __future__ import annotations

import pytest

from vlscale.errors import VlscaleError, nearest, one_line_errors


def test_a_user_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors("prog"):
        raise VlscaleError("first\n  second")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "prog: error: first second\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors("prog"):
        _ = 1 / 0


def test_nearest() -> None:
    assert nearest("lerning_rate", ["learning_rate", "seed"]) == "; did you mean 'learning_rate'?"
    assert nearest("zzz", ["learning_rate"]) == ""

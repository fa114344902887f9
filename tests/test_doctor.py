"""``vlscale doctor``: what runs here, and why other kernels do not."""

from __future__ import annotations

import json

import pytest
import torch

from vlscale.cli import main
from vlscale.kernels.ipot import native


def doctor(capsys, *arguments):
    assert main(["doctor", *arguments]) == 0
    return capsys.readouterr().out


def test_names_the_backend_of_every_device_and_why_others_do_not_run(capsys):
    found = json.loads(doctor(capsys, "--json"))
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0] or found["packages"]["torch"]
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["ipot"] == ("cpu" if native.load()[0] else "reference")
    assert "NVIDIA" in cpu["ipot_not"]["triton"]
    assert "NVIDIA" in cpu["ipot_not"]["cuda"]
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    text = doctor(capsys)
    assert "IPOT       " in text
    assert "not cuda: it is for NVIDIA GPUs" in text


def test_without_a_compiler_the_reference_runs_and_the_reason_is_told(capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load.cache_clear()
    from vlscale.kernels.ipot import backends

    backends._fastest.cache_clear()
    try:
        text = doctor(capsys)
    finally:
        monkeypatch.undo()
        native.load.cache_clear()
        backends._fastest.cache_clear()
    assert "IPOT       reference" in text
    assert "not cpu: no C++ compiler found (looked for no-such-compiler); install g++ or set CXX" in text


def test_arguments_are_checked(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--jsn"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

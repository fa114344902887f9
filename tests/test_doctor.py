"""``vlscale doctor``: what runs here, and why other kernels do not."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

from vlscale.cli import main
from vlscale.doctor import kernels_of
from vlscale.kernels.ipot import compiled_files, cuda_sources, native, nvrtc


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
    assert f"IPOT       {cpu['ipot']}: {cpu['ipot_from']}" in text
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
    assert "IPOT       reference: operators of PyTorch" in text
    assert "C++ compiler none: no C++ compiler found" in text
    assert "not cpu: no C++ compiler found (looked for no-such-compiler); install g++ or set CXX" in text


def test_tells_what_compiles_the_kernels_and_where_they_lie(capsys, monkeypatch, tmp_path):
    library, path = native.load()
    found = json.loads(doctor(capsys, "--json"))
    if library is not None:
        assert found["devices"][0]["ipot_from"] == f"compiled at first use, {path}"
        assert found["compiling"]["compiler"] == shlex.join(native.compiler())
        assert found["compiling"]["compiler"] in doctor(capsys)
    assert found["compiling"]["cache"] == str(compiled_files.cache_folder())
    version = ".".join(map(str, nvrtc.version()))
    assert found["compiling"]["nvrtc"] == version
    assert f"NVRTC {version}" in doctor(capsys)
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLSCALE_CACHE", str(tmp_path / "file"))
    assert "compiled kernels in none: " in doctor(capsys)


def test_tells_prebuilt_kernels_from_those_compiled_at_first_use(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "PREBUILT", tmp_path)
    monkeypatch.setattr(cuda_sources, "is_prebuilt", lambda architecture: architecture == "sm_70")
    assert kernels_of("cuda", "sm_70") == f"prebuilt for sm_70, {tmp_path}"
    assert kernels_of("cuda", "sm_80") == "compiled at first use by NVRTC for sm_80"
    assert "by Triton" in kernels_of("triton", "sm_80")


def test_arguments_are_checked(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--jsn"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1

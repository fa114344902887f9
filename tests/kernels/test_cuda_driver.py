"""How IPOT's CUDA backend talks to the driver and to NVRTC, with a driver that only writes down what it is asked."""

# ruff: noqa: N802 - the driver's own names
from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from vlscale.kernels.ipot import cuda_backend, cuda_sources, nvrtc
from vlscale.kernels.ipot.cuda_sources import backward_kernel

INVALID_CONTEXT = 201


class Driver:
    """Two devices, whose handles are 10 and 11 and whose primary contexts are 110 and 111; contexts are by thread."""

    def __init__(self):
        self.calls, self.contexts = [], {}

    def cuDeviceGet(self, found, ordinal):
        found._obj.value = 10 + ordinal
        return 0

    def cuCtxGetDevice(self, found):
        context = self.contexts.get(threading.get_ident())
        if context is None:
            return INVALID_CONTEXT
        found._obj.value = context - 100
        return 0

    def cuDevicePrimaryCtxRetain(self, found, handle):
        self.calls.append(("retain", handle))
        found._obj.value = 100 + handle
        return 0

    def cuCtxSetCurrent(self, context):
        self.calls.append(("set", context.value))
        self.contexts[threading.get_ident()] = context.value
        return 0

    def cuGetErrorString(self, status, text):
        text._obj.value = b"an illegal memory access was encountered" if status == 700 else None
        return 0

    def cuModuleLoadData(self, module, cubin):
        self.calls.append(("load", cubin))
        assert threading.get_ident() in self.contexts
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = 5
        return 0

    def cuLaunchKernel(self, function, *rest):
        *sizes, shared, stream, arguments, extra = rest
        assert threading.get_ident() in self.contexts
        first = ctypes.c_int.from_address(arguments[0]).value
        self.calls.append(("launch", function.value, tuple(sizes), shared, stream.value, first, extra))
        return 0


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(cuda_backend, "_driver", lambda: made)
    caches = (cuda_backend._device_handle, cuda_backend._primary_context, cuda_backend._function)
    for cached in caches:
        cached.cache_clear()
    yield made
    for cached in caches:
        cached.cache_clear()


class Nothing:
    """Stands for ``torch.cuda.device``, which calls nothing where the device is the current one."""

    def __init__(self, device):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_every_thread_launches_in_the_primary_context_and_nothing_synchronises(driver, monkeypatch):
    stream = type("Stream", (), {"cuda_stream": 77})()  # synchronize() would be an AttributeError
    monkeypatch.setattr(torch.cuda, "device", Nothing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(nvrtc, "compile_kernel", lambda *_: nvrtc.Compiled(b"code", ""))

    def launch():
        for _ in range(2):
            cuda_backend._launch(backward_kernel(torch.float32), torch.device("cuda", 1), (3, 2, 1), 128, 4, 0.5)

    launch()
    other = threading.Thread(target=launch)
    other.start()
    other.join()
    launched = ("launch", 5, (3, 2, 1, 128, 1, 1), 0, 77, 4, None)
    assert driver.calls == [
        ("retain", 11), ("set", 111), ("load", b"code"), launched, launched,
        ("set", 111), launched, launched,
    ]  # fmt: skip


def test_a_context_of_the_device_is_kept_and_one_of_another_is_not(driver):
    here = threading.get_ident()
    driver.contexts[here] = 110
    cuda_backend._enter_context(0)
    assert driver.calls == []
    cuda_backend._enter_context(1)
    assert driver.contexts[here] == 111


def test_errors_say_what_they_mean(driver):
    with pytest.raises(RuntimeError, match="cuLaunchKernel failed with CUDA error 700: an illegal memory access"):
        cuda_backend._check(700, "cuLaunchKernel")
    with pytest.raises(RuntimeError, match="error 999: unknown to this driver"):
        cuda_backend._check(999, "cuLaunchKernel")


def test_arguments_are_pointers_to_values_of_the_kernels_types():
    tensor = torch.zeros(3)
    values = cuda_backend.c_values((7, 0.5, tensor))
    places = cuda_backend.pointers(values)
    assert ctypes.c_int.from_address(places[0]).value == 7
    assert ctypes.c_float.from_address(places[1]).value == 0.5
    assert ctypes.c_void_p.from_address(places[2]).value == tensor.data_ptr()


def test_the_nearest_architecture_that_runs_is_compiled_for(monkeypatch):
    assert nvrtc.runnable("sm_86") == [f"sm_8{minor}" for minor in (6, 5, 4, 3, 2, 1, 0)]
    assert nvrtc.runnable("sm_121") == ["sm_121", "sm_120"]
    monkeypatch.setattr(nvrtc, "supported", lambda: ["sm_80", "sm_86", "sm_100"])
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 8))
    nvrtc.target.cache_clear()
    cuda_backend._cannot_load.cache_clear()
    try:
        assert nvrtc.target("sm_86") == "sm_86"
        assert nvrtc.target("sm_89") == "sm_86"
        assert nvrtc.target("sm_103") == "sm_100"
        with pytest.raises(OSError, match=r"NVRTC 12.8 compiles for sm_80, sm_86, sm_100, not for sm_120"):
            nvrtc.target("sm_120")
        monkeypatch.setattr(cuda_backend, "_driver", lambda: None)
        assert "not for sm_120" in cuda_backend._cannot_load("sm_120")
        assert cuda_backend._cannot_load("sm_89") is None
    finally:
        nvrtc.target.cache_clear()
        cuda_backend._cannot_load.cache_clear()


def test_nvrtc_names_what_it_compiles_for():
    try:
        nvrtc.library()
    except OSError as error:
        pytest.skip(str(error))
    assert {"sm_70", "sm_80", "sm_90"} <= set(nvrtc.supported())


def test_a_kernel_that_came_compiled_is_taken_for_its_own_sources_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "PREBUILT", tmp_path)
    monkeypatch.setattr(nvrtc, "library", None)  # not asked
    monkeypatch.setattr(nvrtc, "_compile", lambda source, name, options: nvrtc.Compiled(options[0].encode(), "log"))
    (tmp_path / "sm_80-0123.cubin").write_bytes(b"of other sources")
    (tmp_path / "sm_80-0123.log").write_text("")
    assert not cuda_sources.is_prebuilt("sm_80")
    kernels = list(cuda_sources.all_kernels())
    for kernel in kernels[1:]:
        kernel.prebuild("sm_80", tmp_path)
    assert not cuda_sources.is_prebuilt("sm_80")  # one is wanting
    kernels[0].prebuild("sm_80", tmp_path)
    for architecture in ("sm_80", "sm_86", "sm_89"):
        assert cuda_sources.is_prebuilt(architecture)
        assert kernels[0].compiled(architecture).cubin == b"--gpu-architecture=sm_80"
    assert not cuda_sources.is_prebuilt("sm_90")


def test_a_figure_that_the_log_does_not_tell_is_no_zero():
    made = nvrtc.Compiled(b"", "ptxas info : 0 bytes stack frame, 8 bytes spill stores\nUsed 40 registers")
    assert made.figure("bytes spill stores") == 8
    assert made.figure("registers") == 40
    with pytest.raises(ValueError, match="tells no 'bytes smem'"):
        made.figure("bytes smem")

"""Launches of kernels on the pretended device (pretended_cuda.py): bound, checked, not computed.

The Triton runtime runs up to the launch (binder, specialisation, optionally the compiler), the host
code of ``wfnet._C`` up to the driver's refusal. What a kernel writes is not known, but for the
optimiser's, which every backend shares: others launch on a device without values alone.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_NO_DRIVER = ("driver", "libcuda", "no CUDA-capable device")


def _row_adam(a: dict[str, Any]) -> None:
    rows = a["occurred"].nonzero().flatten()
    gradient = a["grad"][rows]
    a["exp_avg"][rows] += a["weight1"] * (gradient - a["exp_avg"][rows])
    a["exp_avg_sq"][rows] += a["weight2"] * (gradient**2 - a["exp_avg_sq"][rows])
    correction1, correction2 = (a[f"correction{i}"][rows, None] for i in (1, 2))
    root = (a["exp_avg_sq"][rows] / correction2).sqrt() + a["eps"]
    a["alpha"][rows] -= a["lr"] * a["exp_avg"][rows] / correction1 / root


_COMPUTED = {"row_adam_kernel": _row_adam}


class _Compiled:
    """What the just-in-time compiler hands to the launcher."""

    function = packed_metadata = None

    def __init__(self, kernel: Any, device: Any):
        self.name = kernel.__name__
        self.launch = functools.partial(_launched, device, kernel)

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *values) -> None:
        self.launch((x, y, z), stream, values)


def _launched(device: Any, kernel: Any, grid: tuple, stream: int, values: tuple) -> None:
    """Checks what the driver would."""
    name = kernel.__name__
    named = dict(zip((p.name for p in kernel.params), values, strict=True))
    assert all(isinstance(n, int) and 0 < n < 2**31 for n in grid), f"{name}: grid {grid}"
    assert max(grid[1:]) <= 65535, f"{name}: grid {grid}"
    assert stream == device.stream.cuda_stream, f"{name}: not on the current stream"
    inner = {}
    for key, value in named.items():
        if hasattr(value, "block_shape"):
            _check_descriptor(f"{name}: {key}", value)
        elif isinstance(value, Tensor):
            assert value.is_cuda, f"{name}: {key} is on the host"
            value = value.inner
        inner[key] = value
    device.launches.append((name, named))
    if device.place.type == "meta":
        return
    assert name in _COMPUTED, f"{name} launches on a device without values alone"
    device.will_write(t for t in inner.values() if isinstance(t, Tensor))
    work = functools.partial(_COMPUTED[name], inner)
    device.record(work)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        work()


def _check_descriptor(what: str, view) -> None:
    """The rules of cuTensorMapEncodeTiled."""
    size = view.base.element_size()
    assert view.base.is_cuda, f"{what} is on the host"
    assert view.base.data_ptr() % 16 == 0, f"{what}: base not on 16 bytes"
    assert len(view.shape) == len(view.strides) == len(view.block_shape) <= 5, f"{what}: rank"
    assert view.strides[-1] == 1, f"{what}: strides {view.strides}"
    assert all(s * size % 16 == 0 and s * size < 2**40 for s in view.strides[:-1]), (
        f"{what}: strides {view.strides}"
    )
    assert all(0 < n <= 2**32 for n in view.shape), f"{what}: shape {view.shape}"
    assert all(0 < b <= 256 for b in view.block_shape), f"{what}: box {view.block_shape}"
    assert view.block_shape[-1] * size >= 16, f"{what}: box {view.block_shape}"
    last = sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    held = view.base.inner.untyped_storage().nbytes() // size - view.base.storage_offset()
    assert last < held, f"{what}: {view.shape} reaches beyond {tuple(view.base.shape)}"


def pretend_triton(patch: Any, device: Any, compile_kernels: bool) -> list:
    """Puts the device in the place of Triton's driver; returns the package's kernels."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit
    from wfnet.kernels import config

    def load_binary(name, binary, shared, index):
        return name, name, 64, 0, 1024

    class Launcher:
        def __init__(self, source, metadata):
            self.kernel = source.fn

        def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *values):
            _launched(device, self.kernel, (x, y, z), stream, values)

    pretended = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda index: device.stream.cuda_stream,
        launcher_cls=Launcher,
        utils=SimpleNamespace(
            load_binary=load_binary,
            unload_module=lambda *_: None,
            get_device_properties=lambda index: {"max_shared_mem": 227 * 1024},
        ),
    )
    patch.setattr(driver, "_active", pretended)
    patch.setattr(config, "_cuda_device", config._cuda_device.__wrapped__)  # keeps nothing
    kernels = _jit_functions()
    for kernel in kernels:
        patch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    if compile_kernels:
        return kernels

    def compiled(self, key, signature, index, constexprs, options, attrs, warmup):
        kernel = self.device_caches[index][0][key] = _Compiled(self, device)
        return kernel

    patch.setattr(jit.JITFunction, "_do_compile", compiled)
    return kernels


def _jit_functions() -> list:
    """Returns every kernel of the package."""
    from triton.runtime.jit import JITFunction
    from wfnet.kernels import (
        conv_dgrad,
        conv_fprop,
        epilogue_bwd,
        gate,
        linear,
        max_pool,
        row_adam,
    )

    modules = (conv_dgrad, conv_fprop, epilogue_bwd, gate, linear, max_pool, row_adam)
    found = {
        value.fn.__name__: value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__name__.endswith("_kernel")
    }
    return list(found.values())


def pretend_library(patch: Any, device: Any) -> None:
    """The host code of ``wfnet._C`` runs up to the driver's refusal."""
    from wfnet.backends import cuda_launch

    launch = cuda_launch._launch

    def pretended(function, reads, writes, **numbers) -> None:
        if cuda_launch.library().emulated:
            raise RuntimeError("the pretended device runs the compiled module's host code")
        assert device.place.type == "meta", f"{function}: kernels launch where there are no values"
        tensors = {**reads, **writes}
        for name, tensor in tensors.items():
            assert tensor is None or tensor.is_cuda, f"{function}: {name} on the host"
        try:
            launch(function, reads, writes, **numbers)
        except RuntimeError as error:
            if not any(text in str(error) for text in _NO_DRIVER):
                raise
        else:
            raise AssertionError(f"{function} launched on a machine without a driver")
        device.launches.append((function, {**tensors, **numbers}))

    patch.setattr(cuda_launch, "_launch", pretended)
    patch.setattr(cuda_launch, "_processors", cuda_launch._processors.__wrapped__)

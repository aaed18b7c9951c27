"""A CUDA device that is pretended: branches that only ``device.type == "cuda"`` takes run here.

A :class:`Pretended` tensor says that it is on ``cuda:0`` and keeps its values in a CPU tensor.
Mixed devices raise, as they do on a device. What waits for the device is noted in
:attr:`Device.waits`, and raises while a graph is captured; a captured graph replays its operations
without running Python. No kernel of ours is launched: launches are checked ahead of time
(tests/kernels/test_aot.py), and the optimiser's step runs as tensor operations.

To C++ the tensors are CPU tensors, so that autograd needs no device: choices that PyTorch itself
makes by device (cuDNN, attention kernels, the autocast policy of CUDA) are not those of a device.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # lists torch's functions as it is imported: before some are replaced
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from wfnet import operators
from wfnet.untraining.optimizers import RowAdam

aten = torch.ops.aten
CUDA, HOST = torch.device("cuda", 0), torch.device("cpu")


class WaitsInCapture(RuntimeError):
    """What a capture on a device would end with."""


class Device:
    """What happened on the pretended device."""

    def __init__(self) -> None:
        self.waits: list[tuple[str, str]] = []  # operation, line of the project that asked for it
        self.beside = 0  # tensors made in one stream for another
        self.recording: list[Callable[[], None]] | None = None
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory as it was before the capture
        self.stream: Stream | None = None  # the current stream

    def wait(self, what: str) -> None:
        """Notes that the host waits for the device."""
        if self.recording is not None:
            raise WaitsInCapture(f"{what} while a graph is captured, at {asked_by()}")
        self.waits.append((what, asked_by()))

    def record(self, work: Callable[[], None]) -> None:
        """Keeps ``work`` for replays, while a graph is captured."""
        if self.recording is not None:
            self.recording.append(work)

    def will_write(self, tensors: Iterable[Tensor]) -> None:
        """A capture runs nothing: what it writes here is restored when it ends."""
        if self.recording is None:
            return
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.before:
                memory = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.before[storage.data_ptr()] = (memory, memory.clone())

    def restore(self) -> None:
        """Memory as it was before the capture."""
        for memory, value in self.before.values():
            memory.copy_(value)
        self.before.clear()


def asked_by() -> str:
    """Innermost function of the project (else of anybody) outside of here: ``file:function``."""
    frames = [
        f
        for f in traceback.extract_stack()
        if "pretended_cuda" not in f.filename or "test_" in f.filename
    ]
    ours = [f for f in frames if "/wfnet/" in f.filename or "/kernels/" in f.filename]
    frame = (ours or frames)[-1]
    return f"{frame.filename.rsplit('/', 1)[1]}:{frame.name}"


device = Device()


# -- torch.cuda ------------------------------------------------------------------------------------


class Stream:
    """A stream; work is done at once, so that order is all that it has."""

    def __init__(self, device=None, priority: int = 0):
        pass

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        device.wait("stream.synchronize")

    def __enter__(self):
        self._outer, device.stream = device.stream, self
        return self

    def __exit__(self, *_):
        device.stream = self._outer


class Event:
    """An event that has always happened."""

    def __init__(self, **_):
        self.at = 0.0

    def record(self, stream=None) -> None:
        self.at = time.monotonic()

    def query(self) -> bool:
        if device.recording is not None:
            raise WaitsInCapture("an event is asked while a graph is captured")
        return True

    def synchronize(self) -> None:
        device.wait("event.synchronize")

    def wait(self, stream=None) -> None:
        assert self.at, "an event that was not recorded"

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


class Graph:
    """A captured graph: replays do again what happened on the device, nothing else."""

    work: list[Callable[[], None]] | None = None

    def __init__(self, keep_graph: bool = False):
        pass

    def replay(self) -> None:
        assert self.work is not None, "replay before the capture has ended"
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for part in self.work:
                part()


@contextlib.contextmanager
def capture(graph: Graph, pool=None, stream=None, capture_error_mode="global") -> Iterator[None]:
    assert device.recording is None, "captures do not nest"
    assert isinstance(graph, Graph)
    if any("/wfnet/" in frame.filename for frame in traceback.extract_stack()):
        # In the other modes a thread that pins memory, a loader's for example, ends the capture.
        assert capture_error_mode == "thread_local", capture_error_mode
    device.recording = []
    try:
        with stream or Stream():
            yield
        graph.work = device.recording
    finally:
        device.recording = None
        device.restore()


PROPERTIES = SimpleNamespace(
    name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30
)


def nothing(*_, **__):
    return None


_NOTHING = "init _lazy_init set_device empty_cache reset_peak_memory_stats manual_seed"
_NOTHING += " manual_seed_all set_rng_state _sleep"
REPLACED = {
    **dict.fromkeys(_NOTHING.split(), nothing),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "current_device"), lambda *_: 0),
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "device": lambda place: contextlib.nullcontext(),
    "get_device_properties": lambda *_: PROPERTIES,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "pretended",
    "current_stream": lambda *_: device.stream,
    "Stream": Stream,
    "stream": lambda stream: stream if stream is not None else contextlib.nullcontext(),
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": capture,
    "graph_pool_handle": lambda: (0, 1),
    "is_current_stream_capturing": lambda: device.recording is not None,
    "synchronize": lambda *_: device.wait("synchronize"),
    "memory_snapshot": lambda *_: [],
    "mem_get_info": lambda *_: (100 * 2**30, 141 * 2**30),
    "get_rng_state": lambda *_: torch.get_rng_state(),
}


class Pretended(torch.Tensor):
    """A tensor that says it is on ``cuda:0``; values are in :attr:`inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False):
        with torch.inference_mode(False):  # its views could not be made
            self = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=torch.device("cpu"),
                requires_grad=requires_grad,
            )
        self.inner = inner.detach()
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    @property
    def data(self) -> Pretended:
        return Pretended(self.inner)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Pretended):
            raise RuntimeError("a parameter on the device is given memory on the host")
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def record_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)
        device.beside += 1

    def __deepcopy__(self, memo):
        copied = Pretended(self.inner.clone(), self.requires_grad)
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _OPERATORS:
            with _Factories():  # which is off inside of a function that it handles
                return _OPERATORS[func](*args, **kwargs)
        if func is aten._has_compatible_shallow_copy_type.default:
            return all(isinstance(t, Pretended) for t in args)
        _check_devices(func, args, kwargs)
        _note_waits(func, args, kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # attention in plain operations
        inner_args, inner_kwargs, own = _inside(args, kwargs)
        device.will_write(_written(func, inner_args, inner_kwargs))
        result = func(*inner_args, **inner_kwargs)
        _record(func, inner_args, inner_kwargs, result)
        if func is aten.copy_.default and not isinstance(args[0], Pretended):
            return args[0]

        def outside(value):
            if not isinstance(value, Tensor) or value.device != HOST:
                return value
            return own[id(value)] if id(value) in own else Pretended(value)

        return tree_map(outside, result)


_OPERATORS = {
    **dict.fromkeys((operators.conv2d, operators.linear), operators._forward),
    **dict.fromkeys((operators.conv2d_backward, operators.linear_backward), operators._backward),
}
_INDEX = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
# Operations whose result, or its size, the host must read.
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _inside(args, kwargs) -> tuple[tuple, dict, dict[int, Pretended]]:
    """Arguments as C++ sees them, and the tensors that they stand for."""
    own: dict[int, Pretended] = {}

    def unwrap(value):
        if isinstance(value, Pretended):
            own[id(value.inner)] = value
            return value.inner
        cuda = isinstance(value, torch.device) and value.type == "cuda"
        return HOST if cuda else value

    return *tree_map(unwrap, (tuple(args), dict(kwargs))), own


def _check_devices(func, args, kwargs) -> None:
    """Raises for operands on the host, where a device would."""
    strangers = [
        t
        for t in tree_flatten((args, kwargs))[0]
        if isinstance(t, Tensor) and not isinstance(t, Pretended)
    ]
    if not strangers or func in (aten.copy_.default, aten._to_copy.default):
        return
    if func in _INDEX:
        if all(isinstance(t, Pretended) or t.dim() == 0 for t in (args[0], *args[2:3])):
            device.wait("index on the host")
            return
    elif func is aten.index_fill_.int_Scalar and isinstance(args[0], Pretended):
        device.wait("index on the host")  # a list of positions
        return
    elif all(t.dim() == 0 for t in strangers) and (
        torch.Tag.pointwise in func.tags or "fill" in str(func) or "lerp" in str(func)
    ):
        return
    raise RuntimeError(
        f"{func}: all tensors must be on one device, found cuda:0 and cpu "
        f"({[tuple(t.shape) for t in strangers]}), at {asked_by()}"
    )


def _note_waits(func, args, kwargs) -> None:
    if func in _INDEX:
        if any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            device.wait("boolean index")
    elif _READS.intersection(func.tags):
        device.wait(func.name())
    elif func is aten.copy_.default:
        into, source = args[:2]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if isinstance(into, Pretended) != isinstance(source, Pretended):
            host = source if isinstance(into, Pretended) else into
            if blocking or not getattr(host, "pretends_pinned", False):
                device.wait("copy from the host" if host is source else "copy to the host")


def _written(func, args, kwargs) -> list[Tensor]:
    """Tensors that an operator changes in place."""
    if device.recording is None:
        return []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    changed = [
        given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write
    ]
    return [t for t in tree_flatten(changed)[0] if isinstance(t, Tensor)]


def _record(func, args, kwargs, result) -> None:
    """For replays: the same operation on the same memory, into the same results."""
    if device.recording is None:
        return

    def again() -> None:
        for old, new in zip(
            tree_flatten(result)[0], tree_flatten(func(*args, **kwargs))[0], strict=True
        ):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    device.record(again)


def to_device(x: Tensor) -> Pretended:
    """Returns a copy of ``x`` on the pretended device."""

    def again() -> None:
        raise WaitsInCapture("a graph replays a copy of host memory")

    device.record(again)
    return Pretended(x.detach().clone(), x.requires_grad and x.is_floating_point())


def is_cuda(place) -> bool:
    """Whether a device argument names CUDA."""
    if isinstance(place, int) and not isinstance(place, bool):
        return True
    return place is not None and torch.device(place).type == "cuda"


class _Factories(TorchFunctionMode):
    """Functions that are asked for a tensor on ``cuda``, and those that move one there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return self._moved(args[0], kwargs.get("non_blocking", False))
        if name in ("cpu", "tolist") and isinstance(args[0], Pretended):
            return getattr(_to_host(args[0]), name)()
        if name in ("numpy", "__array__") and isinstance(args[0], Pretended):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "pin_memory":
            pinned = args[0].clone()
            pinned.pretends_pinned = True
            return pinned
        if name == "is_pinned":
            return getattr(args[0], "pretends_pinned", False)
        if name == "to" and args and isinstance(args[0], Tensor):
            return self._to(*args, **kwargs)
        if name in ("autocast_decrement_nesting", "autocast_increment_nesting"):
            return func(*args, **kwargs)
        if is_cuda(kwargs.get("device")):
            pin = kwargs.pop("pin_memory", False)
            given = args[0] if args and isinstance(args[0], Tensor) else None
            if name in ("as_tensor", "tensor", "asarray") and isinstance(given, Pretended):
                return given
            kwargs["device"] = HOST
            if name in ("as_tensor", "tensor", "asarray", "from_numpy"):
                device.wait("copy from the host")
            if isinstance(given, Pretended):
                kwargs.pop("device")
                return func(*args, **kwargs)
            requires_grad = kwargs.pop("requires_grad", False)
            assert not pin
            made = func(*args, **kwargs)
            if not name.startswith("empty"):
                device.record(lambda: made.copy_(func(*args, **kwargs)))
            return Pretended(made, requires_grad)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
            made = func(*args, **kwargs)
            made.pretends_pinned = True
            return made
        return func(*args, **kwargs)

    def _to(self, x, *args, **kwargs):
        copies = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        place, dtype, late, layout = torch._C._nn._parse_to(*args, **kwargs)
        converted = x.to(dtype=dtype or x.dtype, copy=copies, memory_format=layout)
        if place is None or is_cuda(place) == isinstance(x, Pretended):
            return converted
        if is_cuda(place):
            return self._moved(converted, late, converted is x)
        return _to_host(converted)

    def _moved(self, x, non_blocking: bool, pinned: bool = True):
        if isinstance(x, Pretended):
            return x
        if not (non_blocking and pinned and getattr(x, "pretends_pinned", False)):
            device.wait("copy from the host" + (" that may not wait" if non_blocking else ""))
        return to_device(x)


def _move_parameter(swap):
    """``nn.Module.to`` keeps the parameter and changes its memory, as on a device."""

    def move(old: Tensor, new: Tensor) -> None:
        if isinstance(old, Pretended) and isinstance(new, Pretended):
            old.data = new
        else:
            swap(old, new)

    return move


def _with_factories(function):
    def inside(*args, **kwargs):
        with _Factories():
            return function(*args, **kwargs)

    return inside


def _to_host(x: Pretended) -> Tensor:
    device.wait("copy to the host")
    return x.inner.detach().clone()


def _as_cpu(function):
    """Autocast of the pretended device is that of the CPU: to C++ its tensors are there."""
    return lambda place, *rest: function("cpu" if place == "cuda" else place, *rest)


@pytest.fixture
def pretended_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Device]:
    """A CUDA device on the host that notices every wait; skips where there is a real one."""
    from torch._dynamo import trace_rules

    if torch.cuda.is_available():
        pytest.skip("there is a real device: tests/gpu")
    trace_rules.get_torch_obj_rule_map()  # made once in a process, of the functions that are there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where choices of backends are kept
    device.__init__()
    device.stream = Stream()
    patch = monkeypatch.setattr
    for name, value in REPLACED.items():
        patch(torch.cuda, name, value)
    for setting in ("is_autocast_enabled", "get_autocast_dtype"):
        for name in (setting, setting.replace("is_", "set_").replace("get_", "set_")):
            patch(torch, name, _as_cpu(getattr(torch, name)))
    run_backward = torch.autograd.graph._engine_run_backward
    for module in (torch.autograd, torch.autograd.graph):
        patch(module, "_engine_run_backward", _with_factories(run_backward))
    patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch(torch.amp.autocast_mode, "is_autocast_available", lambda _: True)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        patch(torch.optim.Optimizer, name, nothing, raising=False)
    patch(torch, "compile", lambda function=None, **_: function or (lambda f: f))
    patch(RowAdam, "_fused", lambda *_: False)
    patch(torch.utils, "swap_tensors", _move_parameter(torch.utils.swap_tensors))
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    with _Factories():
        yield device
    torch.__future__.set_swap_module_params_on_conversion(swaps)

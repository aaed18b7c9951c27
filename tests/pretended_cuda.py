"""A CUDA device that is pretended: branches that only ``device.type == "cuda"`` takes run here.

A :class:`Pretended` tensor says that it is on ``cuda:0`` and keeps its values in a CPU tensor.
Mixed devices raise, as they do on a device. What waits for the device is noted in
:attr:`Device.waits`, and raises while a graph is captured; a captured graph replays its operations
without running Python. The Triton runtime runs up to the launch (binder, specialisation, optionally
the compiler), the host code of ``wfnet._C`` up to the driver's refusal; what the kernel would have
written is then computed in PyTorch from the arguments of the launch.

To C++ the tensors are CPU tensors, so that autograd needs no device: choices that PyTorch itself
makes by device (cuDNN, attention kernels, the autocast policy of CUDA) are not those of a device.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import torch
import torch._dynamo  # lists torch's functions as it is imported: before some are replaced
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from wfnet import gates, operators

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten


class WaitsInCapture(RuntimeError):
    """What a capture on a device would end with."""


class NoValues(RuntimeError):
    """What reading a tensor raises where there are no values."""


class Device:
    """What happened on the pretended device."""

    def __init__(self) -> None:
        self.waits: list[tuple[str, str]] = []  # operation, line of the project that asked for it
        self.launches: list[tuple[str, dict]] = []
        self.beside = 0  # tensors made in one stream for another
        self.recording: list[Callable[[], None]] | None = None
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory as it was before the capture
        self.stream = 0  # the current stream
        self.place = torch.device("cpu")  # where values are; on "meta" there are none

    def wait(self, what: str) -> None:
        """Notes that the host waits for the device."""
        if self.recording is not None:
            raise WaitsInCapture(f"{what} while a graph is captured, at {_asked_by()}")
        self.waits.append((what, _asked_by()))

    def record(self, work: Callable[[], None]) -> None:
        """Keeps ``work`` for replays, while a graph is captured."""
        if self.recording is not None:
            self.recording.append(work)

    def will_write(self, tensors: Iterable[Tensor]) -> None:
        """A capture runs nothing: what it writes here is restored when it ends."""
        if self.recording is None or self.place.type == "meta":
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

    def waited_at(self) -> set[str]:
        """Lines that waited."""
        return {line for _, line in self.waits}


def _asked_by() -> str:
    """Innermost function of the project (else of anybody) outside of here: ``file:function``."""
    frames = [f for f in traceback.extract_stack() if f.filename != __file__]
    ours = [f for f in frames if "/wfnet/" in f.filename or "/kernels/" in f.filename]
    frame = (ours or frames)[-1]
    return f"{frame.filename.rsplit('/', 1)[1]}:{frame.name}"


device = Device()


class Pretended(torch.Tensor):
    """A tensor that says it is on ``cuda:0``; values are in :attr:`inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False):
        with torch.inference_mode(False):  # its views could not be made
            self = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
                dtype=inner.dtype, device=torch.device("cpu"), requires_grad=requires_grad,
            )  # fmt: skip
        self.inner = inner.detach()
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

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
        if self.inner.is_meta:  # as an allocator might place it, on 512 bytes
            offset = self.inner.storage_offset() * self.inner.element_size()
            return (self.inner.untyped_storage()._cdata << 9) + offset
        return self.inner.data_ptr()

    def untyped_storage(self):
        storage = self.inner.untyped_storage()
        if not self.inner.is_meta:
            return storage
        return SimpleNamespace(
            data_ptr=lambda: storage._cdata << 9, nbytes=storage.nbytes, _cdata=storage._cdata
        )

    def get_device(self) -> int:
        return 0

    def is_pinned(self, *_) -> bool:
        return False

    def record_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)
        device.beside += 1

    def __reduce_ex__(self, protocol):
        raise NotImplementedError("pretended tensors are not pickled")

    def __deepcopy__(self, memo):
        copied = Pretended(self.inner.clone(), self.requires_grad)
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, **_) -> str:
        return f"Pretended({self.inner!r})"

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
        if func is aten.copy_.default and device.place.type == "meta":
            return args[0]  # values that there are none of
        inner_args, inner_kwargs, own = _inside(args, kwargs)
        device.will_write(_written(func, inner_args, inner_kwargs))
        result = func(*inner_args, **inner_kwargs)
        _record(func, inner_args, inner_kwargs, result)
        if func is aten.copy_.default and not isinstance(args[0], Pretended):
            return args[0]

        def outside(value):
            if not isinstance(value, Tensor) or value.device != device.place:
                return value
            return own[id(value)] if id(value) in own else Pretended(value)

        return tree_map(outside, result)


_OPERATORS = {
    registered: implementation
    for masked in operators.OPERATORS
    for registered, implementation in (
        (masked.operator, masked.forward),
        (masked.backward_operator, masked.backward),
    )
}
_READS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.equal.default: "equal",
    aten.is_nonzero.default: "bool",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}


def _inside(args, kwargs) -> tuple[tuple, dict, dict[int, Pretended]]:
    own: dict[int, Pretended] = {}

    def unwrap(value):
        if isinstance(value, Pretended):
            own[id(value.inner)] = value
            return value.inner
        if isinstance(value, torch.device) and value.type != "meta":  # to C++ it is the CPU
            return device.place
        return value

    inner_args, inner_kwargs = tree_map(unwrap, (tuple(args), dict(kwargs)))
    return inner_args, inner_kwargs, own


def _check_devices(func, args, kwargs) -> None:
    """Raises for operands on the host, where a device would."""
    strangers = [
        t for t in tree_flatten((args, kwargs))[0]
        if isinstance(t, Tensor) and not isinstance(t, Pretended)
    ]  # fmt: skip
    if not strangers or func in (aten.copy_.default, aten._to_copy.default):
        return
    if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
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
        f"({[tuple(t.shape) for t in strangers]}), at {_asked_by()}"
    )


def _note_waits(func, args, kwargs) -> None:
    if func in _READS:
        if device.place.type == "meta":
            raise NoValues(f"{_READS[func]} at {_asked_by()}")
        device.wait(_READS[func])
    elif func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
        masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
        if masks:
            device.wait("boolean index")
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
        for old, new in zip(tree_flatten(result)[0], tree_flatten(func(*args, **kwargs))[0],
                            strict=True):  # fmt: skip
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    device.record(again)


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        device.record(functools.partial(_no_host_copies))
        return Pretended(x.detach().to(device.place, copy=True))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.inner


def _no_host_copies() -> None:
    raise WaitsInCapture("a graph replays a copy of host memory")


def to_device(x: Tensor) -> Tensor:
    """``x`` on the pretended device."""
    if isinstance(x, Pretended):
        return x
    return (
        _ToDevice.apply(x)
        if x.requires_grad and not x.is_leaf
        else Pretended(
            x.detach().to(device.place, copy=True), x.requires_grad and x.is_floating_point()
        )
    )


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
            return self._moved(args[0], kwargs.get("non_blocking", False), None)
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
            return self._to(args, kwargs)
        if name in ("autocast_decrement_nesting", "autocast_increment_nesting"):
            return func(*args, **kwargs)
        if is_cuda(kwargs.get("device")):
            pin = kwargs.pop("pin_memory", False)
            given = args[0] if args and isinstance(args[0], Tensor) else None
            if name in ("as_tensor", "tensor", "asarray") and isinstance(given, Pretended):
                return given
            kwargs["device"] = device.place
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

    def _to(self, args, kwargs):
        x, *rest = args
        place = options = None
        if rest and isinstance(rest[0], Tensor):
            place, options = rest[0].device, {"dtype": rest[0].dtype}
            rest = rest[1:]
        elif rest and not isinstance(rest[0], torch.dtype):
            place, *rest = rest
        given = [value for value in rest if isinstance(value, torch.dtype)]
        flags = [value for value in rest if isinstance(value, bool)]
        options = {
            **(options or {}),
            **({"dtype": given[0]} if given else {}),
            **dict(zip(("non_blocking", "copy"), flags, strict=False)),
            **{name: value for name, value in kwargs.items() if value is not None},
        }
        place = options.pop("device", place)
        late = options.pop("non_blocking", False)
        if place is None or is_cuda(place) == isinstance(x, Pretended):
            return x.to(**options) if options else x
        if is_cuda(place):
            copied = options.pop("copy", False)
            converted = x.to(**options) if options else x
            pinned = getattr(x, "pretends_pinned", False) and converted is x
            moved = self._moved(converted, late, pinned)
            assert moved is not x or not copied
            return moved
        return _to_host(x).to(**options) if options else _to_host(x)

    def _moved(self, x, non_blocking: bool, pinned: bool | None):
        if isinstance(x, Pretended):
            return x
        pinned = getattr(x, "pretends_pinned", False) if pinned is None else pinned
        if not (non_blocking and pinned):
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


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.inner.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return Pretended(gradient)


def _to_host(x: Pretended) -> Tensor:
    device.wait("copy to the host")
    return _ToHost.apply(x)


# -- torch.cuda ------------------------------------------------------------------------------------


class Stream:
    """A stream; work is done at once, so that order is all that it has."""

    numbers = iter(range(1, 1 << 30))

    def __init__(self, device=None, priority: int = 0):
        self.cuda_stream = next(self.numbers) * 0x1000
        self.device = CUDA

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self) -> None:
        device.wait("stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self):
        self._outer, device.stream = device.stream, self
        return self

    def __exit__(self, *_):
        device.stream = self._outer


class Event:
    """An event that has always happened."""

    clock = 0.0

    def __init__(self, enable_timing: bool = False, **_):
        self.timed = enable_timing
        self.recorded = False

    def record(self, stream=None) -> None:
        Event.clock += 0.001
        self.at, self.recorded = Event.clock, True

    def query(self) -> bool:
        if device.recording is not None:
            raise WaitsInCapture("an event is asked while a graph is captured")
        return True

    def synchronize(self) -> None:
        device.wait("event.synchronize")

    def wait(self, stream=None) -> None:
        assert self.recorded

    def elapsed_time(self, end: Event) -> float:
        assert self.timed
        assert end.timed
        return end.at - self.at


class Graph:
    """A captured graph: replays do again what happened on the device, nothing else."""

    def __init__(self, keep_graph: bool = False):
        self.work: list[Callable[[], None]] | None = None

    def replay(self) -> None:
        assert self.work is not None, "replay before the capture has ended"
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for part in self.work:
                part()

    def pool(self):
        return (0, 1)

    def reset(self) -> None:
        self.work = None


@contextlib.contextmanager
def _capture(graph: Graph, pool=None, stream=None, capture_error_mode="global") -> Iterator[None]:
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


class _OnDevice:
    def __init__(self, place):
        assert place is None or place == 0 or is_cuda(place), f"{place} is no CUDA device"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


PROPERTIES = SimpleNamespace(
    name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30,
    shared_memory_per_block_optin=227 * 1024, L2_cache_size=50 * 2**20, warp_size=32,
)  # fmt: skip


def _waiting(what: str):
    return lambda *_, **__: device.wait(what)


def _nothing(*_, **__):
    return None


_CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": _nothing,
    "_lazy_init": _nothing,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": _nothing,
    "device": _OnDevice,
    "get_device_properties": lambda *_: PROPERTIES,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: "pretended",
    "is_bf16_supported": lambda *_, **__: True,
    "current_stream": lambda *_: device.stream,
    "default_stream": lambda *_: device.stream,
    "Stream": Stream,
    "stream": lambda stream: stream if stream is not None else contextlib.nullcontext(),
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": _capture,
    "graph_pool_handle": lambda: (0, 1),
    "is_current_stream_capturing": lambda: device.recording is not None,
    "synchronize": _waiting("synchronize"),
    "empty_cache": _nothing,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "memory_reserved": lambda *_: 0,
    "reset_peak_memory_stats": _nothing,
    "memory_snapshot": lambda *_: [],
    "mem_get_info": lambda *_: (100 * 2**30, 141 * 2**30),
    "manual_seed": _nothing,
    "manual_seed_all": _nothing,
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": _nothing,
    "set_sync_debug_mode": _nothing,
    "_sleep": _nothing,
}


def _as_cpu(function):
    """Autocast of the pretended device is that of the CPU: to C++ its tensors are there."""
    return lambda place, *rest: function("cpu" if place == "cuda" else place, *rest)


@contextlib.contextmanager
def pretended_cuda(compile_kernels: bool = False, values: bool = True) -> Iterator[Device]:
    """Inside, ``cuda`` is the pretended device; yields what happens on it.

    Args:
        compile_kernels: compile every Triton kernel that is launched for compute capability 9.0,
            as its just-in-time compiler would.
        values: False for tensors of any size, without memory and values: reading one raises.
    """
    import pytest
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map()  # made once in a process, of the functions that are there
    patch = pytest.MonkeyPatch()
    device.__init__()
    device.stream = Stream()
    device.place = torch.device("cpu" if values else "meta")
    for name, value in _CUDA.items():
        patch.setattr(torch.cuda, name, value)
    for name in ("is_autocast_enabled", "set_autocast_enabled", "get_autocast_dtype",
                 "set_autocast_dtype"):  # fmt: skip
        patch.setattr(torch, name, _as_cpu(getattr(torch, name)))
    run_backward = torch.autograd.graph._engine_run_backward
    for module in (torch.autograd, torch.autograd.graph):
        patch.setattr(module, "_engine_run_backward", _with_factories(run_backward))
    patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    patch.setattr(torch.amp.autocast_mode, "is_autocast_available", lambda _: True)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        patch.setattr(torch.optim.Optimizer, name, _nothing, raising=False)
    patch.setattr(torch, "compile", lambda function=None, **_: function or (lambda f: f))
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    patch.setattr(torch.utils, "swap_tensors", _move_parameter(torch.utils.swap_tensors))
    _pretend_triton(patch, compile_kernels)
    _pretend_library(patch)
    try:
        with _Factories():
            yield device
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        patch.undo()


# -- what kernels write, from the arguments of their launches --------------------------------------


def _forward(u, scale, shift, source, residual, branch, out, relu) -> None:
    """``u`` ``[N, P, Q, O]`` fp32; ``out`` ``[B, P, Q, O]``."""
    if source is not None:
        inside = (source >= 0) & (source < u.shape[0])
        u = u.index_select(0, source.clamp(0, u.shape[0] - 1))
        u = u.masked_fill(~inside[:, None, None, None], torch.nan)
    v = scale[:, None, None] * u
    if branch is not None:
        branch.copy_(v.view(branch.shape))
        v = branch.view(v.shape).float()  # the kernels go on with what backward will see
    if shift is not None:
        v = v + shift[:, None, None]
    if residual is not None:
        v = v + residual.view(v.shape).float()
    out.copy_((v.relu() if relu else v).view(out.shape))


def _convolved(x, w, stride, padding, dilation) -> Tensor:
    """``[N, H, W, C]`` and ``[O, R, S, C]`` to ``[N, P, Q, O]`` fp32."""
    x, w = x.float().permute(0, 3, 1, 2), w.float().permute(0, 3, 1, 2)
    return F.conv2d(x, w, None, stride, padding, dilation).permute(0, 2, 3, 1)


def _input_gradient(ag, w, size, stride, padding, dilation) -> Tensor:
    """``[B, P, Q, O]`` and ``[O, R, S, C]`` to ``[B, H, W, C]`` fp32."""
    shape = (ag.shape[0], w.shape[3], *size)
    return torch.nn.grad.conv2d_input(
        shape, w.float().permute(0, 3, 1, 2), ag.float().permute(0, 3, 1, 2), stride, padding,
        dilation,
    ).permute(0, 2, 3, 1)  # fmt: skip


def _backward(g, a, partial_at=None) -> Tensor:
    """The elementwise backward of ``g`` ``[B, ..., C]``; ``a``: tensors by name."""
    g = g.flatten(1, -2)

    def pixels(name):
        return None if a.get(name) is None else a[name].view(g.shape).float()

    def write(name, value):
        if a.get(name) is not None:
            a[name].copy_(value.reshape(a[name].shape))

    if a.get("skip") is not None:
        g = g + pixels("skip")
    if a["relu"]:
        open_ = pixels("activation") if a.get("activation") is not None else (
            pixels("branch") + a["shift"][:, None]
        )  # fmt: skip
        g = g * (open_ > 0)
    write("grad", g)
    if a.get("scaled_grad") is not None and a.get("first_of") is None:
        write("scaled_grad", a["scale"][:, None] * g)
    if a.get("shortcut_grad") is not None:
        write("shortcut_grad", a["shortcut_scale"][:, None] * g)
    sums = {"partial0": lambda: g.sum(1), "partial1": lambda: (g * pixels("branch")).sum(1),
            "partial2": lambda: (g * pixels("shortcut_branch")).sum(1)}  # fmt: skip
    for name, total in sums.items():
        if a.get(name) is not None:
            a[name].zero_()
            at = torch.arange(len(g)) if partial_at is None else partial_at
            a[name][at] = total()
    return g


def _flat_slots(batch: int, tokens: int, block_m: int, touched: int) -> Tensor:
    """The first slot of every sample, where tiles are flat in samples and tokens."""
    sample = torch.arange(batch)
    tile = sample * tokens // block_m
    return tile * touched + sample - tile * block_m // tokens


def _triton_conv_fprop(a) -> None:
    x, out = a["x"], a["out"]
    if "STRIDE_H" in a:
        x = x.view(a["N"], a["H"], a["W"], a["C"])
        stride = (a["STRIDE_H"], a["STRIDE_W"])
        w = a["w"].view(a["O"], a["R"], a["S"], a["C"])
    else:
        stride = (a["STEP"],) * 2
        w = a["w"].view(a["O"], a["R"], a["S"], a["C"])
    u = _convolved(x, w, stride, (a["PAD_H"], a["PAD_W"]), (a["DIL_H"], a["DIL_W"]))
    assert u.shape[1:] == (a["P"], a["Q"], a["O"])
    assert len(a["scale"]) == a["B"]
    _forward(u, a["scale"], a["shift"], a["source"], a["residual"], a["branch"], out, a["RELU"])


def _triton_conv_dgrad(a) -> None:
    a["relu"] = a["RELU"]
    gathers = "STRIDE_H" in a
    step = 1 if gathers else a["STEP"]
    size = (a["H"] * step, a["W"] * step)
    stride = (a["STRIDE_H"], a["STRIDE_W"]) if gathers else (step, step)
    w = a["w"].view(a["O"], a["R"], a["S"], a["C"])
    ag = a["ag"].view(a["B"], a["P"], a["Q"], a["O"]) if gathers else a["ag"]
    g = _input_gradient(ag, w, size, stride, (a["PAD_H"], a["PAD_W"]), (a["DIL_H"], a["DIL_W"]))
    at = None
    if gathers and a["SPAN"]:
        at = _flat_slots(a["B"], size[0] * size[1], a["BM"], a["SPAN"])
    _backward(g, a, at)


def _triton_linear_fprop(a) -> None:
    u = a["x"].view(a["B"], a["T"], 1, a["K"]).float() @ a["w"].view(a["O"], a["K"]).float().T
    _forward(u, a["scale"], a["shift"], None, a["residual"], a["branch"], a["out"], a["RELU"])


def _triton_linear_dgrad(a) -> None:
    a["relu"] = a["RELU"]
    g = a["ag"].view(a["B"], a["T"], a["K"]).float() @ a["w"].view(a["K"], a["C"]).float()
    at = _flat_slots(a["B"], a["T"], a["BM"], a["SPAN"]) if a["SPAN"] else None
    _backward(g, a, at)


def _grouped_sum(dout, scale, order, first_of, into) -> None:
    """``into[n] = sum over samples of image n of scale * dout``."""
    into.zero_()
    total = into.float()
    for image in range(len(into)):
        for sample in order[first_of[image] : first_of[image + 1]].tolist():
            total[image] += scale[sample] * dout[sample].float().view(into.shape[1:])
    into.copy_(total)


def _triton_epilogue_bwd(a) -> None:
    a["relu"] = a["RELU"]
    g = _backward(a["dout"].float(), a)
    if a["first_of"] is not None and a["scaled_grad"] is not None:
        _grouped_sum(g, a["scale"], a["order"], a["first_of"], a["scaled_grad"])


def _triton_column_sums(a) -> None:
    partial, total = a["partial"], a["total"]
    if a["SPAN"] == 0:
        total.copy_(partial.view(a["SLOTS"], a["B"], a["C"]).sum(0))
        return
    for b in range(a["B"]):
        first, last = b * a["T"] // a["BM"], ((b + 1) * a["T"] - 1) // a["BM"]
        tiles = torch.arange(first, last + 1)
        total[b] = partial[tiles * a["SPAN"] + b - tiles * a["BM"] // a["T"]].sum(0)


def _triton_gate_rows_bwd(a) -> None:
    for label, alpha in enumerate(a["alpha"].float()):
        first, last = a["first_of"][label : label + 2].tolist()
        total = a["t"][a["order"][first:last] // a["J"]].sum(0)
        a["dalpha"][label] = torch.sigmoid(-alpha) * total


def _pooled(x: Tensor, window: tuple, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maxima of ``[B, H, W, C]`` and which tap of its window each of them was."""
    kernel, stride, padding = window
    full = F.pad(x.permute(0, 3, 1, 2).float(), (padding[1], 10**3, padding[0], 10**3),
                 value=-torch.inf)  # fmt: skip
    taps = full.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    taps = taps[:, :, : size[0], : size[1]].flatten(-2)
    return tuple(t.permute(0, 2, 3, 1) for t in taps.max(-1))


def _unpooled(dout: Tensor, positions: Tensor, window: tuple, size: tuple[int, int]) -> Tensor:
    """The gradient ``[B, H, W, C]`` of what was pooled."""
    kernel, stride, padding = window
    taps = F.one_hot(positions.long(), kernel[0] * kernel[1]) * dout.unsqueeze(-1)
    columns = taps.permute(0, 3, 4, 1, 2).flatten(1, 2).flatten(2)
    out = dout.shape[1:3]
    reach = [(n - 1) * s + k for n, s, k in zip(out, stride, kernel, strict=True)]
    whole = F.fold(columns, reach, kernel, stride=stride)
    missing = [n + p - r for n, p, r in zip(size, padding, reach, strict=True)]
    whole = F.pad(whole, (0, missing[1], 0, missing[0]))
    return whole[:, :, padding[0] :, padding[1] :].permute(0, 2, 3, 1)


def _triton_window(a) -> tuple:
    return tuple((a[f"{name}H"], a[f"{name}W"]) for name in "KSP")


def _triton_max_pool_fwd(a) -> None:
    out, positions = _pooled(a["x"], _triton_window(a), (a["P"], a["Q"]))
    a["out"].copy_(out)
    if a["positions"] is not None:
        a["positions"].copy_(positions)


def _triton_max_pool_bwd(a) -> None:
    a["relu"] = a["RELU"]
    size = (a["H"], a["W"])
    _backward(_unpooled(a["dout"].float(), a["positions"], _triton_window(a), size), a)


def _triton_row_adam(a) -> None:
    rows = a["occurred"].nonzero().flatten()
    gradient = a["grad"][rows]
    a["exp_avg"][rows] += a["weight1"] * (gradient - a["exp_avg"][rows])
    a["exp_avg_sq"][rows] += a["weight2"] * (gradient**2 - a["exp_avg_sq"][rows])
    correction1, correction2 = (a[f"correction{i}"][rows, None] for i in (1, 2))
    root = (a["exp_avg_sq"][rows] / correction2).sqrt() + a["eps"]
    a["alpha"][rows] -= a["lr"] * a["exp_avg"][rows] / correction1 / root


_TRITON_KERNELS = {
    "max_pool_fwd_kernel": _triton_max_pool_fwd,
    "max_pool_bwd_kernel": _triton_max_pool_bwd,
    "row_adam_kernel": _triton_row_adam,
    "conv_fprop_kernel": _triton_conv_fprop,
    "conv_fprop_gather_kernel": _triton_conv_fprop,
    "conv_dgrad_kernel": _triton_conv_dgrad,
    "conv_dgrad_gather_kernel": _triton_conv_dgrad,
    "linear_fprop_kernel": _triton_linear_fprop,
    "linear_dgrad_kernel": _triton_linear_dgrad,
    "epilogue_bwd_kernel": _triton_epilogue_bwd,
    "column_sums_kernel": _triton_column_sums,
    "gate_rows_kernel": lambda a: a["out"].copy_(
        gates.gate_rows(a["alpha"].float(), a["forget"], a["gate_scale"])
    ),
    "gate_rows_bwd_kernel": _triton_gate_rows_bwd,
}


class _Compiled:
    """What the just-in-time compiler hands to the launcher."""

    function = packed_metadata = None

    def __init__(self, name: str, names: tuple[str, ...]):
        self.name, self.names = name, names

    def launch_metadata(self, *_):
        return None

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *values) -> None:
        launched(self.name, (x, y, z), stream, dict(zip(self.names, values, strict=True)))


def launched(name: str, grid: tuple[int, int, int], stream: int, values: dict) -> None:
    """Checks what the driver would, and computes the results."""
    assert all(isinstance(n, int) and 0 < n < 2**31 for n in grid), f"{name}: grid {grid}"
    assert max(grid[1:]) <= 65535, f"{name}: grid {grid}"
    assert stream == device.stream.cuda_stream, f"{name}: not on the current stream"
    inner = {}
    for key, value in values.items():
        if hasattr(value, "block_shape"):
            _check_descriptor(f"{name}: {key}", value)
            value = value.base
        if isinstance(value, Tensor):
            assert isinstance(value, Pretended), f"{name}: {key} is on the host"
            value = value.inner
        inner[key] = value
    device.launches.append((name, values))
    if device.place.type == "meta":
        return
    device.record(lambda: _TRITON_KERNELS[name](dict(inner)))
    device.will_write(t for t in inner.values() if isinstance(t, Tensor))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        _TRITON_KERNELS[name](dict(inner))


def _check_descriptor(what: str, view) -> None:
    """The rules of cuTensorMapEncodeTiled."""
    size = view.base.element_size()
    assert isinstance(view.base, Pretended), f"{what} is on the host"
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


def _pretend_triton(patch, compile_kernels: bool) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit
    from wfnet.kernels import config

    def load_binary(name, binary, shared, index):
        return name, name, 64, 0, 1024

    class Launcher:
        def __init__(self, source, metadata):
            self.kernel = source.fn

        def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *values):
            names = [p.name for p in self.kernel.params]
            launched(self.kernel.__name__, (x, y, z), stream, dict(zip(names, values, strict=True)))

    pretended = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda index: device.stream.cuda_stream,
        launcher_cls=Launcher,
        utils=SimpleNamespace(
            load_binary=load_binary,
            unload_module=_nothing,
            get_device_properties=lambda index: {"max_shared_mem": 227 * 1024},
        ),
    )
    patch.setattr(driver, "_active", pretended)
    patch.setattr(config, "_cuda_device", config._cuda_device.__wrapped__)  # keeps nothing
    for kernel in _jit_functions():
        patch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    if compile_kernels:
        return

    def compiled(self, key, signature, index, constexprs, options, attrs, warmup):
        kernel = _Compiled(self.__name__, tuple(p.name for p in self.params))
        self.device_caches[index][0][key] = kernel
        return kernel

    patch.setattr(jit.JITFunction, "_do_compile", compiled)


def _jit_functions() -> list:
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
    return [vars(module)[name] for module in modules for name in _TRITON_KERNELS
            if name in vars(module)]  # fmt: skip


# -- the compiled extension ------------------------------------------------------------------------


def _geometry(a) -> tuple:
    """Strides, paddings and dilations of (height, width)."""
    return tuple(zip(a["height"][3:], a["width"][3:], strict=True))


def _library_fprop(a) -> None:
    u = _convolved(a["x"], a["weight"], *_geometry(a))
    _forward(u, a["scale"], a["shift"], None, a["residual"], a["branch"], a["out"], a["relu"])


def _library_dgrad(a) -> None:
    totals = {f"partial{i}": a.get(f"t{i}") for i in range(2)}
    for name, total in totals.items():
        if total is not None:
            a[name].fill_(torch.nan)
    size = (a["height"][0], a["width"][0])
    g = _input_gradient(a["ag"], a["weight"], size, *_geometry(a))
    _backward(g, {**a, **totals})


_LIBRARY_KERNELS = {"fprop": _library_fprop, "dgrad": _library_dgrad}


def _pretend_library(patch) -> None:
    from wfnet.backends import cuda_launch

    launch = cuda_launch._launch

    def pretended(function, reads, writes, **numbers) -> None:
        if cuda_launch.library().emulated:
            raise RuntimeError("the pretended device runs the compiled module's host code")
        tensors = {**reads, **writes}
        for name, tensor in tensors.items():
            assert tensor is None or isinstance(tensor, Pretended), (
                f"{function}: {name} on the host"
            )
        try:
            launch(function, reads, writes, **numbers)
        except RuntimeError as error:
            if not any(text in str(error) for text in _NO_DRIVER):
                raise
        else:
            raise AssertionError(f"{function} launched on a machine without a driver")
        inner = {name: None if t is None else t.inner for name, t in tensors.items()}
        device.launches.append((function, {**tensors, **numbers}))
        if device.place.type == "meta":
            return
        work = functools.partial(_LIBRARY_KERNELS[function], {**inner, **numbers})
        device.record(work)
        device.will_write(t for t in inner.values() if t is not None)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            work()

    patch.setattr(cuda_launch, "_launch", pretended)
    patch.setattr(cuda_launch, "_processors", cuda_launch._processors.__wrapped__)


_NO_DRIVER = ("driver", "libcuda", "no CUDA-capable device")

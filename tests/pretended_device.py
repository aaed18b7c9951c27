"""What happens on the pretended device, its streams, events and graphs (pretended_cuda.py)."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

CUDA = torch.device("cuda", 0)


class WaitsInCapture(RuntimeError):
    """What a capture on a device would end with."""


class NoValues(RuntimeError):
    """What reading a tensor raises where there are no values."""


class Device:
    """What happened on the pretended device."""

    def __init__(self) -> None:
        self.waits: list[tuple[str, str]] = []  # operation, line of the project that asked for it
        self.launches: list[tuple[str, dict]] = []
        self.kernels: list = []  # Triton's, of the package
        self.beside = 0  # tensors made in one stream for another
        self.recording: list[Callable[[], None]] | None = None
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory as it was before the capture
        self.stream = 0  # the current stream
        self.place = torch.device("cpu")  # where values are; on "meta" there are none

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


def asked_by() -> str:
    """Innermost function of the project (else of anybody) outside of here: ``file:function``."""
    frames = [f for f in traceback.extract_stack() if "/pretended_" not in f.filename]
    ours = [f for f in frames if "/wfnet/" in f.filename or "/kernels/" in f.filename]
    frame = (ours or frames)[-1]
    return f"{frame.filename.rsplit('/', 1)[1]}:{frame.name}"


device = Device()


# -- torch.cuda ------------------------------------------------------------------------------------


class Stream:
    """A stream; work is done at once, so that order is all that it has."""

    numbers = iter(range(1, 1 << 30))

    def __init__(self, device=None, priority: int = 0):
        self.cuda_stream = next(self.numbers) * 0x1000
        self.device = CUDA

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
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
    name="pretended",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 2**30,
    shared_memory_per_block_optin=227 * 1024,
    L2_cache_size=50 * 2**20,
    warp_size=32,
)


def _waiting(what: str):
    return lambda *_, **__: device.wait(what)


def nothing(*_, **__):
    return None


_NOTHING = ("init", "_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats")
_NOTHING += ("manual_seed", "manual_seed_all", "set_rng_state", "set_sync_debug_mode", "_sleep")
REPLACED = {
    **dict.fromkeys(_NOTHING, nothing),
    **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), lambda *_: 0),
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": lambda place: contextlib.nullcontext(),
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
    "graph": capture,
    "graph_pool_handle": lambda: (0, 1),
    "is_current_stream_capturing": lambda: device.recording is not None,
    "synchronize": _waiting("synchronize"),
    "memory_snapshot": lambda *_: [],
    "mem_get_info": lambda *_: (100 * 2**30, 141 * 2**30),
    "get_rng_state": lambda *_: torch.get_rng_state(),
}

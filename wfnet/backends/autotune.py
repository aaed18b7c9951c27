"""Who runs each call of a fused network on a CUDA device: checked there, timed there, and kept.

This is what ``backend="auto"`` means for a fused plan on a CUDA device. The first time that a kind
of call occurs (operation, shapes, dtype, what its epilogue has), every candidate runs it on the
very operands. One that raises, or whose results differ from PyTorch's by more than
:data:`BOUNDS`, is left out with a line in the log; of the others the fastest is taken. Decisions
are kept (:mod:`wfnet.backends.autotune_cache`) and serve every batch up to the size, a power of
two, that they were made for.

A network on a CPU, or on a backend that is asked for by name, never comes here.
"""

import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from wfnet import backends
from wfnet.backends import cuda_launch
from wfnet.backends.autotune_cache import Choices, Entry, TuningCache, describe_entries
from wfnet.backends.contract import Activation, Backend, ConvGeometry, Epilogue, LayerBelow
from wfnet.backends.cudnn_graph import INSTALLED, CudnnGraph
from wfnet.backends.mixed import EagerProducts, MixedEager
from wfnet.services.clock import interleaved, reason_of, timed
from wfnet.services.log import logger
from wfnet.services.ranks import Ranks

DEFAULT_SECONDS = 20.0
# Most that a sample's result may differ from PyTorch's, relative to its norm, by the narrowest
# dtype of the operands: both round to it (fp32 products may be in TF32), PyTorch also what it sums.
BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}
# Forward, no element may differ by more than so many bounds, relative to the largest. Backward one
# may: the ReLU of a sum near 0 is open or not.
_ELEMENT_BOUNDS = 4
# Cycles that a device spins before a timed call, so that the host is ahead of it: about 1 ms.
_HEAD_START = 2_000_000
# Measurements of a kind that may decide nothing: later operands may tell more than the first.
_MOST_FUTILE = 3
_CONVOLUTIONS = ("conv2d", "conv2d_dgrad")
_OF_LAYERS = ("weight", "alpha")  # arguments whose first dimension is no batch


def tuning_seconds(tune: bool | float) -> float:
    """Returns the seconds that ``tune`` allows: False is 0, True is :data:`DEFAULT_SECONDS`.

    Raises:
        ValueError: for what is neither a truth value nor a number of at least 0.
    """
    if isinstance(tune, bool):
        return DEFAULT_SECONDS if tune else 0.0
    if not isinstance(tune, int | float) or not 0 <= tune < math.inf:
        raise ValueError(f"tune={tune!r} is none of True, False and a number of seconds")
    return float(tune)


def default_candidates() -> dict[str, Backend]:
    """Returns the candidates by name; ``eager`` is the truth for all."""
    kernels = {name: backends.get(name) for name in ("triton", "cuda")}
    graphs = {"cudnn-graph": CudnnGraph()} if INSTALLED else {}
    return {"eager": MixedEager(), "eager+triton": EagerProducts(), **graphs, **kernels}


def has_kernels(device: torch.device) -> bool:
    """Returns whether there is anything to choose from on ``device``."""
    return _takes_tensor(backends.get("triton"), torch.empty(0, device=device))


def _takes_tensor(backend: Backend, x: Tensor) -> bool:
    """Whether a backend takes the device and the dtype of ``x``."""
    return backend.refuse_linear(x.new_empty((1, 1, 1)), x.new_empty((1, 1))) is None


def _tuned(method: str) -> Callable:
    """Returns a method of :class:`TunedBackend`: that of the backend which the call is given to."""
    signature = inspect.signature(getattr(Backend, method))

    def call(self: "TunedBackend", *args: object, **kwargs: object) -> object:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        arguments = dict(given.arguments)
        del arguments["self"]
        return self.run(method, arguments)

    return call


class TunedBackend(Backend):
    """Takes for every call the fastest candidate that computed the same as PyTorch.

    Args:
        device: of the calls.
        seconds: that measuring may take, for each size of a batch; what is left after that is
            PyTorch's, until another process goes on. A call that has begun is measured.
        candidates: by name, ``eager`` among them; all keep branches as kernels do.
        cache: where decisions are read and kept; None: nowhere.
        repeats: timed calls of each candidate, of which the fastest counts.

    Attributes:
        choices: what has been decided, here or in the cache.
        taken: candidates by kinds of calls so far.
    """

    name = "auto"
    pools_with_epilogue = True

    def __init__(
        self,
        device: torch.device,
        seconds: float = DEFAULT_SECONDS,
        candidates: Mapping[str, Backend] | None = None,
        cache: TuningCache | None = None,
        repeats: int = 5,
    ):
        self.device, self.seconds, self.cache, self.repeats = device, seconds, cache, repeats
        self.candidates = default_candidates() if candidates is None else candidates
        self.choices: Choices = {} if cache is None else cache.read()
        self.taken: dict[str, str] = {}
        self._kinds: dict[tuple, str] = {}
        self._futile: Counter[str] = Counter()  # by kind: measurements that decided nothing
        self._spent: Counter[int] = Counter()  # seconds by the size of batches
        self._said: set[int] = set()

    conv2d, conv2d_dgrad, epilogue_backward = map(_tuned, (*_CONVOLUTIONS, "epilogue_backward"))
    max_pool2d, max_pool2d_backward = map(_tuned, ("max_pool2d", "max_pool2d_backward"))
    gate_rows, gate_rows_backward = map(_tuned, ("gate_rows", "gate_rows_backward"))
    product_moments, epilogue = map(_tuned, ("product_moments", "epilogue"))
    moments_backward = _tuned("moments_backward")

    def run(self, method: str, arguments: dict[str, object]) -> object:
        """Makes a call, by the candidate that is chosen for its kind."""
        key = method, *_key(arguments)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = ", ".join([method, *_described(key[1:])])
        epilogue, forget = arguments.get("epilogue"), arguments.get("forget")
        first = next(iter(arguments.values())) if forget is None else forget
        batch = len(first if epilogue is None else epilogue.scale)
        name = self._known(kind, batch) or self._decide(method, kind, arguments, batch)
        self.taken[kind] = name
        return getattr(self.candidates[name], method)(*arguments.values())

    def _known(self, kind: str, batch: int) -> str | None:
        """The candidate that was chosen for the next larger batch."""
        sizes = [size for size in self.choices.get(kind, ()) if size >= batch]
        name = self.choices[kind][min(sizes)]["backend"] if sizes else None
        return name if name in self.candidates else None

    def _decide(self, method: str, kind: str, arguments: dict[str, object], batch: int) -> str:
        size = 1 << max(batch - 1, 0).bit_length()
        if not batch or self._futile[kind] >= _MOST_FUTILE or not self._may_measure():
            return "eager"
        if self._spent[size] >= self.seconds:
            if size not in self._said:
                logger.warning(
                    "tuning for batches of up to %d samples has taken its %g s: what is not yet "
                    "decided runs eager, and the next run goes on; more time: tune=SECONDS",
                    *(size, self.seconds),
                )
                self._said.add(size)
            return "eager"
        start = time.perf_counter()
        try:
            entry = self._measure(method, kind, arguments)
        except torch.OutOfMemoryError:
            logger.warning("%s runs eager: no memory is left to compare backends", kind)
            entry = None
        self._spent[size] += time.perf_counter() - start
        if entry is None:
            self._futile[kind] += 1
            return "eager"
        self.choices.setdefault(kind, {})[size] = entry
        logger.info("%s", *describe_entries(kind, {size: entry}))
        if self.cache is not None:
            self.cache.write(self.choices)
        return entry["backend"]

    def _may_measure(self) -> bool:
        """Not while a graph is captured. Of several ranks the first decides, for all."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        return not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0)

    def _measure(self, method: str, kind: str, arguments: dict[str, object]) -> Entry | None:
        """Checks and times all candidates; None where the operands tell nothing (zeros, NaN)."""
        calls = {
            name: self._call(backend, method, arguments)
            for name, backend in self.candidates.items()
            if name == "eager" or _takes(name, backend, method, arguments)
        }
        excluded: dict[str, str] = {}
        expected, forward = calls["eager"](), "below" not in arguments
        bound = max(BOUNDS.get(t.dtype, 1e-6) for t in arguments.values() if isinstance(t, Tensor))
        if not all(t is None or 0 < _norms(t).sum().item() < math.inf for t in expected):
            return None
        for name in list(calls)[1:]:
            try:
                reason = difference(calls[name](), expected, bound, forward)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of compilers, drivers and our own code
                reason = reason_of(error)
            if reason is not None:
                logger.warning("backend %s is left out of %s: %s", name, kind, reason)
                excluded[name] = reason
                del calls[name]
        del expected
        times, failed = interleaved(calls, self.repeats, self._clock)
        if "eager" in failed:  # the device is out of memory, or a candidate broke it
            return None
        for name, reason in failed.items():
            logger.warning("backend %s is left out of %s: %s", name, kind, reason)
        ms = {name: round(min(times[name]), 4) for name in calls if name not in failed}
        return {"backend": min(ms, key=ms.get), "ms": ms, "excluded": excluded | failed}

    def _call(
        self, backend: Backend, method: str, arguments: dict[str, object]
    ) -> Callable[[], list[Tensor | None]]:
        """A call that writes sums of its own and returns all that it computes."""

        def call() -> list[Tensor | None]:
            given = dict(arguments)
            below = given.get("below")
            if below is not None:
                given["below"] = below = _own_sums(below)
            if "may_overwrite" in given:
                given["may_overwrite"] = False
            if method == "epilogue":  # without `save` it overwrites its operand
                given["epilogue"] = replace(given["epilogue"], save=True)
            result = getattr(backend, method)(*given.values())
            if isinstance(result, Tensor):
                return [result]
            if method == "max_pool2d":  # positions are compared by the gradient that they give
                (out, positions), x, window = result, given["x"], given["window"]
                if positions is None:
                    return [out]
                return [out, backend.max_pool2d_backward(out, positions, x, window).grad]
            found = result[:2] if isinstance(result, Activation) else result
            return [*found, *([] if below is None else _sums(below))]

        return call

    def _clock(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda._sleep(_HEAD_START)
        return timed(call, self.device)

    def share(self, ranks: Ranks) -> None:
        """Gives the decisions of the first rank to all; every rank must call it."""
        for kind, sizes in ranks.first_does(lambda: self.choices).items():
            self.choices.setdefault(kind, {}).update(sizes)

    def report(self) -> list[str]:
        """Returns a line for every kind of call so far: who runs it, and why."""
        return [
            line
            for kind in self.taken
            for line in describe_entries(kind, self.choices.get(kind, {}))
            or [f"{kind}: eager (not measured)"]
        ]


def _takes(name: str, backend: Backend, method: str, arguments: dict[str, object]) -> bool:
    """Whether a candidate has an implementation of its own for a call."""
    if method == "product_moments":
        return name == "triton" and backend.refuse_conv2d(*arguments.values()) is None
    if method not in _CONVOLUTIONS:
        floats = (v for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point())
        return name == "triton" and _takes_tensor(backend, next(floats))
    backward, weight, geometry = "below" in arguments, arguments["weight"], arguments["geometry"]
    expands = not backward and arguments["epilogue"].source is not None
    if name == "eager+triton" and not backward:
        return False  # PyTorch's forward pass is that of eager
    if name == "cudnn-graph" and (backward or expands):
        return False
    x = arguments["scaled_grad" if backward else "x"]
    if backward:  # the layer's input, without its memory
        x = x.new_empty(()).expand(arguments["input_shape"])
    if backend.refuse_conv2d(x, weight, geometry) is not None:
        return False
    shapes = tuple(x.shape), tuple(weight.shape)
    triton_s = name == "cuda" and (expands or cuda_launch.refuse(backward, *shapes, geometry))
    return not triton_s


def stored_choices(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> list[str]:
    """Returns what the cache says of a convolution in fused networks on the device of ``x``."""
    if not has_kernels(x.device):
        return []
    filters = _described(_key({"weight": weight, "geometry": geometry}))
    (of_input,) = _described([("x", *_layout(x, 1))])
    ways = f"conv2d, {of_input}", f"input_shape {_word(tuple(x.shape[1:]))}"
    return [
        line
        for kind, sizes in TuningCache(x.device).read().items()
        if all(words in kind for words in filters) and any(way in kind for way in ways)
        for line in describe_entries(kind, sizes)
    ]


# -- kinds of calls --------------------------------------------------------------------------------


def _key(arguments: Mapping[str, object]) -> tuple:
    """Arguments but for values and the size of the batch: what a choice holds for."""
    parts: list[tuple] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            parts.append((name, *_layout(value, int(name not in _OF_LAYERS))))
        elif isinstance(value, Epilogue | LayerBelow):
            of = {one.name: getattr(value, one.name) for one in fields(value)}
            parts.append((name, *(n for n, v in of.items() if isinstance(v, Tensor) or v)))
        elif name == "input_shape":
            parts.append((name, tuple(value[1:])))
        elif name not in ("may_overwrite", "gate_scale"):
            parts.append((name, value))
    return tuple(parts)


def _layout(t: Tensor, first: int) -> tuple[torch.dtype, tuple[int, ...], str]:
    copied = t.dim() == 4 and not t.is_contiguous(memory_format=torch.channels_last)
    return t.dtype, tuple(t.shape[first:]), "not channels-last" if copied else ""


def _described(key: Sequence[tuple]) -> list[str]:
    """A key in words."""
    return [" ".join(word for part in parts if (word := _word(part))) for parts in key]


def _word(part: object) -> str:
    if type(part) is tuple:  # sizes
        return "x".join(map(str, part))
    return str(part).removeprefix("torch.")


# -- results ---------------------------------------------------------------------------------------


def _own_sums(layer: LayerBelow) -> LayerBelow:
    """``layer`` with memory of its own for the sums that a call writes."""
    given = {name: getattr(layer, name) for name in ("t1", "t0")}
    own = {n: t.new_empty_strided(t.shape, t.stride()) for n, t in given.items() if t is not None}
    shortcut = None if layer.shortcut is None else _own_sums(layer.shortcut)
    return replace(layer, **own, shortcut=shortcut)


def _sums(layer: LayerBelow) -> list[Tensor | None]:
    return [layer.t1, layer.t0, *([] if layer.shortcut is None else _sums(layer.shortcut))]


def _norms(t: Tensor) -> Tensor:
    """``[B]``, fp32 (fp64 for fp64 ``t``)."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    return torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=dtype)


def difference(
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    bound: float,
    forward: bool = True,
) -> str | None:
    """Returns how results differ by more than ``bound``, in words; None if they do not.

    Every sample is compared by itself, so that one wrong tile of a large batch is seen; a sample
    that is small beside the others is measured by their mean. ``forward``: elements are compared,
    too, so that one wrong pixel is seen.
    """
    for mine, truth in zip(found, expected, strict=True):
        if (mine is None) != (truth is None):
            return "it lacks a result"
        if mine is None:
            continue
        if mine.shape != truth.shape:
            return f"a result is {list(mine.shape)}, expected {list(truth.shape)}"
        sizes, apart = _norms(truth), mine - truth
        error = (_norms(apart) / sizes.maximum(sizes.square().mean().sqrt())).max().item()
        if not error <= bound:
            return f"its results differ by {error:.1e} (bound {bound:.0e})"
        error = (apart.abs().max() / truth.abs().max()).item()
        if forward and not error <= _ELEMENT_BOUNDS * bound:
            return f"an element differs by {error:.1e} (bound {_ELEMENT_BOUNDS * bound:.0e})"
    return None

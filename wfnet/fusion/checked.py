"""Making a network's fused form, comparing it with the network, and noticing when it has changed.

A plan holds modules, not their weights: those are read anew, or compared by version. What it was
made from beyond them (which modules there are, their hooks, modes and settings) is noted; where
that has changed, the fused form is made anew.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from types import FunctionType, MethodType, NoneType

import torch
from torch import Tensor, nn

from wfnet import backends, gates
from wfnet.attention_layers import DirectLinear
from wfnet.backends.autotune import TunedBackend, has_kernels, tuning_seconds
from wfnet.backends.autotune_cache import TuningCache
from wfnet.backends.contract import Backend
from wfnet.fusion.compiled import CompiledNetwork
from wfnet.fusion.cut import split_at_first_mask
from wfnet.fusion.durable_run import DurableNetwork
from wfnet.fusion.execution import PlanNetwork
from wfnet.fusion.plan import Plan, make_plan
from wfnet.fusion.run import FusedNetwork
from wfnet.fusion.trace import NotFusable, because, global_hooks_of_torch
from wfnet.fusion.transformer import TrunkNetwork
from wfnet.layers import MaskedLayer
from wfnet.services.log import logger

# Images and labels [B, J] to logits, unfused.
Unfused = Callable[[Tensor, Tensor], Tensor]


class Fusion:
    """The fused form of one network, made on first use and whenever the network has changed.

    A copy, or a pickled one, starts without: plans hold modules of the original, and compiled code.

    Attributes:
        network: the fused form that was last asked for; None where the network runs unfused.
    """

    def __init__(self) -> None:
        self.network: FusedNetwork | None = None
        self._made_for: tuple[object, ...] | None = None
        self._structure: dict[nn.Module, tuple] = {}
        # Modules whose attributes change in every run: counters of calls, say.
        self._restless: set[nn.Module] = set()

    def __reduce__(self) -> tuple:
        return Fusion, ()

    def of(
        self,
        model: nn.Module,
        layers: Sequence[MaskedLayer],
        mode: bool | str,
        images: Tensor,
        unfused: Unfused,
        tune: bool | float = True,
    ) -> FusedNetwork | None:
        """Returns the fused form of ``model``; None, with a line in the log, where there is none.

        Args:
            layers: masked layers of the model.
            mode: True or "compile".
            images: ``[N, C, H, W]``; two of them are what a new plan is made and checked with.
            unfused: what the fused form is compared with.
            tune: as :class:`wfnet.WFNet` takes it.

        Raises:
            ValueError: for another mode, or another ``tune``.
        """
        check_mode(mode)
        seconds = tuning_seconds(tune)
        made_for = (mode, seconds, images.device, images.dtype, global_hooks_of_torch())
        if made_for != self._made_for or self._noted(model) != self._structure:
            self.network, self._made_for, self._restless = None, None, set()
            before = self._noted(model)
            self.network = _make(model, layers, mode, seconds, images, unfused)
            after = self._noted(model)
            self._restless = {module for module in before if before[module] != after.get(module)}
            self._structure, self._made_for = self._noted(model), made_for
        return self.network

    def _noted(self, model: nn.Module) -> dict[nn.Module, tuple]:
        """What the modules of ``model`` are, but for their tensors."""
        return {m: _settings_of(m) for m in model.modules() if m not in self._restless}


def check_mode(mode: object) -> None:
    """Raises ValueError unless ``mode`` is a way to fuse, or none."""
    if mode not in (True, False, "compile"):
        raise ValueError(f"fuse={mode!r} is none of True, False and 'compile'")


_PLAIN = frozenset((bool, int, float, str, NoneType, FunctionType, MethodType))


def _settings_of(module: nn.Module) -> tuple[object, ...]:
    """Type, children, hooks and plain attributes: mode, stride, a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    hooks = (*hooks, module._backward_hooks, module._backward_pre_hooks)
    settings = {
        name: value
        for name, value in vars(module).items()
        if type(value) in _PLAIN
        or (type(value) is tuple and all(type(part) in _PLAIN for part in value))
    }
    return type(module), list(module._modules.items()), [*map(tuple, hooks)], settings


def _make(
    model: nn.Module,
    layers: Sequence[MaskedLayer],
    mode: bool | str,
    seconds: float,
    images: Tensor,
    unfused: Unfused,
) -> FusedNetwork | None:
    name = type(model).__name__
    try:
        for layer in layers:
            if isinstance(layer, DirectLinear):
                raise NotFusable(f"{layer.layer_name!r} is computed by its parent")
        if all(isinstance(layer, nn.Linear) for layer in layers):
            parts = split_at_first_mask(model, images[:2])
            network = TrunkNetwork(*parts, compiled=False)
            check_plan(network, unfused, images)
            if mode == "compile" or images.device.type == "cuda":
                network = TrunkNetwork(*parts, compiled=True)
        else:
            backend = backend_for(layers)
            plan = make_plan(model, images[:2])
            kind = DurableNetwork if plan.durable else PlanNetwork
            network = kind(plan, backend)
            with plan.layers[0].mode.grouped(None) if plan.durable else nullcontext():
                check_plan(network, unfused, images)
            if mode == "compile" and backend is backends.get("eager"):  # it has a graph to compile
                reason = _refuse_graph(plan)
                if reason is None:
                    network = CompiledNetwork(network)
                else:
                    logger.warning("%s runs uncompiled: %s", name, reason)
            elif seconds and _is_tuned(layers, images.device):
                cache = TuningCache(images.device)
                network = kind(plan, TunedBackend(images.device, seconds, cache=cache))
    except NotFusable as reason:
        logger.warning("%s runs unfused: %s", name, reason)
        return None
    logger.info("%s: %s", name, network.describe())
    return network


def _is_tuned(layers: Sequence[MaskedLayer], device: torch.device) -> bool:
    """Whether calls are given to who measured fastest: on a CUDA device, where nobody is named."""
    free = all(backends.requested(layer.backend) == "auto" for layer in layers)
    return free and device.type == "cuda" and has_kernels(device)


def _refuse_graph(plan: Plan) -> str | None:
    if plan.durable:
        return "moments of groups have no compiled graph"
    return "some of its masked layers do not fold" if plan.masked_calls else None


def check_plan(network: FusedNetwork, unfused: Unfused, images: Tensor) -> None:
    """Compares the fused with the unfused network on a few images under mixed rows.

    The backward pass is run too, with nothing to compare its values with. Not of a network that was
    made in inference mode, which has none.

    Raises:
        NotFusable: if they differ by more than rounding.
    """
    classes = network.layers[0].num_classes
    with torch.inference_mode(False), torch.no_grad():
        few = images[:2].clone()  # outside of inference mode a tensor like any other
        source = torch.tensor([0, few.shape[0] - 1, 0], device=images.device)
        rows = torch.tensor([[0], [classes - 1], [-1]], device=images.device)
        try:
            fused = network(few, rows, source)
            if not any(matrix.is_inference() for matrix in network.filters()):
                run = network.start(few, rows, source)
                run.backward(torch.ones_like(run.forward()))
        except NotFusable:
            raise
        except Exception as error:
            raise because("running the plan failed", error) from error
        expected = unfused(gates.gather_samples(few, source), rows)
    span = expected.abs().max().clamp_min(1e-6)
    error = ((fused - expected).abs().max() / span).item()
    eps = torch.finfo(fused.dtype).eps
    if fused.is_cuda and fused.dtype is torch.float32:  # products may be in TF32
        eps = 2.0**-10
    # In fp32, Inception's 94 layers round by 74 of these units; a wrong plan is off by about 1.
    limit = min(256 * eps * len(network.layers) ** 0.5, 0.1)
    if not error <= limit:
        raise NotFusable(f"fused and unfused outputs differ by {error:.1e} (limit {limit:.1e})")


def backend_for(layers: Iterable[MaskedLayer]) -> Backend:
    """Returns the one backend that ``layers`` ask for.

    Raises:
        NotFusable: if they ask for different backends, or for the reference.
    """
    names = {backends.requested(layer.backend) for layer in layers}
    if len(names) > 1:
        raise NotFusable("its layers ask for different backends")
    (name,) = names
    if name == "reference":
        raise NotFusable("the reference backend is never fused")
    return backends.get(backends.resolve(name))

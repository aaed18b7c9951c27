"""A fused plan for a frozen, masked network: one autograd node, one pass per convolution.

Everything that follows a convolution in a frozen network folds into two tables per sample and
channel (design: ``out = act(A * u + C + residual)``; :mod:`wfnet.gate_tables`). :func:`make_plan`
finds what folds, :class:`PlanNetwork` executes it. Its backward needs no layer input: one branch
per convolution is kept, and a mask where a residual decides about the ReLU. Every input-gradient
GEMM runs the epilogue backward of the layer below it
(:meth:`wfnet.backends.contract.Backend.conv2d_dgrad`), so that between two GEMMs nothing remains.
What comes before the first mask is computed once per source image and not differentiated; tensors
that cross that cut are expanded to the samples there. Durable gates run by the same plans
(:class:`DurableNetwork`), with moments of groups between product and epilogue in untraining.

Networks that mask linear maps (transformers) keep their own operations: :class:`TrunkNetwork` runs
what comes before the first mask once per source image, gates of all layers come from one table, and
what attention would keep of a masked result is computed again. :class:`CompiledNetwork`, and the
trunk on request, let ``torch.compile`` fuse what lies between convolutions or products. All are
called and run in one way (:mod:`wfnet.fusion.run`).

None changes anything in the module: tree, hooks and state-dict keys stay as they are.

A walk through the room: ``trace`` (torch.fx), ``rewrite`` (so that more of a trace folds), ``plan``
(which steps), ``run`` (what every fused network is), ``execution`` (a plan, step
by step), ``durable_run``, ``compiled``; for transformers ``cut`` and ``transformer``; above them
``checked``, where a network keeps its fused form.
"""

from wfnet.fusion.checked import Fusion, backend_for, check_mode
from wfnet.fusion.compiled import CompiledNetwork
from wfnet.fusion.durable_run import DurableNetwork
from wfnet.fusion.execution import PlanNetwork
from wfnet.fusion.plan import CallStep, ConvStep, Plan, make_plan
from wfnet.fusion.run import FusedNetwork
from wfnet.fusion.trace import NotFusable
from wfnet.fusion.transformer import TrunkNetwork

__all__ = [
    "CallStep",
    "CompiledNetwork",
    "ConvStep",
    "DurableNetwork",
    "Fusion",
    "FusedNetwork",
    "NotFusable",
    "Plan",
    "PlanNetwork",
    "TrunkNetwork",
    "backend_for",
    "check_mode",
    "make_plan",
]

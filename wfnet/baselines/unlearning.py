"""The registry of baselines: those of this package, and those that other packages add.

Another package names its :class:`Method` as an entry point of the group ``wfnet.baselines``::

    [project.entry-points."wfnet.baselines"]
    fisher = "my_package.fisher:Fisher"
"""

from torch import nn

from wfnet.baselines.bad_teacher import BadTeacher
from wfnet.baselines.dampening import SelectiveDampening
from wfnet.baselines.fine_tuned import NegativeGradient, NegGradPlus, RandomLabels
from wfnet.baselines.method import BaselineConfig, Forget, Method, Origin
from wfnet.baselines.retrained import Retrained
from wfnet.baselines.saliency import SaliencyUnlearning
from wfnet.baselines.scrub import Scrub
from wfnet.baselines.trivial import BiasShifted, LogitMasked
from wfnet.baselines.undo import Undo
from wfnet.baselines.unsir import Unsir
from wfnet.services.extras import registry

GROUP = "wfnet.baselines"

# In the order in which they are made and shown.
_OWN = (
    LogitMasked(),
    BiasShifted(),
    Retrained(),
    RandomLabels(),
    NegativeGradient(),
    NegGradPlus(),
    SelectiveDampening(),
    SaliencyUnlearning(),
    Scrub(),
    BadTeacher(),
    Unsir(),
    Undo(),
)


METHODS = registry(GROUP, Method, _OWN)


def unlearn(
    method: str, origin: Origin, label: Forget, config: BaselineConfig | None = None
) -> nn.Module:
    """Makes one baseline: a plain model, in evaluation mode, that is to have forgotten a class.

    Deterministic given its arguments, the number of threads and the device. The original network
    and the caller's random state stay as they are.

    Args:
        method: one of ``METHODS``.
        label: the class, or several to be forgotten together.
        config: settings, of the class of the method's ``defaults``; these if None.

    Raises:
        ValueError: for an unknown method, settings of another one, a class without training
            images or without others, or classes or data that the method does not take.
        FloatingPointError: if the loss is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"there is no baseline {method!r}; choose of {', '.join(METHODS)}")
    known = METHODS[method]
    config = config or known.defaults
    if not isinstance(config, type(known.defaults)):
        kinds = type(known.defaults).__name__, type(config).__name__
        raise ValueError(f"settings of {method} are a {kinds[0]}, got a {kinds[1]}")
    known.check(origin, label)
    return known.unlearn(origin, label, config)

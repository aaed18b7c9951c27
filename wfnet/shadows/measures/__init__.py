"""Measures of shadow ensembles. A new one is a file here with a ``MEASURE``."""

import importlib
import pkgutil

from wfnet.shadows.measures.measure import Estimate, Measure, Pair

_MODULES = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
MEASURES: dict[str, Measure] = {
    module.MEASURE.name: module.MEASURE for module in _MODULES if hasattr(module, "MEASURE")
}

__all__ = ["MEASURES", "Estimate", "Measure", "Pair"]

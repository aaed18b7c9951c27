"""What weight filtering is compared with: one unlearned model per class, made in the usual ways.

Each costs a training or fine-tuning run per class, where filters learn all classes in one. Their
settings are chosen on validation images by a stated budget, which stands in every result.
"""

from wfnet.baselines.method import BaselineConfig, Forget, Method, Origin, classes_in, written
from wfnet.baselines.per_class import BaselineModels, BaselineResult, read_baselines, run_baseline
from wfnet.baselines.tuning import tune
from wfnet.baselines.unlearning import METHODS, unlearn

__all__ = [
    "METHODS",
    "BaselineConfig",
    "BaselineModels",
    "BaselineResult",
    "Forget",
    "Method",
    "Origin",
    "classes_in",
    "read_baselines",
    "run_baseline",
    "tune",
    "unlearn",
    "written",
]

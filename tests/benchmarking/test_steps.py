from dataclasses import replace

import pytest
import torch

from wfnet.benchmarking import step_baselines, steps
from wfnet.benchmarking.roofline import Rates
from wfnet.cli.classifier import create_classifier

RATES = Rates(1e12, 1e11, 4)
COPYING = ["loop", "grouped", "vmap"]


@pytest.fixture
def problem_of():
    def make(name="small/resnet", **settings):
        settings = {
            "image_size": 16,
            "batch_size": 4,
            "label_expansion": 2,
            "classes": 10,
            "repeats": 1,
        } | settings
        small = {"width": 8} if name == "small/resnet" else {"width": 32, "depth": 2}
        model = create_classifier(name, 10, in_channels=3, image_size=16, seed=0, options=small)
        return steps.make_problem(model, steps.StepSettings(**settings))

    return make


@pytest.mark.parametrize(
    ("name", "dtype"), [("small/resnet", torch.bfloat16), ("small/vit", torch.float32)]
)
def test_all_columns_have_the_gradients_of_eager(problem_of, name, dtype):
    """With distillation: from a network of their own."""
    names = [*COPYING, "eager", "unmasked", "wfnet/eager/unfused", "wfnet/eager/fused"]
    found = steps.measure(problem_of(name, distil=True, dtype=dtype), names, RATES)
    rows = found["columns"]
    assert {name: row.get("impossible") for name, row in rows.items()} == dict.fromkeys(names)
    assert rows["unmasked"].pop("gradient_error") is None
    for row in rows.values():
        if "gradient_error" in row:
            assert row["gradient_error"] <= found["largest_gradient_error"] <= 0.2
    if dtype is torch.float32:
        assert found["largest_gradient_error"] == 2e-3


def test_a_column_with_another_gradient_has_no_time(problem_of, monkeypatch):
    """Though its loss is right."""

    def wrong(layer, x):
        y = step_baselines._eager(layer, x)
        return y.detach() + 1.01 * (y - y.detach())

    monkeypatch.setitem(step_baselines.KINDS, "loop", wrong)
    rows = steps.measure(problem_of(), ["loop", "eager"], RATES)["columns"]
    assert rows["loop"]["wrong"]
    assert "its filter gradients are off by" in rows["loop"]["impossible"]
    assert rows["eager"]["median_ms"] > 0


def test_large_columns_run_by_themselves(problem_of, monkeypatch):
    names = ["eager", "unmasked", "wfnet/eager/fused"]
    together = []
    timing = steps._time
    monkeypatch.setattr(steps, "_is_large", lambda mebibytes, device: together == [])
    monkeypatch.setattr(
        steps,
        "_time",
        lambda problem, some, *more: (timing(problem, some, *more), together.append([*some])),
    )
    rows = steps.measure(problem_of(), names, RATES)["columns"]
    assert together == [["eager"], ["unmasked", "wfnet/eager/fused"]]
    assert list(rows) == names
    assert rows["eager"]["alone"]
    assert all(row["median_ms"] > 0 for row in rows.values())


def test_a_column_that_fails_costs_no_other(problem_of, monkeypatch):
    make = steps.make_step

    def failing(problem, name, stack):
        step, calls = make(problem, name, stack), iter(range(100))

        def run(lr):
            if next(calls) == 7:  # while it is timed
                raise ArithmeticError("out of registers")  # none of the kinds of a refusal
            return step(lr)

        return replace(step, run=run) if name == "wfnet/eager/unfused" else step

    monkeypatch.setattr(steps, "make_step", failing)
    monkeypatch.setitem(steps._MOST_COPIED, "cpu", 1e-6)
    names = ["wfnet/eager/unfused", "loop", "eager", "wfnet/eager/captured"]
    rows = steps.measure(problem_of(repeats=4), names, RATES)["columns"]
    assert rows["wfnet/eager/unfused"]["impossible"] == "ArithmeticError: out of registers"
    assert "one masked weight copy per sample needs" in rows["loop"]["impossible"]
    assert "CUDA" in rows["wfnet/eager/captured"]["impossible"]
    assert rows["eager"]["median_ms"] > 0


def test_masks_do_not_take_activations_to_fp32(problem_of):
    problem = problem_of(dtype=torch.bfloat16)
    for kind in (*COPYING, "eager"):
        model = step_baselines.baseline(problem.net, kind, problem.batch.forget)
        note = (seen := []).append
        for module in model.modules():
            if isinstance(module, step_baselines.Baseline):
                module.register_forward_hook(lambda module, inputs, out, note=note: note(out.dtype))
        with problem.autocast(), torch.no_grad():
            model(problem.expanded)
        assert set(seen) == {torch.bfloat16}, kind


def test_copies_are_no_launches():
    found = steps.launches_of(
        [steps.KernelTime("gemm", 3, 30.0), steps.KernelTime("Memcpy DtoD", 2, 5.0)]
    )
    assert found["kernel_launches"] == 3
    assert found["kernels"][0] == {"name": "gemm", "launches": 3, "microseconds": 30.0}

"""benchmarks/bench_step.py at a size that takes seconds: its columns, its files, its refusals."""

import json
from dataclasses import replace

import bench_step
import pytest

from wfnet.benchmarking import steps

BASELINES = ["loop", "grouped", "vmap", "eager", "unmasked"]
OURS = ["wfnet/eager/unfused", "wfnet/eager/fused", "wfnet/eager/captured"]


def test_every_column_has_numbers_or_a_reason(tmp_path):
    """The gradients of all masked columns were compared before anything was timed."""
    arguments = "--models small/resnet small/vit --image-size 32 -b 4 -M 2 --repeats 2 --device cpu"
    arguments = [*arguments.split(), "--output", str(tmp_path / "step.json")]
    arguments += ["--columns", *BASELINES, *OURS]
    returned = bench_step.main(arguments)
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["networks"].keys() == returned["networks"].keys()
    assert (tmp_path / "step.png").stat().st_size > 10_000
    for result in record["networks"].values():
        rows = result["columns"]
        assert list(rows) == [*BASELINES, *OURS]
        assert result["expanded_samples"] == 6
        assert "CUDA" in rows["wfnet/eager/captured"]["impossible"]
        for name in (*BASELINES, "wfnet/eager/unfused"):
            row = rows[name]
            assert row["least_ms"] <= row["median_ms"] <= row["largest_ms"]
            assert row["samples_per_second"] == pytest.approx(6e3 / row["median_ms"])
            assert row["peak_mebibytes"] > 0
    result = record["networks"]["small/resnet"]  # convolutions have a roofline
    row = result["columns"]["wfnet/eager/fused"]
    floor = result["floor_samples_per_second"]["fused_with_v"]
    assert 0 < row["share_of_floor"] == pytest.approx(row["samples_per_second"] / floor)
    assert row["peak_mebibytes"] < result["columns"]["eager"]["peak_mebibytes"]


def test_a_column_that_fails_costs_no_other(monkeypatch, tmp_path):
    make = steps.make_step

    def failing(problem, name, stack):
        step = make(problem, name, stack)
        calls = iter(range(100))

        def run(lr):
            if next(calls) == 7:  # while it is timed
                raise ArithmeticError("out of registers")  # none of the kinds of a refusal
            return step(lr)

        return replace(step, run=run) if name == "wfnet/eager/unfused" else step

    monkeypatch.setattr(steps, "make_step", failing)
    monkeypatch.setitem(steps._MOST_COPIED, "cpu", 1e-6)
    arguments = ["--models", "small/resnet", "--image-size", "16", "-b", "4", "-M", "1"]
    arguments += ["--repeats", "4", "--device", "cpu", "--output", str(tmp_path / "step.json")]
    columns = ["wfnet/eager/unfused", "loop", "eager"]
    bench_step.main([*arguments, "--columns", *columns])
    rows = json.loads((tmp_path / "step.json").read_text())["networks"]["small/resnet"]["columns"]
    assert rows["wfnet/eager/unfused"]["impossible"] == "ArithmeticError: out of registers"
    assert "one masked weight copy per sample needs" in rows["loop"]["impossible"]
    assert rows["eager"]["median_ms"] > 0

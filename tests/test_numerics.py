"""benchmarks/numerics.py: errors of smoke tests and of tests/gpu, counted; none is lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import device_run
import device_smoke
import numerics

from wfnet import backends

GPU_TESTS = Path(__file__).parent / "gpu"
# Stands for a file of tests/gpu; its "device" is the CPU.
TESTS = """
import pytest, torch
from closeness import assert_as_good, assert_within

def off_by(error):
    return torch.tensor([1.0 + error, 0.0]), torch.tensor([1.0, 0.0], dtype=torch.float64)

@pytest.mark.parametrize("path", ["portable", "hopper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conv2d_error(path, dtype):
    for what, error, eager in (("out", 0.125, 0.25), ("dx", 0.25, 0.125), ("t1", 0.5, 0.125)):
        mine, truth = off_by(error)
        assert_as_good(mine, off_by(eager)[0], truth, what, floor=1e-6)

def test_gate_tables_of_a_network():
    mine, truth = off_by(0.0)
    assert_within(mine, truth, "scales", 1e-6)
    mine[0] = torch.nan
    assert_within(mine, truth, "dalpha", 1e-6)

def test_source_indices(dtype=torch.float16):
    mine, truth = off_by(2.0**-21)  # within a few roundings, and far more than eager's
    assert_as_good(mine, off_by(2.0**-23)[0], truth, "out", floor=1e-6)

def test_fused_resnet():
    mine, truth = off_by(0.0)
    assert_within(mine, truth, "logits", 1.0)
    raise RuntimeError("an illegal address\\nwas met")

def test_that_measures_nothing():
    pass
"""


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A results folder with the report of TESTS, by the real conftest.py."""
    folder = tmp_path_factory.mktemp("gpu")
    for name in ("conftest.py", "closeness.py"):
        shutil.copy(GPU_TESTS / name, folder / name)
    (folder / "test_cuda_gpu.py").write_text(TESTS)
    results = folder / "run" / "results"
    results.mkdir(parents=True)
    report = results / "tests-hopper-errors.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "test_cuda_gpu.py", f"--junitxml={report}", "-p",
         "no:cacheprovider", "-q", "--rootdir", str(folder)],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "6 failed, 2 passed" in done.stdout, done.stdout
    return folder / "run"


def row_of(content, **wanted):
    (row,) = [r for r in content["rows"] if wanted.items() <= r.items()]
    return row


def test_tests_leave_their_errors_in_the_report(reported, tmp_path):
    content = numerics.write(reported, [], tmp_path / "numerics.json")
    assert content == json.loads((tmp_path / "numerics.json").read_text())
    forward = row_of(content, family="conv", kernels="hopper", dtype="bfloat16",
                     direction="forward")  # fmt: skip
    assert forward == {
        "shapes": "real", "backend": "cuda", "kernels": "hopper", "family": "conv",
        "dtype": "bfloat16", "direction": "forward", "comparisons": 1, "failures": 0,
        "largest_error": 0.125, "median_error": 0.125, "compared_with_eager": 1,
        "largest_ratio_to_eager": 0.5,
    }  # fmt: skip
    backward = row_of(content, family="conv", kernels="portable", dtype="float16",
                      direction="backward")  # fmt: skip
    assert (backward["comparisons"], backward["failures"]) == (2, 1)
    assert (backward["largest_error"], backward["median_error"]) == (0.5, 0.375)
    assert backward["largest_ratio_to_eager"] == 4.0


def test_nan_is_a_failure_and_rounding_no_ratio(reported, tmp_path):
    content = numerics.write(reported, [], tmp_path / "numerics.json")
    wrong = row_of(content, family="gates", direction="backward")
    assert (wrong["failures"], wrong["largest_error"]) == (1, None)
    assert row_of(content, family="gates", direction="forward")["failures"] == 0
    rounding = row_of(content, family="expansion")
    assert (rounding["failures"], rounding["compared_with_eager"]) == (0, 0)
    assert rounding["largest_ratio_to_eager"] is None
    assert rounding["dtype"] == "bfloat16"  # of a test without a parameter


def test_what_failed_without_a_comparison_is_named(reported, tmp_path):
    """Not the tests whose failure is in a row already."""
    content = numerics.write(reported, [], tmp_path / "numerics.json")
    assert content["unfinished"] == [
        {"name": "tests-hopper-errors: test_fused_resnet",
         "reason": "RuntimeError: an illegal address"},
    ]  # fmt: skip
    assert row_of(content, family="network")["comparisons"] == 1


def smoke(tmp_path, *words):
    results = tmp_path / "results"
    results.mkdir(exist_ok=True)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        return device_smoke.main(
            ["eager", *words, "--device", "cpu", "--dtypes", "float32", "--output",
             str(results / "smoke-eager-linear.json")]
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(before)


def test_smoke_results(tmp_path):
    assert smoke(tmp_path, "linear", "gates") == 0
    content = numerics.write(tmp_path, [], tmp_path / "numerics.json")
    assert content["unfinished"] == []
    forward = row_of(content, family="linear", direction="forward")
    assert forward["shapes"] == "smallest"
    assert (forward["backend"], forward["kernels"], forward["dtype"]) == ("eager", None, "float32")
    assert (forward["comparisons"], forward["failures"]) == (4, 0)
    assert 0 < forward["median_error"] <= forward["largest_error"] < 1e-5
    assert row_of(content, family="linear", direction="backward")["comparisons"] == 12
    assert {"forward", "backward"} == {
        row["direction"] for row in content["rows"] if row["family"] == "gates"
    }


def test_smoke_cases_that_are_wrong_or_raise(tmp_path, monkeypatch):
    eager = backends.get("eager")
    linear, calls = eager.linear, []

    def sometimes(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("an illegal instruction\nwas met")
        out, saved = linear(*arguments)
        if len(calls) == 3:
            out = out * torch.nan
        return out, saved

    monkeypatch.setattr(eager, "linear", sometimes)
    assert smoke(tmp_path, "linear") == 1
    content = numerics.write(tmp_path, [], tmp_path / "numerics.json")
    forward = row_of(content, direction="forward")
    assert (forward["comparisons"], forward["failures"]) == (3, 1)
    assert 0 < forward["largest_error"] < 1e-5
    assert content["unfinished"] == [
        {"name": "smoke-eager-linear: 49 tokens float32",
         "reason": "RuntimeError: an illegal instruction"},
    ]  # fmt: skip


def test_parts_that_ended_early_are_named(tmp_path):
    smoke(tmp_path, "gates")

    def part(name, status, code, **more):
        return {"name": name, "status": status, "exit_code": code, **more}

    made = {stage.name: {part.name for part in stage.parts} for stage in device_run.stages()}
    (tests,) = (name for name, parts in made.items() if "hopper-errors" in parts)
    stages = [
        {"name": "smoke", "parts": [
            part("smoke-eager-linear", "failed", 1),
            part("smoke-cuda-hopper-conv", "failed", -11),
            part("smoke-triton-conv", "failed", 1),
        ]},
        {"name": tests, "parts": [
            part("hopper-errors", "out of time", -6),
            {"name": "hopper-rest", "status": "no time left", "checks": None},
        ]},
        {"name": tests, "kept": True, "parts": [part("step-cuda", "passed", 0)]},
        {"name": "eval", "parts": [part("eval", "failed", -9)]},
    ]  # fmt: skip
    content = numerics.write(tmp_path, stages, tmp_path / "numerics.json")
    assert content["unfinished"] == [
        {"name": "smoke-cuda-hopper-conv", "reason": "ended with status -11"},
        {"name": "smoke-triton-conv", "reason": "ended with status 1"},
        {"name": "hopper-errors", "reason": "out of time"},
        {"name": "hopper-rest", "reason": "no time left"},
    ]


def test_a_broken_file_is_named_and_the_others_count(tmp_path):
    smoke(tmp_path, "gates")
    (tmp_path / "results" / "tests-half.xml").write_text("<testsuites><testsuite>")
    (tmp_path / "results" / "environment.json").write_text(
        json.dumps({"device": "D", "commit": "c", "python": "3"})
    )
    content = numerics.write(tmp_path, [], tmp_path / "numerics.json")
    assert content["rows"]
    (broken,) = content["unfinished"]
    assert broken["name"] == "tests-half"
    assert (content["device"], content["commit"], content["driver"]) == ("D", "c", None)


def test_the_command(tmp_path, capsys):
    output = tmp_path / "numerics.json"
    arguments = [str(tmp_path), "--output", str(output)]
    assert numerics.main(arguments) == 1
    assert not output.exists()
    smoke(tmp_path, "gates")
    capsys.readouterr()
    assert numerics.main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(json.loads(output.read_text())["rows"]) >= 2
    assert all("0 failures" in line for line in shown)

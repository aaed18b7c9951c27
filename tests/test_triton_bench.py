"""benchmarks/bench_ops.py at a size that takes seconds: its files, and what it refuses."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from wfnet.benchmarking import floors
from wfnet.benchmarking.timing import commit, device_name
from wfnet.benchmarking.winners import refuse_winners

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_ops.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_ops", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_ops"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_ops"]


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_small_run_writes_its_results(bench, no_device, tmp_path):
    arguments = ["--layers", "resnet18.conv1", "resnet18.layer2.0.conv1", "vit_tiny"]
    arguments += ["--providers", "loop", "eager", "unmasked", "triton", "--scale", "16"]
    arguments += ["--batch", "2", "--repeats", "1", "--classes", "5", "--output", str(tmp_path)]
    arguments += ["--tflops", "1", "--gbs", "10"]
    assert bench.main(arguments) == 0
    with (tmp_path / "bench_ops.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4
    for row in rows:
        if row["provider"] == "triton":
            assert row["status"] == "not run"
            assert row["step_ms"] == ""
        else:
            assert float(row["step_ms"]) > 0
            assert float(row["tflops"]) > 0
        assert float(row["floor_ms"]) > 0
    record = json.loads((tmp_path / "bench_ops.json").read_text())
    assert record["device"] == device_name(torch.device("cpu"))
    assert record["commit"] == commit()
    assert record["settings"]["classes"] == 5
    assert record["rates"] == {"flops_per_second": 1e12, "bytes_per_second": 1e10}
    assert (tmp_path / "bench_ops.png").stat().st_size > 1000


def test_a_provider_that_fails_is_recorded_and_the_others_are_measured(
    bench, no_device, tmp_path, monkeypatch
):
    def broken(problem):
        raise ValueError("no such\nkernel")

    monkeypatch.setattr(bench, "_loop", broken)
    arguments = ["--layers", "resnet18.conv1", "vit_tiny", "--providers", "loop", "eager"]
    arguments += ["--scale", "16", "--batch", "2", "--repeats", "1", "--output", str(tmp_path)]
    assert bench.main(arguments) == 1
    rows = json.loads((tmp_path / "bench_ops.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed: ValueError: no such", "ok"] * 2
    assert all(row["step_ms"] > 0 for row in rows if row["provider"] == "eager")


def test_finished_layers_are_on_disk_when_the_run_ends_early(
    bench, no_device, tmp_path, monkeypatch
):
    make_problem = bench.make_problem

    def second_layer_kills(layer, *arguments):
        if layer.name.startswith("vit"):
            raise KeyboardInterrupt
        return make_problem(layer, *arguments)

    monkeypatch.setattr(bench, "make_problem", second_layer_kills)
    arguments = ["--layers", "resnet18.conv1", "vit_tiny", "--providers", "eager"]
    arguments += ["--scale", "16", "--batch", "2", "--repeats", "1", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments)
    (row,) = json.loads((tmp_path / "bench_ops.json").read_text())["rows"]
    assert row["layer"] == "resnet18.conv1"


def test_winners_come_from_a_committed_checkout_on_a_device(bench, no_device, tmp_path):
    table = tmp_path / "winners.json"
    rows = [
        {"op": "linear", "shape": "s", "provider": p, "status": "ok", "step_ms": ms}
        for p, ms in (("eager", 2.0), ("triton", 1.0), ("unmasked", 0.5))
    ]
    record = {"device": "D", "commit": "c", "torch": "2", "triton": "3", "rows": rows,
              "settings": {"dtype": "bfloat16"}}  # fmt: skip
    with pytest.raises(SystemExit, match="CUDA device"):
        bench.main(["--winners", str(table)])
    assert "committed" in refuse_winners("cuda", "c+changes")
    assert "committed" in refuse_winners("cuda", "unknown")
    assert refuse_winners("cuda", "c") is None
    path = tmp_path / "bench_ops.json"
    path.write_text(json.dumps({**record, "cuda": None}))
    with pytest.raises(SystemExit, match="CUDA device"):
        bench.main(["--winners", str(table), "--record", str(path)])
    path.write_text(json.dumps({**record, "cuda": "13.0"}))
    assert bench.main(["--winners", str(table), "--record", str(path)]) == 0
    (entry,) = json.loads(table.read_text())
    assert entry["winner"] == "triton"
    assert entry["ms"] == {"eager": 2.0, "triton": 1.0}


def test_the_floor_is_of_the_rates_measured_in_the_same_run(
    bench, no_device, tmp_path, monkeypatch
):
    asked = []

    def measured(device, dtype):
        asked.append((device, dtype))
        return floors.Rates(flops=2e9, bandwidth=1e15, element=2)

    monkeypatch.setattr(bench, "measure_rates", measured)
    arguments = ["--layers", "resnet18.layer1", "--providers", "eager", "--scale", "16"]
    arguments += ["--batch", "2", "--repeats", "1", "--dtype", "bfloat16"]
    assert bench.main([*arguments, "--output", str(tmp_path / "measured")]) == 0
    assert asked == [(torch.device("cpu"), torch.bfloat16)]
    record = json.loads((tmp_path / "measured" / "bench_ops.json").read_text())
    assert record["rates"] == {"flops_per_second": 2e9, "bytes_per_second": 1e15}
    (row,) = record["rows"]
    flops = row["tflops"] * row["step_ms"] * 1e9
    assert row["floor_ms"] == pytest.approx(flops / 2e9 * 1e3)

    told = ["--tflops", "1e-3", "--gbs", "1e6", "--output", str(tmp_path / "told")]
    assert bench.main([*arguments, *told]) == 0
    assert len(asked) == 1, "measured although it was told"
    (again,) = json.loads((tmp_path / "told" / "bench_ops.json").read_text())["rows"]
    assert again["floor_ms"] == pytest.approx(2 * row["floor_ms"])


def test_counts(bench):
    layer = bench.Layer("l", 8, 16, 32, 3)
    problem = bench.make_problem(layer, 2, 1, torch.float32, "cpu", 5)
    assert problem.flops() == 2 * (2 * 32 * 8 * 8) * (2 * 16 * 9)
    assert problem.shape_key() == ("conv2d", "n2_8x8_16-32_3x3_s1x1_p1x1_d1x1")
    stem = bench.make_problem(bench.Layer("s", 8, 3, 32, 3), 2, 1, torch.float32, "cpu", 5)
    assert stem.flops() == (2 * 32 * 8 * 8) * (2 * 3 * 9)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tflops", "1"],
        ["--tflops", "0", "--gbs", "1"],
        ["--batch", "0"],
        ["--providers", "magic"],
    ],
)
def test_bad_arguments(bench, arguments):
    with pytest.raises(SystemExit):
        bench.parse(arguments)

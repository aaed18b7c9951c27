"""benchmarks/bench_ops.py: the column of the compiled kernels, and the fused forward pass."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from wfnet.benchmarking.winners import add_winners

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_ops.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_ops_cuda", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_ops_cuda"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_ops_cuda"]


def test_fused_run(bench, monkeypatch, tmp_path):
    """Eager is timed; kernels and cuDNN say that they did not run; linear maps are left out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--fused", "--layers", "resnet18.layer1", "vit_tiny", "--scale", "16"]
    arguments += ["--batch", "2", "--repeats", "1", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    with (tmp_path / "bench_ops.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["provider"], row["status"]) for row in rows] == [
        ("eager", "ok"),
        ("triton", "not run"),
        ("cuda", "not run"),
        ("cudnn", "not run"),
    ]
    assert rows[0]["op"] == "fused conv2d"
    assert float(rows[0]["forward_ms"]) == float(rows[0]["step_ms"]) > 0


def test_fused_forward_computes_what_it_says(bench):
    problem = bench.make_problem(bench.Layer("l", 6, 8, 16, 3), 2, 1, torch.float32, "cpu", 5)
    torch.manual_seed(1)
    out = bench.fused_of("eager", problem)()
    torch.manual_seed(1)
    scale, shift = torch.rand(2, 16)[:, :, None, None], torch.randn(2, 16)[:, :, None, None]
    u = torch.nn.functional.conv2d(problem.x.detach(), problem.weight, padding=1)
    torch.testing.assert_close(out, (scale * u + shift + problem.dout).relu())


def test_the_compiled_kernels_can_win(bench, tmp_path):
    table = tmp_path / "winners.json"
    table.write_text("[]")
    times = {"eager": 2.0, "triton": 1.0, "cuda": 0.9, "compile": 0.1}
    rows = [
        {"op": "linear", "shape": "s", "provider": name, "status": "ok", "step_ms": ms}
        for name, ms in times.items()
    ]
    record = {"device": "D", "commit": "c", "torch": "2", "triton": "3", "rows": rows,
              "settings": {"dtype": "bfloat16"}}  # fmt: skip
    add_winners(table, bench.measurements(record))
    (entry,) = json.loads(table.read_text())
    assert entry["ms"] == {"eager": 2.0, "triton": 1.0, "cuda": 0.9}
    assert entry["winner"] == "cuda"


@pytest.mark.parametrize(
    "arguments", [["--providers", "cudnn"], ["--fused", "--providers", "loop"],
                  ["--fused", "--winners", "w.json"]]
)  # fmt: skip
def test_bad_arguments(bench, arguments):
    with pytest.raises(SystemExit):
        bench.parse(arguments)

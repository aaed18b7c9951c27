"""benchmarks/bench_plan.py at a size that takes seconds."""

import json

import bench_plan
import pytest

SMALL = ["--model", "small/resnet", "--image-size", "8", "-b", "2", "-M", "2", "--repeats", "1"]


def test_writes_what_every_call_takes(tmp_path, capsys):
    path = tmp_path / "plan.json"
    record = bench_plan.main([*SMALL, "--device", "cpu", "--output", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    network = record["networks"]["small/resnet"]
    assert network["samples"] == 3
    assert len(network["calls"]) == 17
    assert set(network["failed"]) == {"triton", "cuda"}
    assert len(bench_plan.failures(record)) == 2
    best = sum(row["ms"]["eager"] for row in network["calls"])
    assert network["sums"]["fastest at each"] == pytest.approx(best)
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if "lost ms" in line)
    lost = [float(line.split()[0]) for line in lines[start + 1 :]]
    assert len(lost) == 17
    assert lost == sorted(lost, reverse=True)


def test_a_backend_that_lacks_a_call_has_no_sum():
    first = {"ms": {"eager": 2.0, "cuda": 1.0}, "floor_ms": 0.5}
    found = bench_plan.sums([first, {"ms": {"eager": 3.0}, "floor_ms": 1.0}])
    assert found == {"eager": 5.0, "fastest at each": 4.0, "floor": 1.5}

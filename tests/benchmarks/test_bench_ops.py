"""benchmarks/bench_ops.py at a size that takes seconds."""

import json

import bench_ops
import torch

TINY = ["--scale", "16", "--batch", "2", "--repeats", "1", "--classes", "5", "--device", "cpu"]


def test_every_provider_has_numbers_or_a_reason(tmp_path):
    output = tmp_path / "ops.json"
    layers = ["resnet18.conv1", "resnet18.layer2.0.conv1", "vit_tiny"]
    arguments = ["--layers", *layers, "--providers", "loop", "eager", "unmasked", "triton"]
    assert bench_ops.main([*TINY, *arguments, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert len(record["rows"]) == 3 * 4
    for row in record["rows"]:
        if row["provider"] == "triton":
            assert row["status"] == "not run"
            assert "step_ms" not in row
        else:
            assert min(row["forward_ms"], row["step_ms"], row["tflops"]) > 0
        assert row["floor_ms"] > 0
    assert record["settings"]["classes"] == 5
    assert {"device", "commit", "torch", "command"} <= record.keys()


def test_a_provider_that_fails_is_recorded_and_the_others_are_measured(tmp_path, monkeypatch):
    def broken(problem):
        raise ValueError("no such\nkernel")

    monkeypatch.setattr(bench_ops, "_unmasked", broken)
    arguments = ["--layers", "resnet18.conv1", "vit_tiny", "--providers", "unmasked", "eager"]
    assert bench_ops.main([*TINY, *arguments, "--output", str(tmp_path / "ops.json")]) == 1
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed: no such", "ok"] * 2


def test_flops_are_counted():
    def problem(channels):
        layer = bench_ops.Layer("l", 8, channels, 32, 3)
        return bench_ops.make_problem(layer, 2, 1, torch.float32, "cpu", 5)

    assert problem(16).flops() == 2 * (2 * 32 * 8 * 8) * (2 * 16 * 9)
    assert problem(3).flops() == (2 * 32 * 8 * 8) * (2 * 3 * 9)  # a stem

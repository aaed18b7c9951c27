"""benchmarks/bench_plan.py: every convolution of a plan by every backend."""

import contextlib
import importlib.util
import json
from pathlib import Path

import cuda_modules
import pytest
import torch

from wfnet import backends
from wfnet.backends import cuda_launch, winners
from wfnet.benchmarking import floors, plans, steps
from wfnet.cli.classifier import create_classifier

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/bench_plan.py"
SMALL = ["--model", "small/resnet", "--image-size", "8", "-b", "2", "-M", "2", "--repeats", "1"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_plan", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(monkeypatch):
    """Backend ``cuda`` on CPU tensors."""
    module = cuda_modules.emulated_kernels()
    monkeypatch.setattr(cuda_launch, "library", lambda: cuda_launch.Library(module, None))


def operations(*candidates, dtype=torch.bfloat16):
    """What :func:`plans.time_plan` finds of a small ResNet, by a clock that counts calls."""
    calls = []

    def clock(call):
        calls.append(call)
        call()
        return float(len(calls))

    settings = steps.StepSettings(image_size=8, batch_size=2, label_expansion=2, dtype=dtype)
    with contextlib.ExitStack() as stack:
        model = create_classifier("small/resnet", 10, in_channels=3, image_size=8, seed=0)
        problem = steps.make_problem(model, settings, stack)
        return plans.time_plan(problem, candidates, clock, 2)


def test_every_convolution_is_measured_once_for_each_shape_and_epilogue(kernels):
    found = operations("cuda", "eager")
    layers = [layer for op in found if op.op == "fused_conv2d" for layer in op.layers]
    assert len(layers) == len(set(layers)) == 9
    learning = [layer for op in found if op.op == "conv2d_dgrad" for layer in op.layers]
    assert sorted(learning) == sorted(set(layers) - {"conv1"})
    keys = [(op.op, op.shape, op.epilogue) for op in found]
    assert len(keys) == len(set(keys))
    for op in found:
        assert set(op.medians()) == {"cuda", "eager"}
        assert set(op.alone_medians()) == {"eager"}
        assert not op.failed
        assert all(len(ms) == 2 for ms in op.milliseconds.values())


def test_the_work_is_counted(kernels):
    """Of a 3x3 convolution of 2 images and 3 samples with a branch: design's counts."""
    found = operations("cuda", "eager")
    (op,) = [op for op in found if op.layers == ["layer1.0.conv1"] and op.op == "fused_conv2d"]
    samples, pixels, channels = 3, 16, 24
    assert op.flops == 2 * samples * pixels * channels * channels * 9
    tensors = 3 * samples * pixels * channels + channels * channels * 9  # x, out, v; the filter
    assert op.bytes == 2 * tensors
    rates = floors.Rates(flops=1e9, bandwidth=1e6, element=2)
    assert op.floor_ms(rates) == pytest.approx(1e3 * max(op.flops / 1e9, op.bytes / 1e6))


def test_one_backend_alone_runs_as_in_its_own_plan():
    found = operations("eager", dtype=torch.float32)
    assert all(set(op.medians()) == {"eager"} for op in found)


def test_a_backend_that_computes_something_else_has_no_time(kernels, monkeypatch):
    eager = backends.get("eager")
    plain = eager.fused_conv2d

    def wrong(x, *rest):
        out, *kept = plain(x, *rest)
        return (out * 1.1, *kept) if x.shape[1] == 48 else (out, *kept)

    monkeypatch.setattr(type(eager), "fused_conv2d", lambda self, *call: wrong(*call))
    for op in operations("cuda", "eager"):
        if op.op == "fused_conv2d" and "_48-" in op.shape:
            assert "differs from cuda by 1.0e-01" in op.failed["eager"]
            assert set(op.medians()) == {"cuda"}
        else:
            assert not op.failed


def test_a_backend_that_raises_costs_no_other(kernels, monkeypatch):
    def fails(self, *call):
        raise RuntimeError("out of resources\nsecond line")

    monkeypatch.setattr(type(backends.get("eager")), "conv2d_dgrad", fails)
    for op in operations("cuda", "eager"):
        if op.op == "conv2d_dgrad":
            assert op.failed == {"eager": "RuntimeError: out of resources"}
            assert set(op.medians()) == {"cuda"}


def test_writes_what_it_found(bench, kernels, tmp_path, capsys):
    path = tmp_path / "plan.json"
    arguments = [*SMALL, "--dtype", "bfloat16", "--providers", "cuda", "eager"]
    record = bench.main([*arguments, "--output", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    network = record["networks"]["small/resnet"]
    assert network["samples"] == 3
    assert path.with_suffix(".png").stat().st_size > 10_000
    found = network["operations"]
    best = sum(len(op["layers"]) * min(op["ms"].values()) for op in found)
    assert network["sums"]["fastest at each"] == pytest.approx(best)
    assert best <= min(network["sums"]["cuda"], network["sums"]["eager"])
    assert record["rates"]["bytes_per_second"] > 0
    lines = capsys.readouterr().out.splitlines()
    lost = [float(line.split()[0]) for line in lines[lines.index("") + 8 :]]
    assert len(lost) == len(found)
    assert lost == sorted(lost, reverse=True)


def test_sums_of_a_backend_that_lacks_an_operation(bench):
    found = bench.sums([
        {"layers": ["a", "b"], "ms": {"eager": 2.0, "cuda": 1.0}, "alone_ms": {"eager": 1.5},
         "floor_ms": 0.5},
        {"layers": ["c"], "ms": {"eager": 3.0}, "alone_ms": {"eager": 2.0}, "floor_ms": 1.0},
    ])  # fmt: skip
    assert found == {"cuda": None, "eager": 7.0, "eager alone": 5.0, "fastest at each": 5.0,
                     "floor": 2.0}  # fmt: skip


def record_of(*found):
    operations = [
        {
            "op": op,
            "shape": shape,
            "layers": ["l"] * times,
            "ms": ms,
            "failed": {},
            "alone_ms": {"eager": ms["eager"] / 2},
        }
        for op, shape, times, ms in found
    ]
    return {
        "settings": {"dtype": "bfloat16"}, "device": "D", "cuda": "13.0", "commit": "c",
        "torch": "2", "triton": "3", "networks": {"n": {"operations": operations}},
    }  # fmt: skip


def test_winners_of_a_shape_are_those_of_all_its_epilogues(bench, tmp_path):
    record = record_of(
        ("fused_conv2d", "n1_a", 3, {"eager": 1.0, "cuda": 2.0}),
        ("fused_conv2d", "n1_a", 1, {"eager": 9.0, "cuda": 2.0, "triton": 1.0}),
        ("conv2d_dgrad", "n1_a", 1, {"eager": 1.0, "triton": 2.0}),
        ("fused_conv2d", None, 1, {"eager": 1.0}),  # with groups
    )
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    table = tmp_path / "table.json"
    assert bench.main(["--record", str(path), "--winners", str(table)]) is None
    dgrad, forward = winners.read(table)
    assert (forward["op"], forward["winner"]) == ("fused_conv2d", "cuda")
    assert forward["ms"] == {"eager": 3.0, "cuda": 2.0}
    assert forward["alone_ms"] == {"eager": 1.5}
    assert (dgrad["op"], dgrad["winner"]) == ("conv2d_dgrad", "eager")


def test_winners_need_a_device_and_a_commit(bench, tmp_path):
    table = tmp_path / "table.json"
    with pytest.raises(SystemExit, match="CUDA device"):
        bench.main([*SMALL, "--device", "cpu", "--winners", str(table)])
    for change, message in (
        ({"cuda": None}, "CUDA device"),
        ({"commit": "c+changes"}, "committed"),
    ):
        path = tmp_path / "record.json"
        path.write_text(json.dumps({**record_of(), **change}))
        with pytest.raises(SystemExit, match=message):
            bench.main(["--record", str(path), "--winners", str(table)])
    assert not table.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--record", "r.json"], "--record comes with --winners"),
        (["-b", "3"], "even number"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_work(bench, arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_a_layer_that_no_candidate_takes_is_named(bench, kernels):
    pytest.importorskip("timm")
    arguments = ["--model", "regnety_002", "--image-size", "32", "-b", "2", "-M", "1",
                 "--repeats", "1", "--dtype", "bfloat16", "--providers", "cuda"]  # fmt: skip
    with pytest.raises(SystemExit, match=r"no candidate takes '.+' \(cuda: .*groups.*add eager"):
        bench.main(arguments)


def test_a_backend_asked_for_runs_or_is_refused(bench):
    with pytest.raises(SystemExit, match="--providers cuda: "):
        bench.main([*SMALL, "--dtype", "float32", "--providers", "cuda"])

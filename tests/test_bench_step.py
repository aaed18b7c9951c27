"""benchmarks/bench_step.py at a size that takes seconds: its columns, its files, its refusals."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_step
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from wfnet.benchmarking import steps, timing

PEERS = ["loop", "grouped", "vmap", "eager", "unmasked"]
OURS = ["wfnet/eager/unfused", "wfnet/eager/fused", "wfnet/eager/captured"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    arguments = [
        "--models", "small/resnet", "small/vit", "--image-size", "32", "-b", "4", "-M", "2",
        "--repeats", "2", "--device", "cpu", "--output", str(folder / "step.json"),
        "--columns", *PEERS, *OURS,
    ]  # fmt: skip
    returned = bench_step.main(arguments)
    written = json.loads((folder / "step.json").read_text())
    assert written["networks"].keys() == returned["networks"].keys()
    assert (folder / "step.png").stat().st_size > 10_000
    return written


def test_every_column_has_numbers_or_a_reason(record):
    """The losses of all masked columns were compared before anything was timed."""
    for result in record["networks"].values():
        rows = result["columns"]
        assert list(rows) == [*PEERS, *OURS]
        assert result["expanded_samples"] == 6
        assert "CUDA" in rows["wfnet/eager/captured"]["impossible"]
        for name in (*PEERS, "wfnet/eager/unfused"):
            row = rows[name]
            assert row["least_ms"] <= row["median_ms"] <= row["largest_ms"]
            assert row["samples_per_second"] == pytest.approx(6e3 / row["median_ms"])
            assert row["peak_mebibytes"] > 0


def test_convolutions_run_fused_and_have_a_floor(record):
    result = record["networks"]["small/resnet"]
    row = result["columns"]["wfnet/eager/fused"]
    floor = result["floor_samples_per_second"]["fused_with_v"]
    assert 0 < row["share_of_floor"] == pytest.approx(row["samples_per_second"] / floor)
    assert row["peak_mebibytes"] < result["columns"]["eager"]["peak_mebibytes"]


def test_masked_copies_past_the_limit_say_what_they_need():
    arguments = ["--models", "small/resnet", "--image-size", "16", "-b", "4", "-M", "1"]
    arguments += ["--repeats", "1", "--device", "cpu", "--copy-limit", "1e-6"]
    record = bench_step.main([*arguments, "--columns", "loop", "eager"])
    rows = record["networks"]["small/resnet"]["columns"]
    assert "one masked weight copy per sample needs" in rows["loop"]["impossible"]
    assert "median_ms" in rows["eager"]


def test_columns_that_differ_are_wrong_and_not_timed():
    columns = {
        "eager": steps.Column(first_loss=1.0),
        "loop": steps.Column(first_loss=1.1),
        "grouped": steps.Column(first_loss=float("nan")),
        "vmap": steps.Column(first_loss=1.0005),
        "unmasked": steps.Column(first_loss=9.0),
    }
    steps.check_losses(columns, torch.float32)
    assert [name for name, column in columns.items() if column.wrong] == ["loop", "grouped"]
    assert "its loss is 1.1000, expected 1.0000" in columns["loop"].impossible


def test_a_column_that_fails_costs_no_other(monkeypatch, tmp_path):
    class CompilerError(Exception):
        """Not of the kinds that a refusal is made of, as a kernel compiler's errors."""

    make = steps.make_step

    def failing(problem, name):
        step = make(problem, name)
        calls = iter(range(100))

        def run():
            if next(calls) == 7:  # while it is timed
                raise CompilerError("out of registers")
            return step()

        return run if name == "wfnet/eager/unfused" else step

    monkeypatch.setattr(steps, "make_step", failing)
    arguments = ["--models", "small/resnet", "--image-size", "16", "-b", "4", "-M", "1"]
    arguments += ["--repeats", "4", "--device", "cpu", "--output", str(tmp_path / "step.json")]
    columns = ["wfnet/eager/unfused", "eager"]
    bench_step.main([*arguments, "--columns", *columns])
    rows = json.loads((tmp_path / "step.json").read_text())["networks"]["small/resnet"]["columns"]
    assert rows["wfnet/eager/unfused"]["impossible"] == "CompilerError: out of registers"
    assert rows["eager"]["median_ms"] > 0
    assert rows["eager"]["prepare_seconds"] > 0


@pytest.mark.parametrize("arguments", [["-b", "3"], ["--repeats", "0"], ["--columns", "magic"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        bench_step.parse(arguments)
    assert "error:" in capsys.readouterr().err


# -- kernels of a step, from events as the profiler reports them -----------------------------------

GEMM = (
    "void (anonymous namespace)::cluster_entry<wfnet::sm90::Gemm<(int)128, true> >"
    "(wfnet::sm90::Gemm<(int)128, true>::Params)"
)


def event(name, start, end, device_type=DeviceType.CUDA, **more):
    return FunctionEvent(0, name, 1, start, end, device_type=device_type, **more)


def step_events():
    """As CUPTI has them: two streams side by side, a gap of 20 us, a copy, a named range."""
    return [
        event("aten::convolution", 0, 900, DeviceType.CPU),
        event("Optimizer.step", 0, 200, is_user_annotation=True),
        event(GEMM, 0, 60),
        event("column_sums_kernel", 30, 70),  # on another stream: 30 of its 40 us under the GEMM
        event(GEMM, 90, 150),
        event("Memcpy DtoD (Device -> Device)", 150, 160),
        event("Memset (Device)", 160, 164),
        event("_ZN2at6native3fooIfEEvi", 164, 165),
    ]


def test_kernels_are_summed_by_name_and_the_gaps_are_left_over():
    work = timing.work_of(step_events())
    assert work.launches == 4
    assert work.busy_microseconds == 165 - 20
    assert [(k.name, k.launches, k.microseconds) for k in work.kernels] == [
        ("cluster_entry<Gemm<(int)128, true> >", 2, 120),
        ("column_sums_kernel", 1, 40),
        ("Memcpy DtoD (Device -> Device)", 1, 10),
        ("Memset (Device)", 1, 4),
        ("foo<float>", 1, 1),
    ]
    assert work.kernels[0].share == pytest.approx(120 / 175)
    first, others = work.table(1)
    assert (first, others.name, others.launches) == (work.kernels[0], "4 others", 4)
    assert others.microseconds == 55
    assert first.share + others.share == pytest.approx(1)
    assert work.table(5) == list(work.kernels)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("conv_fprop_kernel", "conv_fprop_kernel"),
        ("void at::native::(anonymous namespace)::spin<4>(long)", "spin<4>"),
        ("sm90_xmma_fprop__5x_cudnn", "sm90_xmma_fprop__5x_cudnn"),
        ("void f<at::g(int)::{lambda(float)#1}>(int, h(*)(int))", "f<g(int)::{lambda(float)#1}>"),
        ("k" * 300, "k" * 117 + "..."),
    ],
)
def test_short_names_of_kernels(name, short):
    assert timing.short_kernel_name(name) == short


class Profile:
    """Stands where torch.profiler.profile does on a device."""

    found = staticmethod(step_events)

    def __init__(self, activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def events(self):
        return self.found()


@pytest.fixture
def profiled(monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return Profile


def test_where_the_profiler_sees_no_kernel_there_is_no_table(profiled, monkeypatch):
    device, calls = torch.device("cuda"), []
    assert timing.device_work(lambda: calls.append(1), device).launches == 4
    assert calls == [1]
    assert timing.device_work(lambda: None, torch.device("cpu")) is None
    monkeypatch.setattr(profiled, "found", lambda self: step_events()[:1])
    assert timing.device_work(lambda: None, device) is None

    def refused(self):
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr(profiled, "found", refused)
    assert timing.device_work(lambda: None, device) is None


def test_the_kernels_of_every_column_are_written_and_the_longest_printed(capsys):
    many = [event(f"kernel{n:02}_", 200 * n, 200 * n + 50 + n) for n in range(60)]
    columns = {
        "eager": steps.Column(milliseconds=[6.0, 7.0, 8.0], peak_mebibytes=1.0,
                              work=timing.work_of(many)),
        "compile": steps.Column(milliseconds=[5.0], peak_mebibytes=1.0),
    }  # fmt: skip
    result = json.loads(json.dumps(steps.summary(columns, 6, {})))
    row = result["columns"]["eager"]
    assert row["kernel_launches"] == 60
    assert row["device_time"]["busy_ms"] == pytest.approx(4.77)
    assert row["device_time"]["idle_ms"] == pytest.approx(7 - 4.77)
    kernels = row["device_time"]["kernels"]
    assert len(kernels) == 41
    assert (kernels[0]["name"], kernels[-1]["name"]) == ("kernel59_", "20 others")
    assert sum(kernel["microseconds"] for kernel in kernels) == pytest.approx(4770)
    assert sum(kernel["launches"] for kernel in kernels) == 60
    assert result["columns"]["compile"]["kernel_launches"] is None
    assert "device_time" not in result["columns"]["compile"]

    steps.print_table("net", result)
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("eager: 60 kernels, busy 4.770 ms, idle 2.230 ms") for line in shown)
    listed = [line.split()[-1] for line in shown if " us " in line]
    assert listed == [f"kernel{n}_" for n in range(59, 49, -1)]

"""benchmarks/profile_layers.py and ncu_counters.py: times of layers in a step, and their counters.

No device and no Nsight Compute: a program that stands for `ncu` runs what it is given and answers
in `ncu`'s CSV. The pretended device (tests/pretended_cuda.py) shows which launches it would see.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import ncu_counters
import pretended_cuda
import profile_layers
from ncu_counters import COUNTERS, Kernel, Refused

import wfnet
from wfnet import backends, fusion
from wfnet.backends import cuda_launch
from wfnet.benchmarking import floors
from wfnet.benchmarking import layer_calls as layers
from wfnet.benchmarking.floors import Rates
from wfnet.benchmarking.steps import StepSettings, make_problem

COLUMN = "wfnet/eager/fused"


# -- the report of `ncu` ---------------------------------------------------------------------------

NOISE = "==PROF== Connected to process 12 (/usr/bin/python3.12)\n=> printed by the program\n"
FIRST = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream",
         "Block Size", "Grid Size", "Device", "CC"]  # fmt: skip


def line(*cells):
    return ",".join(f'"{cell}"' for cell in cells) + "\n"


def launch(number, kernel):
    return [number, 12, "python3.12", "127.0.0.1", kernel, 1, 7, "(384, 1, 1)", "(66, 2, 1)", 0,
            "9.0"]  # fmt: skip


def wide(kernels, names=tuple(COUNTERS), units=None):
    """A line of names, one of units, one per launch: `--page raw` of today."""
    text = line(*FIRST, *(COUNTERS[name] for name in names))
    text += line(*[""] * len(FIRST), *((units or {}).get(name, "") for name in names))
    for number, (kernel, values) in enumerate(kernels):
        text += line(*launch(number, kernel), *(values.get(name, "n/a") for name in names))
    return NOISE + text + "==PROF== Disconnected from process 12\n"


def test_a_line_per_launch():
    text = wide(
        [("void wfnet::gemm<4, 2>(Params)", {"seconds": "1,234,000", "registers_per_thread": 168}),
         ("column_sums_kernel", {"seconds": "2,000.5", "memory_percent": "(!) nan"})],
        names=("seconds", "registers_per_thread", "memory_percent"), units={"seconds": "ns"},
    )  # fmt: skip
    gemm, sums = ncu_counters.parse(text)
    assert gemm.name == "void wfnet::gemm<4, 2>(Params)"
    assert gemm.counters == pytest.approx(
        {"seconds": 1.234e-3, "registers_per_thread": 168, "threads_per_block": 384, "blocks": 132}
    )
    assert sums.counters["seconds"] == pytest.approx(2.0005e-6)
    assert {"memory_percent", "registers_per_thread", "l2_percent"} <= set(sums.missing)
    assert "seconds" not in sums.missing


def test_a_line_per_launch_and_counter():
    """The other page, and what older versions call units."""
    rows = [
        (0, "gemm", COUNTERS["seconds"], "usecond", "12.5"),
        (0, "gemm", COUNTERS["memory_read_bytes"], "Mbyte", "2,000.25"),
        (0, "gemm", "sm__unasked.sum", "inst", "5"),
        (1, "sums", COUNTERS["seconds"], "msecond", "1"),
    ]
    text = line(*FIRST, "Section Name", "Metric Name", "Metric Unit", "Metric Value")
    for number, kernel, *rest in rows:
        text += line(*launch(number, kernel), "Command line profiler metrics", *rest)
    gemm, sums = ncu_counters.parse(NOISE + text)
    assert gemm.counters["seconds"] == pytest.approx(12.5e-6)
    assert gemm.counters["memory_read_bytes"] == pytest.approx(2.00025e9)
    assert (sums.name, sums.counters["seconds"]) == ("sums", pytest.approx(1e-3))


@pytest.mark.parametrize("text", ["", NOISE, NOISE + line(*FIRST), "==ERROR== no\n"])
def test_no_launch(text):
    assert ncu_counters.parse(text) == []


def test_counters_that_it_does_not_know():
    registers, memory = COUNTERS["registers_per_thread"], COUNTERS["memory_read_bytes"]
    said = (
        rf"==ERROR== Failed to find metric regex:^{registers}\.(sum|avg|min)$" + "\n"
        f"==ERROR== Failed to find metric {memory}.per_second\n"
        f"==PROF== {COUNTERS['seconds']}\n"
    )
    assert ncu_counters.unknown_counters(said, list(COUNTERS.values())) == {registers}
    said += f"==ERROR== Failed to find metric {memory}\n"
    assert ncu_counters.unknown_counters(said, list(COUNTERS.values())) == {registers, memory}


# -- running it ------------------------------------------------------------------------------------

# What all programs that stand for it begin with: options, and the program to look at.
FAKE = f"""#!{sys.executable}
import json, os, subprocess, sys, time
words = sys.argv[1:]
option = lambda name: words[words.index(name) + 1]
assert option("--clock-control") == "none", "clocks would be changed"
assert option("--profile-from-start") == "off"
assert option("--page") == "raw" and "--csv" in words
program = words[words.index("--log-file") + 2 :]
report = open(option("--log-file"), "w")
asked = option("--metrics").split(",")
"""
# Answers with three launches for each call that the program says it made: a mark, and two kernels.
ANSWERS = """
subprocess.run(program, check=True)
calls = json.load(open(program[program.index("--calls") + 1]))
names = ["ID", "Process ID", "Kernel Name", "Block Size", "Grid Size", *asked]
rows = [names, ["", "", "", "", "", *["ns" if "time" in n else "%" for n in asked]]]
for number, call in enumerate(calls[SKIPPED:]):
    values = {"gpu__time_duration.sum": 1000.0 + number,
              "dram__throughput.avg.pct_of_peak_sustained_elapsed": 81.5}
    for kernel, factor in (("at::cuda::spin_kernel(long)", 0), ("small_kernel", 1),
                           (f"void net::{call['direction']}_of<{call['layer']}>(int)", 5)):
        cells = [values[n] * factor if n in values else "n/a" for n in asked]
        rows.append([len(rows), 1, kernel, "(128, 1, 1)", "(66, 1, 1)", *cells])
for row in rows:
    print(",".join(f'"{cell}"' for cell in row), file=report)
"""


@pytest.fixture
def fake_ncu(tmp_path):
    def make(body):
        path = tmp_path / "fake" / "ncu"
        path.parent.mkdir(exist_ok=True)
        path.write_text(FAKE + body)
        path.chmod(0o755)
        return str(path)

    return make


def test_it_is_asked_again_without_what_it_does_not_know(fake_ncu, tmp_path):
    ncu = fake_ncu("""
open(os.path.join(os.path.dirname(report.name), "asked.txt"), "a").write(f"{len(asked)}\\n")
wrong = [name for name in asked if "gmma" in name]
for name in wrong:
    print("==ERROR== Failed to find metric", name, file=report)
if wrong:
    sys.exit(1)
print('"ID","Kernel Name","gpu__time_duration.sum"\\n"","","ns"\\n"0","k","50"', file=report)
""")
    (kernel,) = ncu_counters.read_counters(ncu, ["true"], tmp_path)
    assert kernel == Kernel("k", {"seconds": pytest.approx(5e-8)})
    assert "stalled_gmma" in kernel.missing
    first, second = map(int, (tmp_path / "asked.txt").read_text().split())
    assert (first, first - second) == (len(COUNTERS), 2)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "print('==PROF== Connected', file=report)\n"
            "print('==ERROR== ERR_NVGPUCTRPERM - The user may not access  the counters.',\n"
            "      file=report)\nsys.exit(1)",
            "ncu: ERR_NVGPUCTRPERM - The user may not access the counters.",
        ),
        ("print('==WARNING== No kernels were profiled.')", "ncu: No kernels were profiled."),
        ("sys.exit(3)", "ncu ended with status 3 and no counters"),
        (
            "for name in asked: print('==ERROR== Failed to find metric', name, file=report)",
            f"ncu: Failed to find metric {COUNTERS['seconds']}",
        ),
    ],
)
def test_refusals_are_one_sentence(fake_ncu, tmp_path, body, reason):
    with pytest.raises(Refused) as refused:
        ncu_counters.read_counters(fake_ncu(body), ["true"], tmp_path)
    assert str(refused.value) == reason


def test_one_that_hangs_is_ended_with_what_it_looks_at(fake_ncu, tmp_path):
    ncu = fake_ncu("subprocess.run(program)")
    program = f"import os, time; print(os.getpid(), file=open({str(tmp_path / 'pid')!r}, 'w'), " \
              "flush=True); time.sleep(60)"  # fmt: skip
    start = time.monotonic()
    with pytest.raises(Refused, match="ncu: ended after 3 s"):
        ncu_counters.read_counters(ncu, [sys.executable, "-c", program], tmp_path, seconds=3)
    assert time.monotonic() - start < 20
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):  # whoever adopted it has to notice
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.05)
                continue
        return
    pytest.fail("the profiled program still runs")


def test_where_it_is_found(fake_ncu, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ncu_counters, "PLACES", ())
    with pytest.raises(Refused, match="not installed"):
        ncu_counters.find_ncu()
    with pytest.raises(Refused, match="is no program"):
        ncu_counters.find_ncu(str(tmp_path / "ncu"))
    for version in ("2024.9.1", "2025.10.0", "2025.3.1"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch()
    monkeypatch.setattr(ncu_counters, "PLACES", (f"{tmp_path}/none/ncu", f"{tmp_path}/20*/ncu"))
    assert ncu_counters.find_ncu() == str(tmp_path / "2025.10.0" / "ncu")
    ncu = fake_ncu("")
    monkeypatch.setenv("PATH", os.path.dirname(ncu))
    assert ncu_counters.find_ncu() == ncu


# -- what bounds a kernel --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counters", "bound", "why"),
    [
        ({"memory_percent": 85.0, "tensor_percent": 62.0}, "memory", "memory 85%"),
        ({"memory_percent": 62.0, "tensor_16_bit_percent": 70.0}, "tensor cores", "memory 62%"),
        ({"memory_percent": 59.0, "l2_percent": 60.0}, "L2", "L2 60%"),
        ({"shared_read_percent": 40.0, "shared_write_percent": 66.0}, "shared memory", "66%"),
        ({"memory_percent": 59.0, "stalled_barrier": 1.5, "stalled_gmma": 3.25}, "latency",
         "wait most for gmma (3.2 per issued instruction)"),
        ({"memory_percent": 10.0}, "latency", "memory 10%"),
        ({"stalled_wait": 5.0, "seconds": 1.0}, "unknown", "no utilisation"),
    ],
)  # fmt: skip
def test_the_rule(counters, bound, why):
    found, because = ncu_counters.bound_by(counters)
    assert found == bound
    assert why in because


@pytest.mark.parametrize(
    ("arguments", "bound"),
    [((1.0, 0.7, 0.5), "tensor cores"), ((1.0, 0.5, 0.7), "memory"), ((1.0, 0.5, 0.59), "unknown")],
)
def test_the_rule_without_counters(arguments, bound):
    found, because = ncu_counters.bound_by_floor(*arguments)
    assert found == bound
    assert f"{100 * max(arguments[1:]):.0f}% of its time" in because


# -- layers of a step ------------------------------------------------------------------------------


class Net(nn.Module):
    """A stem at the source images, two layers that are alike, and one with a residual."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.one = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.two = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.last = nn.Conv2d(8, 8, 1, bias=False)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.two(self.one(x).relu()).relu()
        return self.fc((self.last(y) + x).relu().mean((2, 3)))


SETTINGS = StepSettings(image_size=8, batch_size=4, label_expansion=3, share_images=False)


@pytest.fixture
def run():
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        yield layers.LayerRun(make_problem(Net(), SETTINGS, stack), "eager")


def test_groups_and_their_work(run):
    """Counted by hand: 8 samples of 4 images, 64 pixels, 8 channels, 4 bytes."""
    groups = {group.layers[0]: group for group in run.measure(repeats=2)}
    assert [group.layers for group in groups.values() if len(group.layers) > 1] == []
    assert set(groups) == {"stem", "one", "two", "last"}  # what lies below `one` has two readers
    stem, one, two = groups["stem"], groups["one"], groups["two"]
    pixels = 64 * 8 * 4
    table, one_row = 8 * 8 * 4, 8 * 4  # scales differ by sample; without a bias shifts are all 0
    assert stem.backward is None
    assert stem.forward.work.flops == 2 * 4 * 64 * 8 * 27
    # Images and their samples' places; weight; tables; u of every image, out of every sample.
    read = 4 * 64 * 3 * 4 + 8 * 8 + 8 * 27 * 4 + table + one_row
    assert stem.forward.work.size == read + 4 * pixels + 8 * pixels
    assert one.forward.work.flops == two.backward.work.flops == 2 * 8 * 64 * 8 * 72
    assert one.forward.work.size == 8 * 72 * 4 + table + one_row + 3 * 8 * pixels
    # The gradient of `two`, u of `one` below it, whose gradient it writes with one column sum.
    assert two.backward.work.size == 8 * 72 * 4 + 2 * table + one_row + 3 * 8 * pixels
    for group in groups.values():
        for measured in (group.forward, group.backward):
            assert measured is None or len(measured.milliseconds) == 2
            assert measured is None or min(measured.milliseconds) > 0
    sums = sum(g.milliseconds for g in groups.values())
    assert sums == pytest.approx(sum(
        m.median for g in groups.values() for m in (g.forward, g.backward) if m is not None
    ))  # fmt: skip


def test_layers_that_are_alike_are_one_row():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.block = nn.ModuleList(nn.Conv2d(8, 8, 1, bias=False) for _ in range(4))
            self.fc = nn.Linear(8, 10)

        def forward(self, x):
            x = self.stem(x).relu()
            for conv in self.block:
                x = conv(x).relu()
            return self.fc(x.mean((2, 3)))

    with contextlib.ExitStack() as stack:
        problem = make_problem(Plain(), SETTINGS, stack)
        groups = layers.LayerRun(problem, "eager").measure(repeats=3)
    names = sorted(group.layers for group in groups)
    # The first of the four finishes the stem, which has read source images.
    assert names == [["block.0"], ["block.1", "block.2", "block.3"], ["stem"]]
    alike = next(group for group in groups if len(group.layers) == 3)
    assert len(alike.forward.milliseconds) == 9
    assert alike.milliseconds == 3 * (alike.forward.median + alike.backward.median)
    assert groups == sorted(groups, key=lambda group: -group.milliseconds)


def test_a_backend_is_itself_again_afterwards(run):
    before = {name: getattr(run.backend, name) for name in layers.METHODS}

    def breaks(*_):
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        run.watch(breaks)
    assert {name: getattr(run.backend, name) for name in layers.METHODS} == before
    assert not vars(run.backend).keys() & layers.METHODS.keys()
    run.step()


def test_a_call_inside_of_a_call_is_part_of_it():
    class Nested(type(backends.get("eager"))):
        def linear(self, x, weight):
            return self.linear_backward(x, None, weight)

        def linear_backward(self, dout, saved, weight):
            return dout

    seen = []

    def around(method, arguments, compute):
        seen.append((method, list(arguments)))
        return compute()

    backend = Nested()
    with layers.watched(backend, around):
        assert backend.linear(3, weight=4) == 3
        assert backend.linear_backward(5, None, 6) == 5
    assert seen == [("linear", ["x", "weight"]), ("linear_backward", ["dout", "saved", "weight"])]


@pytest.mark.parametrize("name", ["small/resnet", "small/vit"])
def test_a_run_without_ncu(name, tmp_path, capsys):
    path = tmp_path / "layers.json"
    arguments = ["--model", name, "-b", "2", "-M", "1", "--repeats", "1", "--device", "cpu",
                 "--columns", COLUMN, "--slowest", "1", "--output", str(path)]  # fmt: skip
    profile_layers.main(arguments)
    record = json.loads(path.read_text())
    assert record["rates"]["flops_per_second"] > 0
    column = record["columns"][COLUMN]
    assert column["counters"] == "counters are those of a CUDA device"
    rows = column["layers"]
    masked = sum(len(row["layers"]) for row in rows)
    assert masked == (9 if name == "small/resnet" else 4)
    (first, *_) = column["profiled"]
    assert (first["layer"], first["direction"]) == (rows[0]["layers"][0], "forward")
    call = rows[0]["forward"]
    rates = Rates(record["rates"]["flops_per_second"], record["rates"]["bytes_per_second"], 4)
    assert call["floor_ms"] == pytest.approx(rates.seconds(call["flops"], call["bytes"]) * 1e3)
    assert "without counters" in first["why"]
    assert rows[0]["layers"][0] in capsys.readouterr().out


def profiled(tmp_path, ncu, *more):
    path = tmp_path / "layers.json"
    profile_layers.main(
        ["--model", "small/resnet", "-b", "2", "-M", "1", "--repeats", "1", "--device", "cpu",
         "--columns", COLUMN, "--slowest", "2", "--ncu", ncu, "--output", str(path), *more]
    )  # fmt: skip
    return json.loads(path.read_text())["columns"][COLUMN]


def test_counters_reach_the_calls_that_they_are_of(fake_ncu, tmp_path):
    column = profiled(tmp_path, fake_ncu("SKIPPED = 0\n" + ANSWERS))
    assert column["counters"] == "read"
    wanted = [
        (row["layers"][0], direction)
        for row in column["layers"][:2]
        for direction in ("forward", "backward")
        if row[direction] is not None
    ]
    assert [(row["layer"], row["direction"]) for row in column["profiled"]] == wanted
    for row in column["profiled"]:
        small, large = row["kernels"]
        assert small["name"] == "small_kernel"
        assert large["name"] == f"{row['direction']}_of<{row['layer']}>"
        assert 5e-6 <= large["counters"]["seconds"] < 5.1e-6
        assert "tensor_percent" in large["missing"]
        assert row["bound_by"] == "memory"
        assert row["why"].startswith(large["name"])


def test_counters_that_are_nobodys_are_not_used(fake_ncu, tmp_path):
    column = profiled(tmp_path, fake_ncu("SKIPPED = 1\n" + ANSWERS))
    assert "calls where" in column["counters"]
    names = {kernel["name"] for kernel in column["of_unknown_calls"]}
    assert {"spin_kernel", "small_kernel"} < names  # and nothing that was read is lost
    assert all(row["kernels"] == [] for row in column["profiled"])
    assert column["layers"][0]["forward"]["median_ms"] > 0


def test_a_refusal_costs_no_times(fake_ncu, tmp_path):
    ncu = fake_ncu("print('==ERROR== ERR_NVGPUCTRPERM - no permission', file=report)")
    column = profiled(tmp_path, ncu)
    assert column["counters"] == "ncu: ERR_NVGPUCTRPERM - no permission"
    assert len(column["layers"]) == 9
    assert all("without counters" in row["why"] for row in column["profiled"])


def test_a_column_that_fails_is_recorded_and_the_next_one_runs(tmp_path, monkeypatch):
    real = profile_layers.LayerRun

    def fails(problem, backend):
        if backend == "triton":
            raise RuntimeError("an illegal instruction\nwas encountered")
        return real(problem, backend)

    monkeypatch.setattr(profile_layers, "LayerRun", fails)
    path = tmp_path / "layers.json"
    profile_layers.main(
        ["--model", "small/resnet", "-b", "2", "-M", "1", "--repeats", "1", "--device", "cpu",
         "--columns", "wfnet/triton/fused", COLUMN, "--output", str(path)]
    )  # fmt: skip
    columns = json.loads(path.read_text())["columns"]
    assert columns["wfnet/triton/fused"] == {"failed": "RuntimeError: an illegal instruction"}
    assert columns[COLUMN]["layers"]


@pytest.mark.parametrize(
    "arguments",
    [["--columns", "eager"], ["-b", "3"], ["--slowest", "0"], ["--layers", "conv1"],
     ["--layers", "conv1", "--calls", "c.json", "--columns", COLUMN, "wfnet/cuda/fused"]],
)  # fmt: skip
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        profile_layers.parse(arguments)
    assert "error:" in capsys.readouterr().err


# -- what the profiler would see on a device -------------------------------------------------------


_MISSING = cuda_launch.library().missing


@pytest.mark.parametrize(
    "backend",
    ["triton", pytest.param("cuda", marks=pytest.mark.skipif(_MISSING is not None,
                                                             reason=f"wfnet._C: {_MISSING}"))],
)  # fmt: skip
def test_the_profiler_sees_the_chosen_calls_alone(backend, monkeypatch):
    """Each behind its mark, with all launches of it and none of others."""
    seen, watching = [], []
    with pretended_cuda.pretended_cuda() as device:
        monkeypatch.setattr(torch.cuda.profiler, "start", lambda: watching.append(True))
        monkeypatch.setattr(torch.cuda.profiler, "stop", watching.clear)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: watching and seen.append("mark"))

        class Launches(list):
            def append(self, item):
                super().append(item)
                if watching:
                    seen.append(item[0])

        settings = StepSettings(image_size=8, batch_size=4, label_expansion=3, share_images=False,
                                device="cuda", dtype=torch.bfloat16)  # fmt: skip
        with contextlib.ExitStack() as stack:
            torch.manual_seed(0)
            run = layers.LayerRun(make_problem(Net(), settings, stack), backend)
            run.step()
            device.launches = Launches()
            calls = profile_layers.profiled_step(run, ["two"], cuda=True)
            everything = len(device.launches)
            groups = run.measure(repeats=1)
    assert calls == [layers.Call("two", "forward"), layers.Call("two", "backward")]
    assert seen.count("mark") == 2
    assert seen[0] == "mark"
    forward, backward = " ".join(seen[1:]).split("mark")
    assert "fprop" in forward
    assert "dgrad" not in forward
    assert "dgrad" in backward
    assert "fprop" not in backward
    assert len(seen) - 2 < everything
    assert {name for group in groups for name in group.layers} == {"stem", "one", "two", "last"}
    assert all(group.milliseconds > 0 for group in groups)


@pytest.fixture
def at_real_size(monkeypatch):
    """A network at the benchmark's sizes, without a byte of memory."""
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(fusion, "check_plan", lambda *_: None)  # which compares numbers

    @contextlib.contextmanager
    def made(name):
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        model = model.to_empty(device="cpu")
        with pretended_cuda.pretended_cuda(values=False), contextlib.ExitStack() as stack:
            settings = StepSettings(
                image_size=224, batch_size=256, label_expansion=3, classes=1000,
                share_images=False, device="cuda", dtype=torch.bfloat16,
            )  # fmt: skip
            yield make_problem(model, settings, stack)

    return made


# Before a pooling the layer below is finished in a pass of its own, which multiplies nothing.
@pytest.mark.parametrize(
    ("name", "least"), [("resnet18", 0.98), ("resnet50", 0.98), ("vgg16", 0.92)]
)
def test_the_work_of_all_layers_is_that_of_the_floor(name, least, at_real_size):
    """Counted from the arguments of a step's calls, and from the network's shapes alone."""
    timm = pytest.importorskip("timm")
    with at_real_size(name) as problem:
        groups = layers.LayerRun(problem, "triton").measure(repeats=1)
    with torch.device("meta"):
        net = wfnet.WFNet(timm.create_model(name), 1000)
    operations = floors.operations_of(net, 224, "fused_with_v")
    calls = [
        (len(group.layers), measured.work)
        for group in groups
        for measured in (group.forward, group.backward)
        if measured is not None
    ]
    products = [op for op in operations if op.flops]
    stem = products[0]
    assert stem.source_elements
    flops = sum(op.flops * 512 for op in products) - stem.flops * 256  # once per image
    assert sum(count * work.flops for count, work in calls) == flops
    size = 2 * sum(
        op.weights + op.elements * 512 + op.source_elements * 256 for op in products
    )  # fmt: skip
    assert least * size < sum(count * work.size for count, work in calls) < 1.02 * size


def test_a_transformer_is_measured_as_it_is_and_not_compiled(at_real_size, monkeypatch):
    def compiled(function, **_):
        return lambda *_: pytest.fail("compiling takes a minute")

    with at_real_size("vit_tiny_patch16_224") as problem, monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compiled)
        groups = layers.LayerRun(problem, "triton").measure(repeats=1)
    first, others = sorted(groups, key=lambda group: len(group.layers))
    assert (len(first.layers), len(others.layers)) == (1, 11)
    # Tokens of the images in, of the samples out; no gradient leaves the first layer.
    assert first.forward.work.flops == 2 * 256 * 197 * 192 * 576
    assert first.backward.work.flops == 0
    assert others.forward.work.flops == others.backward.work.flops == 2 * 512 * 197 * 192 * 576

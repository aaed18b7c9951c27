"""The table of measured winners, what `auto` makes of it, and plans whose backends are mixed."""

import copy
import itertools
import json
import logging

import cuda_modules
import pytest
import torch

import wfnet
from wfnet import backends
from wfnet.backends import ConvGeometry, cuda_launch, measured, winners
from wfnet.models import SmallResNet

ENTRY = {
    "op": "conv2d",
    "shape": "n64_s",
    "dtype": "bfloat16",
    "device": "D",
    "winner": "triton",
    "ms": {"eager": 2.0, "triton": 1.0},
    "torch": "2",
    "triton": "3",
    "commit": "c",
}


def forget_tables():
    winners._by_shape.cache_clear()
    winners._devices.cache_clear()


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """Entries to the table that WFNET_WINNERS names."""
    path = tmp_path / "own.json"
    monkeypatch.setenv("WFNET_WINNERS", str(path))

    def write(*entries):
        path.write_text(json.dumps([{**ENTRY, **entry} for entry in entries]))
        forget_tables()
        return path

    yield write
    forget_tables()


# -- the table ------------------------------------------------------------------------------------


def test_the_committed_table_is_well_formed():
    for entry in winners.read():
        assert entry["winner"] == min(entry["ms"], key=entry["ms"].__getitem__)


def test_entries_without_provenance_are_refused(tmp_path):
    path = tmp_path / "winners.json"
    path.write_text(json.dumps([{k: v for k, v in ENTRY.items() if k not in ("commit", "ms")}]))
    with pytest.raises(ValueError, match="lacks ms, commit"):
        winners.read(path)
    for text, message in (
        ("[", "not valid JSON"),
        ("{}", "must be a list"),
        (json.dumps([{**ENTRY, "ms": {"triton": "fast"}}]), "must be milliseconds"),
        (json.dumps([{**ENTRY, "winner": "cuda"}]), "winner 'cuda' has no time"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            winners.read(path)


def test_a_table_of_ones_own_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("WFNET_WINNERS", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json cannot be read.*WFNET_WINNERS"):
        winners.winner("conv2d", "n1_s", "bfloat16", "D")


def test_the_nearest_batch_answers(own_table):
    cuda = {"winner": "cuda", "ms": {"eager": 2.0, "cuda": 1.0}}
    own_table({"shape": "n64_s"}, {"shape": "n1024_s", **cuda})
    for batch, name in ((1, "triton"), (64, "triton"), (250, "triton"), (260, "cuda"),
                        (9000, "cuda")):  # fmt: skip
        assert winners.winner("conv2d", f"n{batch}_s", "bfloat16", "D") == name
    assert winners.winner("conv2d", "n64_other", "bfloat16", "D") is None
    assert winners.winner("conv2d", "n64_s", "float16", "D") is None
    assert winners.winner("conv2d", "n64_s", "bfloat16", "E") is None


def test_ones_own_table_comes_before_the_committed_one(own_table, tmp_path, monkeypatch):
    committed = tmp_path / "committed.json"
    cuda = {**ENTRY, "winner": "cuda", "ms": {"eager": 2.0, "cuda": 1.0}}
    committed.write_text(json.dumps([cuda, {**cuda, "shape": "n64_other"}]))
    monkeypatch.setattr(winners, "TABLE", committed)
    own_table({})
    assert winners.winner("conv2d", "n64_s", "bfloat16", "D") == "triton"
    assert winners.winner("conv2d", "n64_other", "bfloat16", "D") == "cuda"


def test_what_is_known_of_a_device(own_table):
    own_table({"device": "cpu"})
    assert winners.know(torch.device("cpu"))
    own_table({"device": "NVIDIA H200"})
    assert not winners.know(torch.device("cpu"))


# -- what a plan makes of it ----------------------------------------------------------------------

WEIGHT = torch.zeros(16, 8, 3, 3, dtype=torch.float16)
GEOMETRY = ConvGeometry((1, 1), (1, 1))
KEY = "4x4_8-16_3x3_s1x1_p1x1_d1x1"
GROUPED = ConvGeometry((1, 1), (1, 1), groups=2)


def convolution(size=(4, 4), learns=True, geometry=GEOMETRY):
    return measured.Convolution(WEIGHT, geometry, size, learns)


def entry(op, ms, shape=f"n64_{KEY}"):
    winner = min(ms, key=ms.__getitem__)
    return {"op": op, "shape": shape, "dtype": "float16", "device": "cpu", "ms": ms,
            "winner": winner}  # fmt: skip


@pytest.fixture
def all_run(monkeypatch):
    """Backends of kernels refuse nothing; returns who refuses a call, to be filled."""
    refusing = set()
    for name in ("cuda", "triton"):
        monkeypatch.setattr(
            backends.get(name), "refuse_conv2d",
            lambda *call, name=name: f"{name} refuses" if name in refusing else None,
        )  # fmt: skip
    return refusing


def chosen(*convolutions):
    found = measured.PlanWinners(convolutions, 512, torch.float16, torch.device("cpu"))
    return found, found.convolutions()


def test_eager_where_nothing_was_measured(own_table):
    own_table(entry("conv2d", {"eager": 2.0, "cuda": 1.0}))  # a layer by itself says nothing
    found, backend = chosen(convolution())
    assert backend is backends.get("eager")
    assert "0 of 2 operations" in found.describe()


def test_eager_where_it_is_faster_in_sum(own_table, all_run):
    own_table(entry("fused_conv2d", {"eager": 1.0, "cuda": 0.9}),
              entry("conv2d_dgrad", {"eager": 1.0, "cuda": 1.2}))  # fmt: skip
    assert chosen(convolution())[1].shares_branch  # the mixture is faster than eager
    own_table(entry("fused_conv2d", {"eager": 1.0, "cuda": 1.1}),
              entry("conv2d_dgrad", {"eager": 1.0, "cuda": 1.2}))  # fmt: skip
    assert chosen(convolution())[1] is backends.get("eager")
    # In a plan of its own eager takes no passes for the others' sake.
    own_table({**entry("fused_conv2d", {"eager": 1.0, "cuda": 0.9}), "alone_ms": {"eager": 0.7}},
              entry("conv2d_dgrad", {"eager": 1.0, "cuda": 1.2}))  # fmt: skip
    assert chosen(convolution())[1] is backends.get("eager")


def test_kernels_where_half_was_measured(own_table, all_run):
    own_table(entry("fused_conv2d", {"eager": 2.0, "cuda": 1.0}))
    assert chosen(convolution())[1].shares_branch
    assert chosen(convolution(), convolution(size=None))[1] is backends.get("eager")


def test_unmeasured_operations_go_to_the_kernels_that_won_most(own_table, all_run):
    small, large = f"n64_{KEY}", f"n64_8x8{KEY[3:]}"
    own_table(entry("fused_conv2d", {"eager": 9.0, "triton": 2.0, "cuda": 1.0}, small),
              entry("fused_conv2d", {"eager": 9.0, "triton": 4.0, "cuda": 5.0}, large))  # fmt: skip
    found, backend = chosen(convolution(), convolution((8, 8)))
    assert backend.kernels is backends.get("triton")  # 4 ms are more than 1

    def name(op, size, geometry=GEOMETRY):
        return found.choose(op, (512, 8, *size), WEIGHT, geometry, 512)

    assert name("fused_conv2d", (4, 4)) == "cuda"
    assert name("fused_conv2d", (8, 8)) == "triton"
    assert name("conv2d_dgrad", (8, 8)) == "triton"
    text = found.describe()
    assert "2 of 4 operations were measured in float16 on cpu" in text
    assert "cuda is the fastest at 1, triton is the fastest at 1" in text
    all_run.add("triton")
    assert name("conv2d_dgrad", (4, 4)) == "cuda"
    all_run.add("cuda")
    assert name("fused_conv2d", (8, 8), GROUPED) == "eager"


def test_backends_that_are_not_there_win_nothing(own_table, all_run):
    """A table of a machine with nvcc serves one without: the second fastest runs, or eager."""
    own_table(entry("fused_conv2d", {"eager": 9.0, "triton": 2.0, "cuda": 1.0}))
    all_run.add("cuda")
    found, backend = chosen(convolution())
    assert backend.kernels is backends.get("triton")
    assert found.choose("fused_conv2d", (512, 8, 4, 4), WEIGHT, GEOMETRY, 512) == "triton"
    all_run.add("triton")
    assert chosen(convolution())[1] is backends.get("eager")


def test_kernels_that_cannot_finish_a_layer_take_no_part(own_table, all_run):
    """Whose output has 12 channels: kernels of 8 would read past its tables."""
    own_table(entry("fused_conv2d", {"eager": 9.0, "triton": 2.0, "cuda": 1.0}))
    odd = measured.Convolution(WEIGHT[:12], GEOMETRY, None, False)
    found, backend = chosen(convolution(), convolution(learns=False), odd)
    assert backend.kernels is backends.get("triton")
    assert found.choose("fused_conv2d", (512, 8, 4, 4), WEIGHT, GEOMETRY, 512) == "triton"


# -- a network whose convolutions are run by several ----------------------------------------------


@pytest.fixture
def kernels(monkeypatch):
    """Backend ``cuda`` on CPU tensors."""
    module = cuda_modules.emulated_kernels()
    monkeypatch.setattr(cuda_launch, "library", lambda: cuda_launch.Library(module, None))
    return module


class Spy:
    """Counts what each backend is asked for."""

    def __init__(self, monkeypatch, *names):
        self.calls = []
        for name in names:
            backend = backends.get(name)
            for method in ("fused_conv2d", "conv2d_dgrad"):
                original = getattr(backend, method)

                def call(*args, _name=name, _method=method, _original=original):
                    self.calls.append((_method, _name))
                    return _original(*args)

                monkeypatch.setattr(backend, method, call)


def network():
    torch.manual_seed(0)
    model = SmallResNet(5, 3, width=8).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
    net = wfnet.WFNet(model, 5)
    for parameter in net.filter_parameters():
        torch.nn.init.normal_(parameter, 1.0, 2.0)
    return net.to(memory_format=torch.channels_last)


SOURCE = torch.tensor([0, 1, 1, 0])
ROWS = torch.tensor([0, 3, -1, 4])


def run(net, images):
    logits = net(images, ROWS, SOURCE)
    logits.float().square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in net.filter_parameters()])
    return logits.detach(), gradient


def every_operation(net, images, fastest):
    """Entries that let ``fastest(number)`` win the operations of the plan, in turn."""
    plan = wfnet.fusion.make_plan(net.model, images)
    found = []
    for step in plan.convolutions:
        shape = (4, *step.input.meta["shape"][1:])
        key = winners.conv_key(shape, step.layer.weight, step.geometry, 4)
        for op in ("fused_conv2d", "conv2d_dgrad"):
            name = fastest(len(found))
            ms = {other: 1.0 if other == name else 2.0 for other in ("eager", "cuda")}
            found.append({**entry(op, ms, key), "dtype": "bfloat16"})
    return found


@pytest.mark.parametrize("turn", [0, 1], ids=["cuda first", "eager first"])
def test_a_mixed_plan_computes_the_network(kernels, own_table, monkeypatch, caplog, turn):
    """Convolutions by kernels and by eager in turn, forward and backward, against fp64."""
    caplog.set_level(logging.INFO, "wfnet")
    net = network()
    images = torch.randn(2, 3, 8, 8)
    exact = copy.deepcopy(net).double()
    truth = run(exact, images.double())
    plain = copy.deepcopy(net)
    plain.fuse = True
    own_table()
    with torch.autocast("cpu", torch.bfloat16):
        by_eager = run(plain, images)

    own_table(*every_operation(net, images, lambda n: ("cuda", "eager")[(n // 3 + turn) % 2]))
    net.fuse = True
    spy = Spy(monkeypatch, "cuda", "eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert net.fused_network(images) is not None
        spy.calls.clear()
        mixed = run(net, images)
    ways = itertools.product(("fused_conv2d", "conv2d_dgrad"), ("cuda", "eager"))
    assert set(spy.calls) == set(ways)
    assert "auto takes auto (cuda first)" in caplog.text
    for found, other, expected in zip(mixed, by_eager, truth, strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        theirs = (other.double() - expected).norm() / expected.norm()
        assert error < 2 * theirs + 1e-3


def test_tables_of_several_backends_are_kept(kernels, own_table, monkeypatch):
    """A step runs the original network over fewer images than samples: nobody makes tables anew."""
    net = network()
    images = torch.randn(2, 3, 8, 8)
    few = every_operation(net, images, lambda n: "eager")
    for one in few:
        one["shape"] = one["shape"].replace("n4_", "n2_")
    own_table(*few, *every_operation(net, images, lambda n: "cuda"))
    net.fuse, made = True, []
    for name in ("cuda", "eager"):
        backend = backends.get(name)
        plain = backend.gate_tables

        def count(layers, name=name, plain=plain):
            made.append(name)
            return plain(layers)

        monkeypatch.setattr(backend, "gate_tables", count)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            run(net, images)
            with torch.no_grad():
                net(images, torch.tensor([-1, -1]))
    assert sorted(made) == ["cuda", "eager"]
    with torch.no_grad():
        net.filter_parameters()[0].data = net.filter_parameters()[0].clone()
    with torch.autocast("cpu", torch.bfloat16):
        run(net, images)
    assert sorted(made) == ["cuda", "cuda", "eager"]  # those whose filters moved


def test_auto_is_eager_bit_by_bit_without_a_measurement(own_table):
    own_table({"device": "another one"})
    net = network()
    images = torch.randn(2, 3, 8, 8)
    net.fuse = True
    found = run(net, images)
    for parameter in net.filter_parameters():
        parameter.grad = None
    for layer in net.masked_layers.values():
        layer.backend = "eager"
    for one, other in zip(found, run(net, images), strict=True):
        assert torch.equal(one, other)


def test_a_table_that_cannot_be_read_is_an_error_before_work(monkeypatch, tmp_path):
    """Not a reason to run unfused."""
    monkeypatch.setenv("WFNET_WINNERS", str(tmp_path / "none.json"))
    net = network()
    net.fuse = True
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        net(torch.randn(2, 3, 8, 8), 0)


def test_fuse_compile_stays_with_the_backend_that_has_a_graph(kernels, own_table):
    net = network()
    images = torch.randn(2, 3, 8, 8)
    own_table(*every_operation(net, images, lambda n: "cuda"))
    net.fuse = "compile"
    assert isinstance(net.fused_network(images), wfnet.fusion.CompiledNetwork)

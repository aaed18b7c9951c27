"""Who is chosen on a CUDA device, on a pretended one: candidates here are PyTorch in disguise."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from captured_steps import CLASSES, Residual, minibatch, network

import wfnet
from wfnet import models
from wfnet.backends import autotune, autotune_cache, mixed
from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow
from wfnet.benchmarking.roofline import Rates
from wfnet.benchmarking.steps import StepSettings, make_problem, measure, print_table
from wfnet.gate_tables import flatten_filters
from wfnet.services.ranks import Ranks
from wfnet.untraining.distributed import SharedStep
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.optimizers import RowAdam

CUDA = torch.device("cuda")


class Fast(mixed.MixedEager):
    """Right, and by the clock of these tests the fastest."""


class Wrong(Fast):
    def conv2d(self, *arguments):
        found = super().conv2d(*arguments)
        found.out[-1, 0, 0] += found.out[-1].abs().max()  # one row of one sample
        return found


class Raises(Fast):
    def conv2d_dgrad(self, *arguments, **more):
        raise RuntimeError("no such kernel image\nlong story")


@pytest.fixture
def tuned(pretended_device, monkeypatch):
    """Makes a network whose calls are given to candidates, who take the times that are given."""

    def make(seconds=True, ms=None, **candidates):
        everybody = {"eager": mixed.MixedEager(), **candidates}
        milliseconds = {"eager": 2.0, "triton": 1.0, "cuda": 1.0} | (ms or {})

        def times(calls, repeats, clock):
            clock(next(iter(calls.values())))  # a call still runs
            return {name: [milliseconds[name]] * repeats for name in calls}, {}

        monkeypatch.setattr(autotune, "default_candidates", lambda: everybody)
        monkeypatch.setattr(autotune, "interleaved", times)
        monkeypatch.setattr(autotune.cuda_launch, "refuse", lambda *_: None)
        return network(Residual, "cuda", backend="auto", tune=seconds)

    return make


def step(net, seed: int = 0, n: int = 4) -> list[torch.Tensor]:
    images, batch = minibatch(seed, n)
    with torch.autocast("cuda", torch.bfloat16):
        out = net(images.cuda(), batch.forget.cuda(), batch.source.cuda())
    found = torch.autograd.grad(out.float().square().mean(), net.filter_parameters())
    return [out.detach().cpu(), *(g.cpu() for g in found)]


def backend_of(net) -> autotune.TunedBackend:
    return net._fusion.network.backend


def test_the_fastest_is_taken_and_computes_the_same(tuned, caplog):
    caplog.set_level(logging.INFO, logger="wfnet")
    found = step(net := tuned(triton=Fast(), cuda=Fast(), ms={"cuda": 0.5}))
    for mine, truth in zip(found, step(tuned()), strict=True):
        assert torch.equal(mine, truth)
    assert len({kind.partition(",")[0] for kind in backend_of(net).taken}) == 7
    for kind, name in backend_of(net).taken.items():  # cuda has no kernel that expands samples
        own = kind.startswith("conv2d") and "relu source" not in kind
        assert name == ("cuda" if own else "triton")
    (line,) = [t for t in backend_of(net).report() if t.startswith("conv2d, x bfloat16 3x32x32")]
    assert "up to 16 samples: triton (eager 2.000 ms, triton 1.000 ms)" in line
    x = torch.empty(8, 64, 8, 8, dtype=torch.bfloat16, device="cuda").to(
        memory_format=torch.channels_last
    )
    said = wfnet.explain(x, net.model.expand.weight.bfloat16(), padding=1)
    assert "eager: chosen (auto)" in said
    assert said.count("fused: conv2d") == 2, "forward and input gradient"


def test_who_is_wrong_or_raises_is_left_out_with_a_line(tuned, caplog):
    net = tuned(triton=Wrong(), cuda=Raises())
    found, expected = step(net), step(tuned())
    for mine, truth in zip(found, expected, strict=True):
        assert torch.equal(mine, truth)
    for kind, name in backend_of(net).taken.items():
        if kind.startswith("conv2d,"):
            assert name == ("eager" if "relu source" in kind else "cuda")
            assert f"backend triton is left out of {kind}: its results differ by" in caplog.text
        if kind.startswith("conv2d_dgrad"):
            assert name == "triton"
            assert f"backend cuda is left out of {kind}: no such kernel image\n" in caplog.text


class RoundsLate(mixed.MixedEager):
    """As kernels do: all is fp32 until it is stored, sums are of what was not rounded."""

    def conv2d(self, x, weight, *more):
        found = super().conv2d(x.float(), weight.float(), *more)
        return found._replace(out=found.out.to(x), branch=found.branch.to(x))

    def conv2d_dgrad(self, grad, weight, shape, geometry, below):
        wide = replace(below, branch=below.branch.float(), skip=below.skip.float())
        found = super().conv2d_dgrad(grad.float(), weight.float(), shape, geometry, wide)
        return type(found)(*(t if t is None else t.to(grad) for t in found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_kernels_are_within_the_bounds(monkeypatch, dtype):
    """They round elsewhere than PyTorch, which sums products that it has rounded."""
    monkeypatch.setattr(autotune, "_takes", lambda *_: True)
    candidates = {"eager": mixed.MixedEager(), "triton": RoundsLate()}
    tuned = autotune.TunedBackend(torch.device("cpu"), candidates=candidates, repeats=1)
    x, skip = (torch.randn(6, 64, 9, 9).to(dtype) for _ in range(2))
    weight, scale = (torch.randn(64, 64, 1, 1) / 8).to(dtype), 3 * torch.rand(6, 64)
    epilogue = Epilogue(scale, torch.randn(6, 64), relu=True, save=True)
    found = tuned.conv2d(x, weight, ConvGeometry(), epilogue)
    sums = {"t1": torch.empty(6, 64), "t0": torch.empty(6, 64)}
    below = LayerBelow(scale, epilogue.shift, found.branch, relu=True, skip=skip, **sums)
    for layer in (below, replace(below, need_scaled_grad=False)):
        tuned.conv2d_dgrad(x, weight, x.shape, ConvGeometry(), layer)
    entries = [entry for sizes in tuned.choices.values() for entry in sizes.values()]
    assert [set(entry["ms"]) for entry in entries] == [{"eager", "triton"}] * 3


def test_one_wrong_pixel_is_seen_forward_alone():
    truth = torch.randn(2, 8, 64, 64).bfloat16()
    (mine := truth.clone())[1, :, 5, 5] = 0
    assert autotune.difference([mine], [truth], 3e-2, forward=False) is None
    assert "an element differs by" in autotune.difference([mine], [truth], 3e-2)


def test_a_device_that_fails_while_it_is_timed_decides_nothing(tuned, monkeypatch):
    net = tuned(triton=Fast())
    monkeypatch.setattr(autotune, "interleaved", lambda calls, *_: ({}, dict.fromkeys(calls, "!")))
    step(net)
    assert backend_of(net).choices == {}


def test_what_is_decided_is_measured_once(tuned, monkeypatch, pretended_device):
    expected = step(net := tuned(triton=Fast()))
    monkeypatch.setattr(autotune.TunedBackend, "_measure", None)
    for again in (net, tuned(triton=Fast())):
        assert torch.equal(step(again)[0], expected[0])
        step(again, n=3)  # of fewer samples
        assert "triton" in backend_of(again).taken.values()
    with pytest.raises(TypeError, match="NoneType"):
        step(net, n=6)


def test_a_budget_that_is_spent(tuned, monkeypatch, caplog):
    clock = iter(range(1000))
    monkeypatch.setattr(autotune.time, "perf_counter", lambda: float(next(clock)))
    net = tuned(seconds=3.0, triton=Fast())
    step(net)
    taken = [*backend_of(net).taken.values()]
    assert taken[:3] == ["triton"] * 3
    assert set(taken[3:]) == {"eager"}
    assert caplog.text.count("has taken its 3 s") == 1
    assert sum("(not measured)" in line for line in backend_of(net).report()) == len(taken) - 3
    step(again := tuned(seconds=3.0, triton=Fast()))  # goes on where it ended
    assert [*backend_of(again).taken.values()][:6] == ["triton"] * 6


def test_damaged_and_foreign_files_are_ignored_and_rewritten(tuned, caplog):
    step(net := tuned(triton=Fast()))
    cache, choices = backend_of(net).cache, backend_of(net).choices
    good = json.loads(cache.path.read_text())
    wrong = {"backend": 3, "ms": {}, "excluded": {}}
    for damage in ("{", "[]", '{"about": 1}', {"choices": {"conv2d": {"8": wrong}}}, {"about": {}}):
        cache.path.write_text(damage if isinstance(damage, str) else json.dumps(good | damage))
        caplog.clear()
        assert cache.read() == {}
        assert f"{cache.path} is not used" in caplog.text
    cache.write(choices)
    assert json.loads(cache.path.read_text()) == good
    assert cache.read() == choices
    kind = next(iter(choices))
    entry = next(iter(choices[kind].values()))
    autotune_cache.TuningCache(CUDA).write({kind: {512: entry}, "other": {512: entry}})
    cache.write(choices)  # what another process added stays
    assert set(cache.read()) == {*choices, "other"}
    assert set(cache.read()[kind]) == {*choices[kind], 512}


def test_files_that_came_with_the_machine(tuned, monkeypatch, tmp_path, caplog):
    step(net := tuned(triton=Fast()))
    shipped = backend_of(net).cache.path.rename(tmp_path / backend_of(net).cache.path.name)
    monkeypatch.setenv("WFNET_TUNING", str(tmp_path / "nothing"))
    autotune_cache.TuningCache(CUDA).read()
    assert f"has no file {shipped.name}" in caplog.text
    monkeypatch.setenv("WFNET_TUNING", str(tmp_path))
    monkeypatch.setattr(autotune.TunedBackend, "_measure", None)
    step(tuned(triton=Fast()))


def test_a_folder_that_cannot_be_written_costs_no_run(tuned, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    step(net := tuned(triton=Fast()))
    assert "triton" in backend_of(net).taken.values()
    assert caplog.text.count("cannot be written") == 1


def test_the_first_rank_decides_for_all(tuned, monkeypatch):
    step(first := tuned(triton=Fast()))
    choices = backend_of(first).choices
    backend_of(first).cache.path.unlink()
    monkeypatch.setattr(autotune.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(autotune.dist, "get_rank", lambda: 1)
    step(second := tuned(triton=Fast()))
    assert set(backend_of(second).taken.values()) == {"eager"}
    assert backend_of(second).choices == {}
    backend_of(second).share(SimpleNamespace(first_does=lambda action: choices))
    step(second)
    assert backend_of(second).taken == backend_of(first).taken


def test_ranks_share_decisions_after_their_first_step(tuned, monkeypatch):
    shared = []
    monkeypatch.setattr(autotune.TunedBackend, "share", lambda self, ranks: shared.append(ranks))
    net, ranks = tuned(triton=Fast()), Ranks(shared=False)
    with flatten_filters(net.filter_parameters()):
        optimizer = RowAdam(net.filter_parameters())
        step = SharedStep(ranks, net, BalancedObjective(distil=False), optimizer, torch.bfloat16)
        for seed in range(2):
            images, batch = minibatch(seed)
            step([(images, batch)], 0.1, batch.forget.unique())
    assert shared == [ranks]


def test_nothing_is_decided_by_zeros_or_while_a_graph_is_captured(tuned, monkeypatch):
    """Zeros are measured a few times, not at every step."""
    images, batch = minibatch(0)
    net = tuned(triton=Fast())

    def zero_gradients():
        out = net(images.cuda(), batch.forget.cuda(), batch.source.cuda())
        (0 * out).sum().backward()
        return set(backend_of(net).choices)

    with torch.autocast("cuda", torch.bfloat16):
        kinds = zero_gradients()
        assert kinds
        assert not any("backward" in kind or "dgrad" in kind for kind in kinds)
        many, rows = images.cuda().repeat(8, 1, 1, 1), torch.zeros(32).long().cuda()
        with torch.cuda.graph(torch.cuda.CUDAGraph()), torch.no_grad():
            net(many, rows)
        for _ in range(autotune._MOST_FUTILE - 1):
            zero_gradients()
        monkeypatch.setattr(autotune.TunedBackend, "_measure", None)
        assert zero_gradients() == kinds


@pytest.mark.parametrize(("tune", "backend"), [(False, "auto"), (0, "auto"), (True, "eager")])
def test_nobody_is_replaced_who_was_asked_for(tuned, tune, backend):
    net = tuned(seconds=tune, triton=Fast())
    for layer in net.masked_layers.values():
        layer.backend = backend
    step(net)
    assert backend_of(net).name == "eager"


def test_a_benchmark_says_who_was_taken_and_why(tuned, capsys):
    tuned(triton=Fast(), cuda=Raises())
    settings = StepSettings(16, 10, 4, 2, device="cuda", dtype=torch.bfloat16, repeats=1)
    problem = make_problem(models.create("resnet", 10, 3, width=8), settings)
    result = measure(problem, ["wfnet/auto/captured"], Rates(1e12, 1e11, 2))
    print_table("small/resnet", result)
    lines = [t for t in capsys.readouterr().out.splitlines() if "captured: conv2d_dgrad" in t]
    assert lines
    for line in lines:
        assert "samples: triton (eager 2.000 ms, triton 1.000 ms, cuda left out: no such" in line


def test_a_wrong_setting_is_refused():
    for tune in (-1, "20", float("nan"), float("inf")):
        with pytest.raises(ValueError, match="none of True, False and a number of seconds"):
            wfnet.WFNet(Residual(), CLASSES, tune=tune)
    net = wfnet.WFNet(Residual().eval(), CLASSES, fuse=True)
    assert net.fused_network(torch.zeros(2, 3, 32, 32)).backend.name == "eager", "on a CPU"

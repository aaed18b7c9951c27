"""Durable gates in a plan: rows at run time, groups in untraining, against the unfused network."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import wfnet
from wfnet import fusion, models
from wfnet.backends.autotune import TunedBackend
from wfnet.backends.mixed import MixedEager
from wfnet.data import TensorImages
from wfnet.fusion import durable_run
from wfnet.gate_tables import flatten_filters
from wfnet.untraining.durable import DurableObjective, durable_step, expand_groups
from wfnet.untraining.kept_features import first_products
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep

timm = pytest.importorskip("timm")

CLASSES = 5
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
SOURCE = torch.tensor([0, 1, 2, 3, 4, 5, 5, 1])
LABELS = torch.tensor([[0, -1], [1, 2], [-1, -1], [3, 3], [4, -1], [0, 1], [2, -1], [4, 3]])
ROWS = torch.tensor([3, 0, 3, 1, 0, 3, 1, 1])


class Mixed(nn.Module):
    """Durable norms that fold, with activations of their own, and one that does not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=True)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding="same", stride=1)
        self.act = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU, inplace=True)
        self.plain = nn.Conv2d(8, 8, 1)
        self.last = nn.BatchNorm2d(8)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.pool(self.norm(self.stem(x)).relu())
        x = self.act(self.conv(x)) + x
        x = self.last(self.plain(x) * 2)  # a norm behind something else
        return self.fc(x.mean((2, 3)))


MODELS = {
    "resnet": lambda: models.create("resnet", CLASSES, width=8, in_channels=3),
    "without norms": lambda: models.create(
        "vgg", CLASSES, width=8, in_channels=3, batch_norm=False
    ),
    "mixed": Mixed,
}


@pytest.fixture(params=MODELS)
def pair(request, randomised) -> tuple[wfnet.WFNet, wfnet.WFNet]:
    """An unfused and a fused network with the same random gates and statistics of rows."""
    torch.manual_seed(0)
    net = wfnet.WFNet(randomised(MODELS[request.param]()), CLASSES, gate="durable")
    with torch.no_grad():
        for layer in net.masked_layers.values():
            if hasattr(layer, "start_pairs"):
                layer.start_pairs()
        for name, table in {**net.named_filters(), **net.named_statistics()}.items():
            table.add_(torch.randn_like(table) + (0 if "row_" in name else 1))
            if "_var" in name:
                table.abs_().add_(0.1)
    fused = copy.deepcopy(net)
    fused.fuse = True
    return net, fused


def noise_of(net: wfnet.WFNet, seed: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: 0.2 + 0.75 * torch.rand((3, layer.alpha_hard.shape[1]), generator=draw).double()
        for name, layer in net.masked_layers.items()
    }


def gradients(net: wfnet.WFNet, loss: torch.Tensor) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, net.filter_parameters(), allow_unused=True)
    pairs = zip(found, net.filter_parameters(), strict=True)
    return [torch.zeros_like(p) if g is None else g for g, p in pairs]


def check_gradients(pair, losses) -> None:
    found = [gradients(net, loss) for net, loss in zip(pair, losses, strict=True)]
    for (name, _), mine, other in zip(pair[0].named_filters().items(), *found, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-8, atol=1e-12, msg=name)
    assert any(gradient.abs().max() > 1e-3 for gradient in found[0])


def test_rows_at_run_time(pair, caplog):
    net, fused = pair
    weights = torch.randn(len(LABELS), CLASSES).double()
    expected, found = (network(IMAGES, LABELS, SOURCE) for network in pair)
    assert isinstance(fused.fused_network(IMAGES), fusion.DurableNetwork)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    check_gradients(pair, [(logits * weights).sum() for logits in (expected, found)])
    with torch.inference_mode():
        torch.testing.assert_close(fused(IMAGES, 3), net.bake(3)(IMAGES), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fused(IMAGES, -1), net(IMAGES), rtol=1e-10, atol=1e-11)
    fused.fuse = "compile"
    fused(IMAGES, 1)
    assert "runs uncompiled: moments of groups have no compiled graph" in caplog.text


@pytest.mark.parametrize(
    ("soft", "chosen", "corrected"),
    [(True, False, False), (False, False, True), (True, True, False)],
)
def test_groups_in_untraining(pair, soft, chosen, corrected, monkeypatch):
    """The plan is made inside of groups too, which are not those of the example.

    ``chosen``: by a backend that gives every call to one of several. ``corrected``: moments are, as
    for images of some of the base's classes.
    """
    runs = []
    if chosen:
        candidates = {name: MixedEager() for name in ("eager", "triton")}
        backend = TunedBackend(torch.device("cpu"), candidates=candidates, repeats=1)
        pair[1].fused_network(IMAGES).backend = backend
    convolve = durable_run.GroupRun._convolve
    monkeypatch.setattr(
        durable_run.GroupRun,
        "_convolve",
        lambda run, step: runs.append(step) or convolve(run, step),
    )
    for name, layer in pair[0].masked_layers.items() if corrected else ():
        width = layer.alpha_hard.shape[1]
        correction = torch.randn(width).double(), 0.5 + torch.rand(width).double()
        for network in pair:
            network.gate_mode.from_base[name] = correction
    weights, losses, logits, moments = torch.randn(len(ROWS), CLASSES).double(), [], [], []
    for network in pair:
        seen = {}
        keep = lambda name, mean, var, seen=seen: seen.__setitem__(name, (mean, var))  # noqa: E731
        with network.gate_mode.grouped(ROWS, noise_of(network), soft, keep):
            logits.append(network(IMAGES, ROWS, SOURCE))
            with torch.no_grad():
                torch.testing.assert_close(network(IMAGES, ROWS, SOURCE), logits[-1])
        losses.append((logits[-1] * weights).sum())
        moments.append(seen)
    assert len(runs) == 2 * len(pair[1].fused_network(IMAGES).convs), "the network runs unfused"
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(moments[1], moments[0], rtol=1e-10, atol=1e-11)
    check_gradients(pair, losses)
    if chosen:
        entries = {kind.split(",")[0]: sizes for kind, sizes in backend.choices.items()}
        for name in ("epilogue", "moments_backward"):
            assert [[*one["ms"]] for one in entries[name].values()] == [["eager", "triton"]]
        decided = [entry for sizes in backend.choices.values() for entry in sizes.values()]
        assert not any(entry["excluded"] for entry in decided)


@pytest.mark.parametrize("number", [0, 1], ids=["soft gates", "hard gates"])
def test_an_untraining_step(pair, number):
    """Of recipe durable, in one matrix; gates of exactly zero pass nothing on."""
    sizes = {"batch_size": 6, "forget_images": 1, "retain_images": 2, "compound": 0.5}
    config = wfnet.UntrainConfig(steps=1, **sizes)
    batch = expand_groups(torch.tensor([0, 1, 2, 3, 4, 1]), config)
    found = []
    for net, kept in ((pair[0], False), (pair[1], False), (pair[1], True)):
        for layer in net.masked_layers.values():
            layer.alpha_hard.data[:, ::2] = -20.0
        parameters = net.filter_parameters()
        with flatten_filters(parameters):
            around = lambda batch, net=net: durable_step(net, batch, 0, number)  # noqa: E731
            step = UntrainingStep(net, DurableObjective(), RowAdam(parameters), around=around)
            images = IMAGES
            if kept:  # what the first convolution makes of images is read, not computed
                data = TensorImages(IMAGES.flip(0), torch.arange(6) % CLASSES, list("abcde"))
                step.products = first_products(net, data, config)
                original = net(IMAGES, forget=None).detach()
                batch = replace(batch, positions=torch.arange(6).flip(0), original=original)
                images = 0 * IMAGES if step.products.found else IMAGES
            step.differentiate([(images, batch)])
            found.append(step.gradient.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-8, atol=1e-12)
    assert not found[1][:, : parameters[0].shape[1] : 2].any()
    assert found[1].any()


def test_bfloat16_error_is_at_most_twice_the_unfused_one(pair):
    """Of the sum over draws: of one draw either may be twice the other."""
    weights = torch.randn(len(ROWS), CLASSES, generator=torch.Generator().manual_seed(1)).double()

    def all_gradients(network: wfnet.WFNet, dtype: torch.dtype) -> torch.Tensor:
        half = dtype is torch.bfloat16
        single = torch.float32 if half else dtype
        network, found = network.to(single), []
        for draw in range(4):
            noise = {name: u.to(single) for name, u in noise_of(network, draw).items()}
            mode = network.gate_mode.grouped(ROWS, noise)
            with torch.autocast("cpu", torch.bfloat16, enabled=half), mode:
                logits = network(IMAGES.to(single), ROWS, SOURCE)
            parts = gradients(network, (logits.double() * weights).sum())
            found.append(torch.cat([gradient.double().flatten() for gradient in parts]))
        return torch.stack(found)

    exact = all_gradients(copy.deepcopy(pair[0]), torch.float64)
    unfused, error = (
        (all_gradients(network, torch.bfloat16) - exact).norm(dim=1).sum() for network in pair
    )
    assert pair[1].fused_network(IMAGES.float()) is not None
    assert error <= 2 * unfused

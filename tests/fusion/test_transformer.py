"""Fused transformers: a prefix per source image, the rest from one table, both checked."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from wfnet import backends, fusion, models

timm = pytest.importorskip("timm")

CLASSES = 5
COMPILE = torch.compile
SOURCE = torch.tensor([0, 1, 1, 2, 0])
LABELS = torch.tensor([[0, -1], [4, 1], [-1, -1], [2, 2], [1, 3]])


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, dtype=torch.float64)


@pytest.fixture
def compile_with(monkeypatch):
    def use(backend: str) -> None:
        make = lambda function, **_: COMPILE(function, backend=backend, fullgraph=True)  # noqa: E731
        monkeypatch.setattr(torch, "compile", make)

    return use


def small_swin() -> nn.Module:
    """Four windows an image, shifted in the second block; what crosses the cut is windows."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        num_classes=CLASSES,
        **{"img_size": 32, "window_size": 4, "depths": (2, 1), "num_heads": (2, 2), "embed_dim": 8},
    )


class Attention(nn.Module):
    """A transformer of one layer, called twice, that does unusual things to its qkv."""

    def __init__(self, in_place: bool = False):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.qkv = nn.Linear(8, 24)
        self.q_norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)
        self.in_place = in_place

    def attend(self, x):
        qkv = self.qkv(x)
        q, k, v = qkv.chunk(3, -1)
        if self.in_place:
            q, k, v = qkv[..., :8], qkv[..., 8:16], qkv[..., 16:]
            q.mul_(0.5)
        q = self.q_norm(q)
        return x + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.attend(self.attend(x)).mean(1))


class OneToken(Attention):
    """A masked layer of ``[B, C]``, whose result is taken apart."""

    def forward(self, x):
        q, k, v = self.qkv(self.embed(x).mean((2, 3))).unflatten(1, (3, 8)).unbind(1)
        return self.head(q * k.sigmoid() + v)


MODELS = {
    "vit": lambda vit: vit(),
    "qk_norm": lambda vit: vit(qk_norm=True, qkv_bias=False),
    "swin": lambda vit: small_swin(),
    "called_twice": lambda vit: Attention(),
    "one_token": lambda vit: OneToken(),
    "in_place": lambda vit: Attention(in_place=True),
    "own": lambda vit: models.create("vit", CLASSES, in_channels=3),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_unfused_network(name, small_vit, pair_of, check_equal):
    net, fused = pair_of(MODELS[name](small_vit))
    for x, labels, source in (
        (images(), LABELS, SOURCE),
        (images(2), torch.tensor([3]), torch.tensor([1])),
        (images(1), torch.tensor([3]), None),
    ):
        check_equal(net, fused, x, labels, source)
    assert isinstance(fused.fused_network(x), fusion.TrunkNetwork)
    if name == "vit":
        y = fused(images(2), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
        assert y.shape == (0, CLASSES)
        fused.zero_grad()
        y.sum().backward()
        assert all(not p.grad.any() for p in fused.filter_parameters())


def test_everything_before_the_first_mask_runs_once_per_image(small_vit, pair_of):
    _, fused = pair_of(small_vit())
    x = images()
    fused(x, LABELS, SOURCE)
    block = fused.model.blocks[0]
    seen = []
    for module in (fused.model.patch_embed.proj, block.norm1, block.norm2):
        forward = module.forward
        module.forward = lambda t, forward=forward: seen.append(len(t)) or forward(t)
    fused(x, LABELS, SOURCE)
    assert seen[-3:] == [3, 3, 5]


class Turned(nn.Module):
    """A skip connection that keeps images in its second dimension until it is added."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(12, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = F.avg_pool2d(x, 16).flatten(1)
        skip = x.t()
        return self.head((self.qkv(x).t() + skip[:8]).t())


def test_a_wrong_cut_is_never_used(caplog, pair_of):
    net, fused = pair_of(Turned())
    x = images()
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(x, LABELS, SOURCE), net(x, LABELS, SOURCE))
    assert "Turned runs unfused" in caplog.text


# -- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["as it is", "compiled", "kernels"])
def test_a_run_writes_the_gradients_that_autograd_finds(
    how, monkeypatch, compile_with, small_vit, pair_of
):
    """Kernels are operators of the compiled graph. No new labels compile anew."""
    compile_with("aot_eager")
    if how == "as it is":  # on the host nothing is compiled unless asked for
        monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("compiled"))
    net, fused = pair_of(small_vit(), how == "as it is" or "compile")
    learned = net.filter_parameters()
    if how == "kernels":
        monkeypatch.setitem(backends._MODULES, "twin", "wfnet.backends.eager")
        monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "twin"))
        for layer in fused.masked_layers.values():
            layer.backend = "twin"
        fused.filter_parameters()[1].requires_grad_(False)
        learned[1].register_hook(torch.zeros_like)
    x, dlogits = images(), torch.randn(5, CLASSES, dtype=torch.float64)
    network = fused.fused_network(x)
    assert network.compiled == (how != "as it is")
    assert network.compiles_tables == (how != "kernels")
    into = torch.full((CLASSES, sum(f.shape[1] for f in network.filters())), torch.nan).double()
    for labels in (LABELS, LABELS.flip(0)):
        net.zero_grad()
        expected = net(x, labels, SOURCE)
        expected.backward(dlogits)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch.no_grad():
            run = network.start(x, labels, SOURCE)
            logits = run.forward()
            assert not logits.requires_grad
            found = run.backward(dlogits, into)
        torch.testing.assert_close(logits, expected.detach(), rtol=1e-10, atol=1e-11)
        for gradient, parameter in zip(found, learned, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before, "compiled anew"
    torch.testing.assert_close(into, torch.cat(found, 1), rtol=0, atol=0)


# -- what is kept ---------------------------------------------------------------------------------


def test_the_compiled_network_does_not_keep_what_it_can_compute_again(
    compile_with, small_vit, pair_of
):
    compile_with("aot_eager_decomp_partition")
    _, fused = pair_of(small_vit(), "compile", targets="qkv")
    run = fused.fused_network(images()).start(images(4), torch.arange(4)[:, None], None)
    kept: dict[int, int] = {}
    with saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.numel()}) or t, lambda t: t
    ):
        run.forward()
    branch = 4 * 5 * 72  # [B, T, 3 C]: as a whole, or query, key and value
    parts = [numel for numel in kept.values() if numel in (branch, branch // 3)]
    assert parts.count(branch) == 2
    assert len(parts) <= 8  # with inputs of norms and projections, which are as large as a part

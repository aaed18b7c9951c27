"""Fused transformers: a prefix per source image, the rest as one graph, both checked."""

import copy
import logging

import pytest
import torch
from torch import nn

import wfnet
from wfnet import fusion, models

timm = pytest.importorskip("timm")

CLASSES = 5
SOURCE = torch.tensor([0, 1, 1, 2, 0])
LABELS = torch.tensor([[0, -1], [4, 1], [-1, -1], [2, 2], [1, 3]])


def small_vit(**options) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=CLASSES, img_size=32, depth=2, embed_dim=24,
        num_heads=3, **options,
    )  # fmt: skip


def pair_of(model: nn.Module, fuse: bool | str = True) -> tuple[wfnet.WFNet, wfnet.WFNet]:
    torch.manual_seed(0)
    net = wfnet.WFNet(model.eval(), CLASSES).double()
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 0.0, 2.0)
    fused = copy.deepcopy(net)
    fused.fuse = fuse
    return net, fused


def images(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, dtype=torch.float64)


MODELS = {
    "vit": small_vit,
    "distilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=CLASSES, img_size=32, depth=1, embed_dim=24,
        num_heads=3,
    ),
    "own": lambda: models.create("vit", CLASSES, in_channels=3),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_unfused_network(name: str):
    net, fused = pair_of(MODELS[name]())
    x = images()
    expected, found = net(x, LABELS, SOURCE), fused(x, LABELS, SOURCE)
    assert isinstance(fused._fusion[1], fusion.TrunkNetwork), "the network runs unfused"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for mine, other in zip(fused.filter_parameters(), net.filter_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(fused(x, 3), net(x, 3), rtol=1e-10, atol=1e-11)


def test_everything_before_the_first_mask_runs_once_per_image():
    _, fused = pair_of(small_vit())
    x = images()
    fused(x, LABELS, SOURCE)
    seen: dict[str, int] = {}
    model = fused.model
    for name, module in (
        ("patch", model.patch_embed.proj),
        ("norm", model.blocks[0].norm1),
        ("second norm", model.blocks[0].norm2),
    ):
        forward = module.forward
        module.forward = lambda t, name=name, forward=forward: (
            seen.__setitem__(name, t.shape[0]) or forward(t)
        )
    fused(x, LABELS, SOURCE)
    assert seen == {"patch": 3, "norm": 3, "second norm": 5}


def test_compiled_as_one_graph_that_new_labels_do_not_compile_anew(monkeypatch):
    compiled = []
    compile_ = torch.compile

    def counting(function, **options):
        def backend(graph, example):
            compiled.append(graph)
            return graph.forward

        assert options == {"fullgraph": True}
        return compile_(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", counting)
    net, fused = pair_of(small_vit(), fuse="compile")
    x = images()
    for labels in (LABELS, LABELS.flip(0), LABELS.roll(1, 0)):
        torch.testing.assert_close(
            fused(x, labels, SOURCE), net(x, labels, SOURCE), rtol=1e-10, atol=1e-11
        )
    assert fused._fusion[1].compiled
    before = len(compiled)
    fused(x, LABELS.roll(2, 0), SOURCE).sum().backward()
    assert len(compiled) == before
    assert all(p.grad is not None for p in fused.filter_parameters())


def test_a_compiler_that_fails_leaves_it_uncompiled(monkeypatch, caplog):
    def failing(function, **options):
        def run(*arguments):
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    net, fused = pair_of(small_vit(), fuse="compile")
    x = images()
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(x, LABELS, SOURCE), net(x, LABELS, SOURCE))
    assert "runs uncompiled" in caplog.text
    assert "no compiler here" in caplog.text
    assert not fused._fusion[1].compiled


def test_on_the_host_nothing_is_compiled_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("compiled"))
    _, fused = pair_of(small_vit())
    fused(images(), 1)


def test_a_wrong_cut_is_never_used(monkeypatch, caplog):
    """Window attention puts windows before samples: expansion along the batch would be wrong."""
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=CLASSES, img_size=32, window_size=4,
        depths=(1, 1), num_heads=(2, 2), embed_dim=8,
    )  # fmt: skip
    net, fused = pair_of(swin)
    x = images()
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(x, LABELS, SOURCE), net(x, LABELS, SOURCE))
    assert "runs unfused" in caplog.text


def test_images_that_need_a_gradient_and_the_original_network():
    net, fused = pair_of(small_vit())
    x = images().requires_grad_()
    (gradient,) = torch.autograd.grad(fused(x, 1).sum(), x)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert torch.equal(fused(x), net.bake(None)(x))

"""Forget labels: checks and binding (wfnet/labels.py)."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

import wfnet
from wfnet.labels import active_selection, checkpoint_context, forgetting, select


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (True, "bool"),
        ([1, 2], r"list.*torch\.tensor"),
        (np.array([1]), "ndarray"),
        (torch.tensor([True]), r"torch\.bool"),
        (torch.tensor([1], dtype=torch.uint8), r"torch\.uint8"),
    ],
)
def test_wrong_types_are_named(wrong, says):
    with pytest.raises(TypeError, match=says):
        select(wrong)
    with pytest.raises(ValueError, match=r"shape \[B\] or \[B, J\]"):
        select(torch.zeros((3, 0), dtype=torch.int64))


def test_nesting_and_exceptions_restore_the_outer_labels():
    with forgetting(1):
        with forgetting(None):
            assert active_selection().rows is None
        assert active_selection().low == 1
        context = forgetting(2)
        with pytest.raises(KeyError), context, forgetting(None), context:
            raise KeyError
        assert active_selection().low == 1
    with pytest.raises(RuntimeError, match=r"forgetting\(labels\).*checkpoint_context"):
        active_selection()


def test_threads_do_not_see_each_other():
    found, meet = {}, threading.Barrier(2)

    def work(label):
        with forgetting(label):
            meet.wait()
            found[label] = active_selection().low
            meet.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (1, 2)))
    assert found == {1: 1, 2: 2}


# -- activation checkpointing ---------------------------------------------------------------------

CLASSES = 10
FORGET = torch.tensor([0, 3, -1, 9])
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def randomize(module):
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2].startswith("alpha_"):
            nn.init.normal_(parameter, 2, 1)
    return module


@pytest.mark.parametrize("with_context", [True, False])
def test_checkpointing_recomputes_under_its_labels_in_any_thread(with_context):
    conv = randomize(wfnet.WFConv2d(3, 4, 3, num_classes=CLASSES))
    options = {"context_fn": checkpoint_context} if with_context else {}
    with forgetting(FORGET):
        y = checkpoint(conv, IMAGES, use_reentrant=False, **options)
        (expected,) = torch.autograd.grad(conv(IMAGES).square().sum(), conv.alpha_weight)
    found = []

    def backward():
        found.append(torch.autograd.grad(y.square().sum(), conv.alpha_weight, retain_graph=True)[0])

    if not with_context:
        with pytest.raises(RuntimeError, match=r"without forget labels.*checkpoint_context"):
            backward()
        return
    with forgetting(7), ThreadPoolExecutor(1) as pool:
        backward()
        pool.submit(backward).result()
        assert active_selection().low == 7
    assert len(found) == 2
    assert all(torch.equal(f, expected) for f in found)


def gradients(net, y):
    return torch.autograd.grad(y.square().sum(), net.filter_parameters())


def test_models_that_checkpoint_themselves():
    timm = pytest.importorskip("timm")
    options = {"num_classes": CLASSES, "img_size": 32, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    plain = randomize(wfnet.WFNet(model, CLASSES))
    saving = wfnet.WFNet(model, CLASSES)
    saving.load_state_dict(plain.state_dict())
    saving.model.set_grad_checkpointing(True)
    calls = []
    block = saving.model.blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 3, 32, 32)
    saving(x, FORGET)  # the first call checks the network
    calls.clear()
    y = saving(x, FORGET)
    saving(x, 5)  # other labels before the backward pass of the first
    assert len(calls) == 2
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(gradients, saving, y).result()
    assert len(calls) == 3  # recomputed
    for a, b in zip(found, gradients(plain, plain(x, FORGET)), strict=True):
        assert torch.equal(a, b)
    defaults = checkpoint.__wrapped__.__kwdefaults__
    assert defaults["context_fn"] is noop_context_fn

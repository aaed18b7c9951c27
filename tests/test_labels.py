"""Forget labels: checks and binding (wfnet/labels.py)."""

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

import wfnet
from wfnet import labels
from wfnet.labels import (
    DeferredLabelCheck,
    active_selection,
    checkpoint_context,
    forgetting,
    select,
)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (True, "bool"),
        (1.0, "float"),
        ([1, 2], r"list.*torch\.tensor"),
        (np.array([1]), "ndarray"),
        ("3", "str"),
        (torch.tensor([True]), r"torch\.bool"),
        (torch.tensor([1.0]), r"torch\.float32"),
        (torch.tensor([1], dtype=torch.uint8), r"torch\.uint8"),
    ],
)
def test_wrong_types_are_named(wrong, says):
    with pytest.raises(TypeError, match=says):
        select(wrong)


@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 0)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match=r"shape \[B\] or \[B, J\]"):
        select(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3), torch.tensor(3).int()])
def test_one_label_for_all(label):
    selection = select(label)
    assert selection.uniform
    assert selection.expand(4, torch.device("cpu"), 5).tolist() == [[3]] * 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype):
    rows = select(torch.tensor([0, -1, 2], dtype=dtype)).rows
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[0], [-1], [2]]


@pytest.mark.parametrize("bad", [5, -2, 99])
@pytest.mark.parametrize("form", ["int", "vector", "matrix"])
def test_range_is_checked_on_the_host(bad, form):
    forget = {"int": bad, "vector": torch.tensor([0, bad]), "matrix": torch.tensor([[0, bad]] * 2)}
    conv = wfnet.WFConv2d(2, 3, 1, num_classes=5)
    with (
        pytest.raises(ValueError, match=rf"label {bad} is out of range.*0 to 4.*-1"),
        forgetting(forget[form]),
    ):
        conv(torch.randn(2, 2, 3, 3))


def test_count_of_labels_is_checked():
    conv = wfnet.WFConv2d(2, 3, 1, num_classes=5)
    with (
        pytest.raises(ValueError, match=r"3 forget labels.*batch of 2"),
        forgetting(torch.arange(3)),
    ):
        conv(torch.randn(2, 2, 3, 3))


def test_a_layer_without_labels_raises():
    with pytest.raises(RuntimeError, match=r"forgetting\(labels\).*checkpoint_context"):
        wfnet.WFConv2d(2, 3, 1, num_classes=5)(torch.randn(2, 2, 3, 3))


def test_nesting_and_exceptions_restore_the_outer_labels():
    with forgetting(1):
        with forgetting(None):
            assert active_selection().rows is None
        assert active_selection().low == 1
        with pytest.raises(KeyError), forgetting(2):
            raise KeyError
        assert active_selection().low == 1
    with pytest.raises(RuntimeError):
        active_selection()


def test_one_context_may_nest_in_itself_and_be_used_again():
    context = forgetting(1)
    with context, forgetting(2), context:
        assert active_selection().low == 1
    with context:
        pass
    with pytest.raises(RuntimeError):
        active_selection()


def test_threads_do_not_see_each_other():
    conv = wfnet.WFConv2d(2, 3, 1, num_classes=4, bias=False)
    nn.init.normal_(conv.alpha_weight)
    x, found, meet = torch.randn(2, 2, 3, 3), {}, threading.Barrier(2)

    def work(label):
        with forgetting(label):
            meet.wait()
            for _ in range(20):
                found[label] = conv(x).detach()
            meet.wait()

    threads = [threading.Thread(target=work, args=(label,)) for label in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for label in (1, 2):
        with forgetting(label):
            assert torch.equal(found[label], conv(x))


def test_the_same_context_object_in_two_threads():
    context, meet, failed = forgetting(3), threading.Barrier(2), []

    def work():
        for _ in range(50):
            with forgetting(1):
                meet.wait()
                with context:
                    if active_selection().low != 3:
                        failed.append("inner")
                if active_selection().low != 1:
                    failed.append("outer")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


class FakeEvent:
    def __init__(self, done):
        self.done = done

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


def pending(low, high, done):
    return FakeEvent(done), torch.tensor([low, high]), 10


def test_deferred_check_raises_once_for_what_has_finished():
    check = DeferredLabelCheck()
    check._pending = [pending(0, 9, True), pending(-1, 12, True), pending(0, 3, True)]
    with pytest.raises(ValueError, match="12 is out of range"):
        check.poll()
    check.poll()
    assert not check._pending


def test_deferred_check_waits_only_when_asked():
    check = DeferredLabelCheck()
    check._pending = [pending(-7, 2, False)]
    check.poll()
    assert len(check._pending) == 1
    with pytest.raises(ValueError, match="-7 is out of range"):
        check.wait()
    assert not check._pending


def test_deferred_check_leaves_events_alone_during_capture(monkeypatch):
    check = DeferredLabelCheck()
    check._pending = [pending(-7, 2, True)]
    monkeypatch.setattr(labels, "_capturing", lambda: True)
    check.poll()
    assert len(check._pending) == 1


def test_deferred_check_copies_without_its_events():
    check = DeferredLabelCheck()
    check._pending = [(threading.Lock(), None, 1)]  # as little copyable as an event
    assert copy.deepcopy(check)._pending == []


def test_labels_on_the_host_need_no_deferred_check():
    check = DeferredLabelCheck()
    check.submit(torch.tensor([[1]]), 10)
    assert check._pending == []


# -- activation checkpointing ---------------------------------------------------------------------

CLASSES = 10
FORGET = torch.tensor([0, 3, -1, 9])
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def randomize(module):
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2].startswith("alpha_"):
            nn.init.normal_(parameter, 2, 1)
    return module


def random_layer():
    return randomize(wfnet.WFConv2d(3, 4, 3, num_classes=CLASSES))


def checkpointed(conv, **options):
    with forgetting(FORGET):
        y = checkpoint(conv, IMAGES, use_reentrant=False, **options)
    return torch.autograd.grad(y.square().sum(), conv.alpha_weight)[0]


def test_checkpointing_with_the_context():
    conv = random_layer()
    found = checkpointed(conv, context_fn=checkpoint_context)
    with forgetting(FORGET):
        expected = torch.autograd.grad(conv(IMAGES).square().sum(), conv.alpha_weight)[0]
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="without forget labels"):
        active_selection()


def test_checkpointing_without_the_context_raises():
    with pytest.raises(RuntimeError, match=r"without forget labels.*checkpoint_context"):
        checkpointed(wfnet.WFConv2d(3, 4, 3, num_classes=CLASSES))


def test_recomputation_under_other_labels_and_in_another_thread():
    conv = random_layer()
    with forgetting(FORGET):
        y = checkpoint(conv, IMAGES, use_reentrant=False, context_fn=checkpoint_context)
        (expected,) = torch.autograd.grad(conv(IMAGES).square().sum(), conv.alpha_weight)
    found = []

    def backward():
        found.append(torch.autograd.grad(y.square().sum(), conv.alpha_weight, retain_graph=True)[0])

    with forgetting(7):
        backward()
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert active_selection().low == 7
    assert len(found) == 2
    assert all(torch.equal(f, expected) for f in found)


def gradients(net, y):
    return torch.autograd.grad(y.square().sum(), net.filter_parameters())


def transformer():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=32, depth=2)


def test_models_that_checkpoint_themselves():
    model = transformer().eval()
    plain = randomize(wfnet.WFNet(model, CLASSES))
    saving = wfnet.WFNet(model, CLASSES)
    saving.load_state_dict(plain.state_dict())
    saving.model.set_grad_checkpointing(True)
    calls = []
    block = saving.model.blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 3, 32, 32)
    y = saving(x, FORGET)
    saving(x, 5)  # other labels before the backward pass of the first
    assert len(calls) == 2
    found = []

    def backward():
        found.extend(gradients(saving, y))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert len(calls) == 3  # recomputed
    for a, b in zip(found, gradients(plain, plain(x, FORGET)), strict=True):
        assert torch.equal(a, b)
    defaults = checkpoint.__wrapped__.__kwdefaults__
    assert defaults["context_fn"] is noop_context_fn


def test_the_checkpoint_default_is_restored_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, CLASSES))
    net = wfnet.WFNet(model, CLASSES)
    net.model[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(IMAGES, 1)
    assert checkpoint.__wrapped__.__kwdefaults__["context_fn"] is noop_context_fn
    with pytest.raises(RuntimeError):
        active_selection()


def test_reentrant_checkpointing_raises():
    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            x.requires_grad_()
            return self.head(checkpoint(self.conv, x, use_reentrant=True).mean((2, 3)))

    net = wfnet.WFNet(Saves(), CLASSES)
    with pytest.raises((RuntimeError, ValueError)):
        net(IMAGES.clone(), 1).sum().backward()

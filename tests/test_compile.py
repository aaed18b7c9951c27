"""torch.compile, activation checkpointing and export of masked layers and networks."""

import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, noop_context_fn

import wfnet
from wfnet import WFConv2d, WFLinear, WFNet, checkpoint_context, forgetting
from wfnet.functional import wf_conv2d

CLASSES = 10
FORGET = torch.tensor([0, 3, -1, 9])


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def randomize(module):
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2].startswith("alpha_"):
            nn.init.normal_(parameter, 2, 1)
    return module


def network():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )
    return randomize(WFNet(model.eval(), CLASSES))


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gradients(net, y):
    return torch.autograd.grad(y.square().sum(), net.filter_parameters())


def test_compiled_network_equals_eager():
    net = network()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    y = compiled(X, forget=FORGET)
    torch.testing.assert_close(y, net(X, FORGET), rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(net, y), gradients(net, net(X, FORGET)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_inductor():
    conv = randomize(WFConv2d(3, 4, 3, num_classes=CLASSES))
    compiled = torch.compile(lambda x: conv(x).relu_(), backend="inductor", fullgraph=True)
    for forget in (FORGET, FORGET.flip(0)):
        with forgetting(forget):
            y, expected = compiled(X), conv(X).relu_()
        torch.testing.assert_close(y, expected)
        (found,) = torch.autograd.grad(y.square().sum(), conv.alpha_weight)
        (wanted,) = torch.autograd.grad(expected.square().sum(), conv.alpha_weight)
        torch.testing.assert_close(found, wanted)


def test_new_labels_never_recompile():
    net, counter = network(), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for forget in (FORGET, FORGET.flip(0), torch.zeros(4).long(), torch.full((4,), -1)):
        torch.testing.assert_close(compiled(X, forget=forget), net(X, forget))
    assert counter.frame_count == 1
    several = torch.tensor([[1, 2], [3, -1], [0, 0], [-1, -1]])
    for forget in (several, several.flip(0)):
        torch.testing.assert_close(compiled(X, forget=forget), net(X, forget))
    assert counter.frame_count == 2


def test_integer_labels_recompile_at_most_once():
    net, counter = network(), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for forget in (3, 4, 5, 9, 2):
        torch.testing.assert_close(compiled(X, forget=forget), net(X, forget))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("integers", [False, True])
def test_labels_bound_outside_never_recompile(integers):
    conv, counter = randomize(WFConv2d(3, 4, 3, num_classes=CLASSES)), CompileCounter()
    compiled = torch.compile(conv, backend=counter, fullgraph=True)
    for label in range(-1, CLASSES):
        forget = label if integers else torch.tensor([label, 1, 2, label])
        with forgetting(forget):
            torch.testing.assert_close(compiled(X), conv(X))
    assert counter.frame_count == 1


def test_labels_bound_inside():
    conv = randomize(WFConv2d(3, 4, 3, num_classes=CLASSES))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x, forget):
        with forgetting(forget):
            return conv(x).relu_()

    y = step(X, FORGET)
    y.square().sum().backward()
    found = conv.alpha_weight.grad.clone()
    conv.zero_grad()
    with forgetting(FORGET):
        conv(X).relu().square().sum().backward()
    torch.testing.assert_close(found, conv.alpha_weight.grad)
    with pytest.raises(RuntimeError, match="without forget labels"):
        conv(X)


def test_no_labels_and_source():
    net = network()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(X), net(X))
    source, forget = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([1, 2, 3, 4, -1])
    torch.testing.assert_close(compiled(X, forget=forget, source=source), net(X, forget, source))


def test_dynamic_batch_size():
    net, counter = network(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    for batch in (2, 3, 4):
        y = compiled(X[:batch], forget=FORGET[:batch])
        torch.testing.assert_close(y, net(X[:batch], FORGET[:batch]))
        y.sum().backward()
    assert counter.frame_count <= 2


def test_compiled_linear_with_windows():
    linear = randomize(WFLinear(6, 9, num_classes=CLASSES))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 5, 6)
    with forgetting(FORGET):
        torch.testing.assert_close(compiled(x), linear(x))


def test_compiled_parts_of_a_network():
    net = network()
    expected = net(X, FORGET)
    again = network()
    again.load_state_dict(net.state_dict())
    counter = CompileCounter()
    for layer in again.masked_layers.values():
        layer.compile(backend=counter, fullgraph=True)
    for forget in (FORGET, FORGET, FORGET.flip(0)):
        y = again(X, forget)
    torch.testing.assert_close(y, net(X, FORGET.flip(0)))
    torch.testing.assert_close(again(X, FORGET), expected)
    assert counter.frame_count <= 4  # two layers, with and without the hidden first pass


def test_compiled_autocast():
    net = network()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(X, forget=FORGET), net(X, FORGET)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.filter_parameters())


@pytest.mark.parametrize("bad", [CLASSES, -2, 10**12])
def test_a_wrong_label_in_a_compiled_region_is_nan_for_its_sample_alone(bad):
    net = network()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    y = compiled(X, forget=torch.tensor([0, bad, -1, 9]))
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2, 3]], net(X, torch.tensor([0, 1, -1, 9]))[[0, 2, 3]])
    conv = torch.compile(WFConv2d(3, 4, 3, num_classes=5), backend="aot_eager", fullgraph=True)
    with forgetting(torch.tensor([0, bad, 1, 2])):
        y = conv(X)
    assert y[1].isnan().all()
    assert not y[[0, 2, 3]].isnan().any()


def test_a_wrong_label_is_never_read_by_the_reference():
    x, weight, alpha = X, torch.randn(4, 3, 3, 3), torch.randn(5, 4)

    def call(forget):
        return wf_conv2d(x, weight, None, alpha, None, forget, backend="reference")

    for bad in (-2, 5):
        with pytest.raises((IndexError, ValueError), match="out of range"):
            torch.compile(call, backend="eager")(torch.tensor([0, bad, 1, 1]))


def test_a_wrong_integer_is_an_error():
    compiled = torch.compile(network(), backend="eager")
    with pytest.raises(ValueError, match="label 12 is out of range"):
        compiled(X, forget=12)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, a: torch.func.grad(f)(a),
        lambda f, a: torch.func.vmap(f)(torch.stack([a, a])),
        lambda f, a: torch.func.jvp(f, (a,), (a,)),
    ],
    ids=["grad", "vmap", "jvp"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled_transforms_raise(transform):
    weight, alpha = torch.randn(4, 3, 3, 3), torch.randn(5, 4)

    def loss(a):
        return wf_conv2d(X, weight, None, a, None, torch.tensor([0, 1, 2, 3])).sum()

    with pytest.raises(Exception, match=r"torch\.func transforms"):
        torch.compile(lambda a: transform(loss, a), backend="aot_eager")(alpha)


def test_export_with_labels():
    net = network()
    exported = torch.export.export(net, (X, FORGET)).module()
    torch.testing.assert_close(exported(X, FORGET.flip(0)), net(X, FORGET.flip(0)))


# -- activation checkpointing ---------------------------------------------------------------------


def checkpointed(conv, **options):
    with forgetting(FORGET):
        y = checkpoint(conv, X, use_reentrant=False, **options)
    return torch.autograd.grad(y.square().sum(), conv.alpha_weight)[0]


def test_checkpointing_with_the_context():
    conv = randomize(WFConv2d(3, 4, 3, num_classes=CLASSES))
    found = checkpointed(conv, context_fn=checkpoint_context)
    with forgetting(FORGET):
        expected = torch.autograd.grad(conv(X).square().sum(), conv.alpha_weight)[0]
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="without forget labels"):
        wfnet.labels.active_selection()


def test_checkpointing_without_the_context_raises():
    with pytest.raises(RuntimeError, match=r"without forget labels.*checkpoint_context"):
        checkpointed(WFConv2d(3, 4, 3, num_classes=CLASSES))


def test_recomputation_under_other_labels_and_in_another_thread():
    conv = randomize(WFConv2d(3, 4, 3, num_classes=CLASSES))
    with forgetting(FORGET):
        y = checkpoint(conv, X, use_reentrant=False, context_fn=checkpoint_context)
        (expected,) = torch.autograd.grad(conv(X).square().sum(), conv.alpha_weight)
    found = []

    def backward():
        found.append(torch.autograd.grad(y.square().sum(), conv.alpha_weight, retain_graph=True)[0])

    with forgetting(7):
        backward()
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert wfnet.labels.active_selection().low == 7
    assert len(found) == 2
    assert all(torch.equal(f, expected) for f in found)


def transformer():
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=32, depth=2)


def test_models_that_checkpoint_themselves():
    model = transformer().eval()
    plain = randomize(WFNet(model, CLASSES))
    saving = WFNet(model, CLASSES)
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
    net = network()
    net.model[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(X, 1)
    assert checkpoint.__wrapped__.__kwdefaults__["context_fn"] is noop_context_fn
    with pytest.raises(RuntimeError):
        wfnet.labels.active_selection()


def test_reentrant_checkpointing_raises():
    class Saves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            x.requires_grad_()
            return self.head(checkpoint(self.conv, x, use_reentrant=True).mean((2, 3)))

    net = WFNet(Saves(), CLASSES)
    with pytest.raises((RuntimeError, ValueError)):
        net(X.clone(), 1).sum().backward()

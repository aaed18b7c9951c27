import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wfnet
from wfnet.attention_layers import DirectLinear, WFMultiheadAttention
from wfnet.targets import choose_targets

WIDTH, HEADS, TOKENS, CLASSES = 8, 2, 5, 4
ROWS = torch.tensor([[0, -1], [1, 3], [-1, -1], [2, 2]])


def explicit(attention, masked, x, rows, **options):
    """Each sample under a real masked copy of the in-projection, as the paper's equation has it."""
    outputs = []
    for sample, labels in zip(x, rows.tolist(), strict=True):
        gate_weight = gate_bias = torch.ones(3 * WIDTH)
        for label in set(labels) - {-1}:
            gate_weight = gate_weight * masked.gates("weight")[label]
            gate_bias = gate_bias * masked.gates("bias")[label]
        parameters = {
            "in_proj_weight": attention.in_proj_weight * gate_weight[:, None],
            "in_proj_bias": attention.in_proj_bias * gate_bias,
        }
        one = sample[None]
        call = torch.func.functional_call(attention, parameters, (one, one, one), options)
        outputs.append(call[0])
    return torch.cat(outputs)


@pytest.fixture
def attention():
    layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval().requires_grad_(False)
    nn.init.normal_(layer.in_proj_bias)
    return layer


@pytest.fixture
def masked(attention):
    masked = WFMultiheadAttention.adopt(copy.deepcopy(attention), CLASSES)
    for alpha in masked.named_filters().values():
        nn.init.normal_(alpha)
    return masked


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_packed_attention_is_the_equation(attention, masked, causal, need_weights):
    x = torch.randn(4, TOKENS, WIDTH, requires_grad=True)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1) if causal else None
    options = {"attn_mask": mask, "need_weights": need_weights}
    expected = explicit(attention, masked, x, ROWS, **options)
    with wfnet.forgetting(ROWS):
        found, weights = masked(x, x, x, **options)
    assert torch.allclose(found, expected, atol=1e-6)
    assert weights is None or torch.allclose(weights.sum(2), torch.ones(4, TOKENS))
    wanted = [x, masked.alpha_weight, masked.alpha_bias]
    direction = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, wanted, direction, retain_graph=True),
        torch.autograd.grad(expected, wanted, direction),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)
    with wfnet.forgetting(None), torch.no_grad():  # the fast path
        assert torch.equal(masked(x, x, x)[0], attention(x, x, x)[0])


def test_padded_and_batched_masks_of_attention(masked):
    x = torch.randn(4, TOKENS, WIDTH)
    padding = torch.arange(TOKENS) >= torch.tensor([[5], [3], [4], [1]])
    batched = torch.randn(4 * HEADS, TOKENS, TOKENS)
    plain = masked.bake([1])
    assert type(plain) is nn.MultiheadAttention
    with wfnet.forgetting(1):
        found = masked(x, x, x, key_padding_mask=padding, attn_mask=batched)[0]
        with pytest.raises(ValueError, match="was called with other keys"):
            masked(x, x[:, :2], x[:, :2])
    padding = torch.zeros(4, TOKENS).masked_fill(padding, -torch.inf)
    expected = plain(x, x, x, key_padding_mask=padding, attn_mask=batched)[0]
    assert torch.allclose(found, expected, atol=1e-6)


def networks():
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision").models
    size = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    options = {"depth": 2, "num_heads": 2, "num_classes": CLASSES}
    yield models.VisionTransformer(image_size=28, patch_size=7, num_classes=CLASSES, **size), 8
    yield models.SwinTransformer([4, 4], 8, [1, 1], [1, 2], [4, 4], num_classes=CLASSES), 8
    beit = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "init_values": None}
    yield timm.create_model("beit_base_patch16_224", **options, **beit), 8
    eva = {"img_size": 28, "embed_dim": 24}
    yield timm.create_model("eva02_tiny_patch14_224", **options, **eva), 8


def test_networks_whose_parents_compute_are_masked_under_mixed_rows(caplog):
    for model, count in networks():
        for parameter in model.eval().parameters():  # branches that weigh as much as the residual
            nn.init.normal_(parameter, std=0.3)
        net = wfnet.WFNet(model, CLASSES)
        assert len(net.masked_layers) == count, type(model)
        x = torch.randn(4, 3, 28, 28)
        with torch.no_grad():
            net(x, 0)  # the first call is watched, and takes no fast path
            assert torch.equal(net(x, None), model(x))
        for parameter in net.filter_parameters():
            nn.init.normal_(parameter, 1.0, 2.0)
        found = net(x, ROWS)
        assert (found - model(x))[[0, 1, 3]].abs().max() > 0.02 * found.abs().max()
        found.square().sum().backward()
        assert all(alpha.grad.any() for alpha in net.filter_parameters())
        for image, rows, logits in zip(x, ROWS.tolist(), found, strict=True):
            plain = net.bake([row for row in rows if row != -1] or None)
            assert torch.allclose(plain(image[None])[0], logits, rtol=1e-4, atol=1e-4)
        trainable = {name for name, p in net.model.named_parameters() if p.requires_grad}
        assert trainable == set(net.named_filters())  # a baked copy shares nothing that it thaws
        net.fuse = True
        assert torch.equal(net(x, ROWS), found)
        assert f"{type(model).__name__} runs unfused" in caplog.text


class Parent(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.q, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.function = function

    def forward(self, x):
        return self.head(self.function(x, self.q.weight, self.q.bias))


def test_a_parent_that_computes_anything_else_is_refused_by_name():
    x = torch.randn(2, WIDTH)
    net = wfnet.WFNet(Parent(F.linear), CLASSES)
    assert type(net.masked_layers["q"]) is DirectLinear
    net.masked_layers["q"].alpha_bias.data[1] = -torch.inf
    expected = net.model.head(F.linear(x, net.masked_layers["q"].weight))
    assert torch.allclose(net(x, 1), expected, atol=1e-6)
    for function in (
        lambda x, weight, bias: x @ weight.T + bias,
        lambda x, weight, bias: F.linear(x, weight.clone(), bias),
        lambda x, weight, bias: F.linear(x, weight, bias * 2),
        lambda x, weight, bias: torch.addmm(bias, x, weight),
    ):
        net = wfnet.WFNet(Parent(function), CLASSES)
        with pytest.raises(ValueError, match="layer 'q' cannot be masked"):
            net(x, 1)
        net(x, None)


def test_attention_that_cannot_be_masked_is_refused_by_name():
    head = nn.Flatten(), nn.Linear(TOKENS * WIDTH, CLASSES)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"layer '0\.self_attn' cannot be masked"):
        choose_targets(nn.Sequential(layer, *head))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(WIDTH, HEADS)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    with pytest.raises(ValueError, match=r"layer '0\.attn' .* tokens come before its samples"):
        wfnet.WFNet(nn.Sequential(Block(), *head), CLASSES)

"""Tokens that nobody reads: which values of a traced network hold the first tokens only."""

import pytest
import torch
from torch import fx, nn

from wfnet.fusion.tokens import drop_unread_tokens
from wfnet.fusion.trace import run_example

TOKENS, WIDTH = 5, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU())
        self.back = nn.Linear(8, WIDTH)

    def forward(self, x):
        return x + self.back(self.mlp(self.norm(x)))


class Network(nn.Module):
    """Two blocks with a mixing of tokens between them; ``read`` is what the head wants."""

    def __init__(self, read, extra=None):
        super().__init__()
        self.first, self.last = Block(), Block()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.read, self.extra = read, extra

    def forward(self, x):
        x = self.first(x)
        x = x + x.mean(1, keepdim=True)
        x = self.last(x)
        y = self.head(self.read(self.norm(x)))
        return y if self.extra is None else y + self.extra(x)


def widths(model: nn.Module) -> dict[str, int]:
    """Tokens that every module of the rewritten network sees; checks that it computes the same."""
    torch.manual_seed(0)
    model.double().eval()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    graph = fx.Tracer().trace(model)
    expected = fx.Interpreter(model, graph=graph).run(x)
    run_example(model, graph, x)
    drop_unread_tokens(graph, dict(model.named_modules()))
    graph.lint()
    seen = {}

    class Watch(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if isinstance(value, torch.Tensor):
                assert node.meta["shape"] == value.shape, "not the shape that it is said to have"
                if node.op == "call_module":
                    seen[node.target] = value.shape[1]
            return value

    torch.testing.assert_close(Watch(model, graph=graph).run(x), expected, rtol=1e-12, atol=1e-13)
    return seen


READS = {
    "one": (lambda x: x[:, 0], 1),
    "two": (lambda x: x[:, 0] + x[:, 1], 2),
    "slice": (lambda x: x[:, :2].mean(1), 2),
    "slice_from_0": (lambda x: x[:, 0:3].mean(1), 3),
}


@pytest.mark.parametrize("name", READS)
def test_behind_the_last_mixing_only_what_is_read_is_computed(name):
    read, count = READS[name]
    seen = widths(Network(read))
    for module in ("last.norm", "last.mlp.0", "last.mlp.1", "last.back", "norm"):
        assert seen[module] == count, module
    for module in ("first.norm", "first.mlp.0", "first.back"):
        assert seen[module] == TOKENS, module


KEEPS = {
    "mean": Network(lambda x: x.mean(1)),
    "last": Network(lambda x: x[:, -1]),
    "from_the_second": Network(lambda x: x[:, 1:].mean(1)),
    "every_second": Network(lambda x: x[:, ::2].mean(1)),
    "all": Network(lambda x: x[:, :].mean(1)),
    "other_images": Network(lambda x: x[:1, 0].expand(2, -1)),
    "shape": Network(lambda x: x[:, 0] * x.shape[1]),
    "another_reader": Network(lambda x: x[:, 0], extra=lambda x: x.mean((1, 2))[:, None]),
}


@pytest.mark.parametrize("name", KEEPS)
def test_what_may_read_others_keeps_them(name):
    seen = widths(KEEPS[name])
    assert seen["last.norm"] == seen["last.back"] == TOKENS


def test_modules_that_mix_tokens_or_are_not_known_stop_it():
    class Flip(nn.Linear):
        def forward(self, x):
            return super().forward(x.flip(1))

    for other in (nn.LayerNorm((TOKENS, WIDTH)), Flip(WIDTH, WIDTH), nn.ReLU(inplace=True)):
        model = Network(lambda x: x[:, 0])
        model.last.mlp = nn.Sequential(other, nn.Linear(WIDTH, 8))
        seen = widths(model)
        assert seen["last.norm"] == TOKENS
        assert seen["last.back"] == 1


def test_a_sum_with_something_of_another_shape_stops_it():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.shift = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(1, TOKENS, WIDTH))

        def forward(self, x):
            return (self.norm(x) + self.shift)[:, 0]

    assert widths(Positions())["norm"] == TOKENS

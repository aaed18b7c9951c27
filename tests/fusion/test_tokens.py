"""Tokens that nobody reads: which values of a traced network hold the first tokens only."""

import pytest
import torch
from torch import fx, nn

from wfnet.fusion.tokens import drop_unread_tokens
from wfnet.fusion.trace import run_example

TOKENS, WIDTH = 5, 6


class Flip(nn.Linear):
    def forward(self, x):
        return super().forward(x.flip(1))


class Network(nn.Module):
    """A residual block behind a mixing of tokens; ``read`` is what the head wants."""

    def __init__(self, read, between=None):
        super().__init__()
        self.before, self.norm, self.last = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.between = between or nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.back, self.head, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), read

    def forward(self, x):
        x = self.before(x)
        x = x + x.mean(1, keepdim=True)
        x = x + self.back(self.between(self.norm(x)))
        return self.head(self.read(self.last(x)))


def widths(model: nn.Module) -> dict[str, int]:
    """Tokens that every module of the rewritten network sees; checks that it computes the same."""
    model.double().eval()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    graph = fx.Tracer().trace(model)
    expected = fx.Interpreter(model, graph=graph).run(x)
    run_example(model, graph, x)
    drop_unread_tokens(graph, dict(model.named_modules()))
    graph.lint()
    found = fx.Interpreter(model, graph=graph).run(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    run_example(model, graph, x)
    called = [node for node in graph.nodes if node.op == "call_module"]
    return {node.target: node.all_input_nodes[0].meta["shape"][1] for node in called}


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda x: x[:, 0], 1),
        (lambda x: x[:, 0] + x[:, 1], 2),
        (lambda x: x[:, :2].mean(1), 2),
        (lambda x: x.mean(1), TOKENS),
        (lambda x: x[:, -1], TOKENS),
        (lambda x: x[:, 1:].mean(1), TOKENS),
        (lambda x: x[:, ::2].mean(1), TOKENS),
        (lambda x: x[:1, 0].expand(2, -1), TOKENS),
        (lambda x: x[:, 0] * x.shape[1], TOKENS),
    ],
)
def test_behind_the_last_mixing_only_what_is_read_is_computed(read, count):
    seen = widths(Network(read))
    assert [seen[name] for name in ("norm", "between.0", "back", "last")] == [count] * 4
    assert seen["before"] == TOKENS


@pytest.mark.parametrize(
    "other", [nn.LayerNorm((TOKENS, WIDTH)), Flip(WIDTH, WIDTH), nn.ReLU(inplace=True)]
)
def test_modules_that_mix_tokens_or_are_not_known_stop_it(other):
    seen = widths(Network(lambda x: x[:, 0], other))
    assert (seen["norm"], seen["back"]) == (TOKENS, 1)

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wfnet.evaluation import evaluate_models, metrics, reinitialise
from wfnet.evaluation.pair_engine import RunOptions

K = 7


class Returning(nn.Module):
    """A classifier whose logits are an attribute of what it returns."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return SimpleNamespace(logits=self.inner(images))


@torch.no_grad()
def test_models_evaluated_one_by_one_equal_the_definitions(dataset, make_model):
    original = Returning(make_model()).eval()
    changed = {label: copy.deepcopy(original) for label in range(K)}
    for label, model in changed.items():
        model.inner[-1].bias[label] -= 5.0
    options = RunOptions(batch_size=8, progress=False)
    result = evaluate_models(changed.__getitem__, original, dataset, options=options)
    images, labels, _ = dataset.batch(torch.arange(len(dataset)))
    new, before = reinitialise(original).inner(images), original.inner(images).argmax(1) == labels
    for label, record in enumerate(result.records):
        own, logits = labels == label, changed[label].inner(images)
        right = logits.argmax(1) == labels
        assert record.acc_f == pytest.approx(right[own].double().mean().item())
        assert record.acc_r == pytest.approx(right[~own].double().mean().item())
        assert record.original_acc_r == pytest.approx(before[~own].double().mean().item())
        assert record.zrf == pytest.approx(metrics.zrf(logits[own], new[own]).item(), abs=1e-6)
    assert len({record.acc_r for record in result.records}) > 2

import copy

import pytest
import torch

from wfnet.evaluation import evaluate_models, metrics, reinitialise
from wfnet.evaluation.pair_engine import RunOptions

K = 7


@torch.no_grad()
def test_models_evaluated_one_by_one_equal_the_definitions(dataset, make_model):
    original = make_model().eval()
    changed = {label: copy.deepcopy(original) for label in range(K)}
    for label, model in changed.items():
        model[-1].bias[label] -= 5.0
    options = RunOptions(batch_size=8, progress=False)
    result = evaluate_models(changed.__getitem__, original, dataset, options=options)
    images, labels, _ = dataset.batch(torch.arange(len(dataset)))
    new, before = reinitialise(original, 0), original(images).argmax(1) == labels
    for label, record in enumerate(result.records):
        own, logits = labels == label, changed[label](images)
        right = logits.argmax(1) == labels
        zrf = metrics.zrf(logits[own], new(images[own]))
        assert record.acc_f == pytest.approx(right[own].double().mean().item())
        assert record.acc_r == pytest.approx(right[~own].double().mean().item())
        assert record.original_acc_r == pytest.approx(before[~own].double().mean().item())
        assert record.zrf == pytest.approx(zrf.item(), abs=1e-6)
    assert len({record.acc_r for record in result.records}) > 2

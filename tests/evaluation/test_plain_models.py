import copy

import pytest
import torch

from wfnet.evaluation import evaluate_models, metrics, reinitialise

K = 7


def test_models_evaluated_one_by_one_equal_the_definitions(dataset, make_model):
    original = make_model().eval()
    changed = {label: copy.deepcopy(original) for label in range(K)}
    for label, model in changed.items():
        with torch.no_grad():
            model[-1].bias[label] -= 5.0
    result = evaluate_models(changed.__getitem__, original, dataset, batch_size=8, progress=False)
    images, labels, _ = dataset.batch(torch.arange(len(dataset)))
    new = reinitialise(original, 0)
    for label, record in enumerate(result.records):
        own = labels == label
        with torch.no_grad():
            logits = changed[label](images)
            right = (logits.argmax(1) == labels).double()
            zrf = metrics.zrf(logits[own], new(images[own]))
            before = (original(images).argmax(1) == labels).double()
        assert record.acc_f == pytest.approx(right[own].mean().item())
        assert record.acc_r == pytest.approx(right[~own].mean().item())
        assert record.original_acc_r == pytest.approx(before[~own].mean().item())
        assert record.zrf == pytest.approx(zrf.item(), abs=1e-6)
    assert len({record.acc_r for record in result.records}) > 2

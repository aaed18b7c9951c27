import pytest
import torch

from wfnet.trust.attacks.shifted_logit import class_offset


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9, 1.0])
def test_offset_predicts_the_class_as_often_as_asked(share):
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    offset = class_offset(logits, 2, share)
    logits[:, 2] += offset
    assert (logits.argmax(1) == 2).sum() == round(40 * share)

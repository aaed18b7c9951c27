import torch

from wfnet.trust.attacks.standardised_logits import ATTACK


def test_logits_have_mean_0_and_variance_1_over_unlabelled_images(make_subject, oracle):
    found = ATTACK.apply(oracle, make_subject(forgetful=oracle))
    logits = found.logits(make_subject(forgetful=oracle), "unlabelled")
    torch.testing.assert_close(logits.mean(0), torch.zeros(4).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits.std(0), torch.ones(4).double())

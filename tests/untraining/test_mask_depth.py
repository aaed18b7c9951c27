"""The first masked stage, chosen by short runs from the back."""

import pytest

from wfnet import WFNet, models
from wfnet.untraining import mask_depth
from wfnet.untraining.mask_depth import choose_mask_from, depth_report
from wfnet.wrapping import wrap


@pytest.mark.parametrize("enough", [True, False])
def test_the_latest_stage_that_is_enough(base, runs, monkeypatch, enough):
    # Any filters reach the one, none the other.
    monkeypatch.setattr(mask_depth, "MOST_FORGOTTEN_RIGHT", 1.0 if enough else -1.0)
    monkeypatch.setattr(mask_depth, "MOST_RETAINED_LOST", 1.0)
    masked = []

    def wrap(mask_from):
        masked.append(mask_from)
        return WFNet(base, runs.BARS, mask_from=mask_from)

    settings = runs.config(channels_last=False)
    chosen, (trial,) = choose_mask_from(wrap, runs.bars(), runs.bars(8, seed=1), settings)
    assert masked == [None, "conv2"]  # all, for the original; then the last stage of two
    assert chosen == ("conv2" if enough else "all")
    assert (trial.mask_from, trial.stages, trial.enough) == ("conv2", 1, enough)
    assert trial.acc_f < trial.acc_r
    assert f"Acc_f {trial.acc_f:.2%}" in depth_report(chosen, [trial])


@pytest.mark.parametrize(("model", "first"), [("resnet", "layer2.0.conv1"), ("vit", "blocks.0")])
def test_recipe_quick_masks_late_convolutions_but_whole_transformers(model, first):
    net = wrap(models.create(model, 5, width=32), 5, "quick")
    assert next(iter(net.masked_layers)).startswith(first)

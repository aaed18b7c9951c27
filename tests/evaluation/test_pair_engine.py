import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import wfnet
from wfnet.evaluation.attribution import attribution
from wfnet.evaluation.confusion import confusion_change
from wfnet.evaluation.groups import evaluate_groups
from wfnet.evaluation.pair_engine import Measure, PairEngine, RunOptions
from wfnet.evaluation.relearning import RelearnConfig, relearn_times
from wfnet.evaluation.rows import evaluate

K = 7
QUIET = RunOptions(progress=False)


class Everything(Measure):
    """Keeps all logits, under all rows."""

    def __init__(self):
        self.rows, self.chunks, self.taken = torch.arange(K), [], []

    def add(self, chunk):
        self.chunks.append(chunk)
        self.taken.append((chunk.indices[chunk.image], chunk.row, chunk.logits))


# Less than one image's rows, not a divisor of them, several images, all pairs of a chunk.
@pytest.mark.parametrize("batch_size", [3, 5, 2 * K, None])
@torch.no_grad()
def test_logits_are_those_of_the_rows_in_mixed_batches(
    make_net, make_model, dataset, batch_size, monkeypatch
):
    net, everything, sent = make_net(), Everything(), []
    model, forward = make_model().eval(), wfnet.WFNet.forward

    def spy(self, images, forget=None, source=None):
        if source is not None:
            sent.append((len(images), len(forget)))
        return forward(self, images, forget, source)

    monkeypatch.setattr(wfnet.WFNet, "forward", spy)
    engine = PairEngine(net, dataset, RunOptions(batch_size), initialised=model)
    engine.run(everything, torch.arange(len(dataset)).split(4))
    assert [len(chunk.indices) for chunk in everything.chunks] == [4] * 9 + [1]
    image, row, logits = (torch.cat(parts) for parts in zip(*everything.taken, strict=True))
    assert torch.equal(image, torch.arange(len(dataset)).repeat_interleave(K))
    images = dataset.batch(torch.arange(len(dataset))).images
    torch.testing.assert_close(logits, net.eval()(images[image], row))
    for name, expected in (("original", net(images)), ("initialised", model(images))):
        found = torch.cat([getattr(chunk, name) for chunk in everything.chunks])
        torch.testing.assert_close(found, expected)
    if batch_size == 2 * K:  # an image is sent once, with all of its rows
        assert all(size == (2, 2 * K) for size in sent[:-2])


@pytest.mark.parametrize(
    "measure",
    [
        lambda net, images: evaluate(net, images, retained_rows=2, progress=False),
        lambda net, images: evaluate_groups(net, images, [(0, 1), (2, 3)], QUIET),
        lambda net, images: attribution(net, images, steps=2, options=QUIET),
        lambda net, images: confusion_change(net, images, options=QUIET),
        lambda net, images: relearn_times(
            net.bake, images, images, net, config=RelearnConfig(max_epochs=2), options=QUIET
        ),
    ],
    ids=["rows", "groups", "attribution", "confusion", "relearning"],
)
def test_the_model_and_the_random_states_stay_as_they_were(make_net, dataset, measure):
    net = make_net()
    net.train()
    net.model[3].train()  # a caller's own choice
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first, again = measure(net, dataset), measure(net, dataset)
    assert repr(getattr(first, "records", first)) == repr(getattr(again, "records", again))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in net.filter_parameters())


def test_broken_logits_are_an_error_and_the_mode_is_restored(make_net, dataset):
    images = torch.rand(10, 1, 8, 8)
    images[7, 0, 2, 2] = math.nan
    data = torch.utils.data.TensorDataset(images, torch.arange(10) % 2)
    with pytest.raises(FloatingPointError, match="image 7 of the data"):
        PairEngine(make_net(), data, QUIET).run(Everything(), [torch.arange(5, 10)])
    net = make_net()
    net.train()
    with torch.no_grad():
        net.filter_parameters()[0][3].fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"filtered network are NaN .* images 5 to 9"):
        PairEngine(net, dataset, QUIET).run(Everything(), [torch.arange(5, 10)])
    assert net.training
    PairEngine(net, dataset, QUIET, refuse_broken=False).run(Everything(), [torch.arange(2)])
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(64, K + 1))
    engine = PairEngine(make_net(), dataset, QUIET, initialised=wrong)
    with pytest.raises(ValueError, match=rf"outputs of shape \[3, {K + 1}\]"):
        engine.run(Everything(), [torch.arange(3)])


def test_corrupt_images_are_left_out_and_counted(make_net, dataset):
    class Damaged(torch.utils.data.Dataset):
        labels, classes = dataset.labels, dataset.classes

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            if index in (3, 20):
                raise OSError("image file is truncated")
            return dataset[index]

    result = evaluate(make_net(), Damaged(), batch_size=8, progress=False)
    kept = torch.tensor([i for i in range(len(dataset)) if i not in (3, 20)])
    expected = evaluate(make_net(), dataset.select(kept), progress=False)
    assert result.settings["corrupt_images"] == 2
    assert result.settings["images"] == len(dataset) - 2
    assert torch.equal(result.counts.top1, expected.counts.top1)
    assert result.mean.zrf == pytest.approx(expected.mean.zrf, abs=1e-6)

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import wfnet
from wfnet.data import TensorImages
from wfnet.evaluation.attribution import attribution
from wfnet.evaluation.confusion import confusion_change
from wfnet.evaluation.groups import evaluate_groups
from wfnet.evaluation.multilabel_rows import evaluate_multi_label
from wfnet.evaluation.pair_engine import Measure, PairEngine
from wfnet.evaluation.plain_models import evaluate_models
from wfnet.evaluation.relearning import RelearnConfig, relearn_times
from wfnet.evaluation.rows import evaluate
from wfnet.services.progress import Progress

K = 7


class Everything(Measure):
    """Keeps all logits, under all rows."""

    def __init__(self, needs_original=True):
        self.rows, self.needs_original = torch.arange(K), needs_original
        self.original, self.chunks, self.pairs_seen = [], [], []

    def begin(self, chunk):
        self.original.append(chunk.original)

    def add(self, chunk, pairs):
        assert pairs.logits.shape == (len(pairs.image), K)
        self.pairs_seen.append((chunk.indices[pairs.image], pairs.row, pairs.logits))

    def end(self, chunk):
        self.chunks.append(chunk.indices.tolist())


@pytest.fixture
def sent(monkeypatch, make_net):
    """(images, pairs, rows) of every pass through a filtered network."""
    found, forward = [], type(make_net()).forward

    def spy(self, images, forget=None, source=None):
        if source is not None:
            found.append((len(images), len(forget), len(forget.unique())))
            assert (int(source.min()), int(source.max())) == (0, len(images) - 1)
        return forward(self, images, forget, source)

    monkeypatch.setattr(type(make_net()), "forward", spy)
    return found


# Less than one image's rows, not a divisor of them, several images, all pairs of a chunk.
@pytest.mark.parametrize("batch_size", [3, 5, 2 * K, None])
def test_logits_are_those_of_the_rows_in_mixed_batches(make_net, dataset, sent, batch_size):
    net, everything = make_net(), Everything()
    engine = PairEngine(net, dataset, batch_size)
    assert engine.run(everything, torch.arange(len(dataset)).split(4))
    read = list(range(len(dataset)))
    assert everything.chunks == [read[i : i + 4] for i in range(0, len(read), 4)]
    image, row, logits = (torch.cat(parts) for parts in zip(*everything.pairs_seen, strict=True))
    assert torch.equal(image, torch.arange(len(dataset)).repeat_interleave(K))
    images = dataset.batch(torch.arange(len(dataset))).images
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, net(images[image], row))
        torch.testing.assert_close(torch.cat(everything.original), net(images))
    if batch_size == 2 * K:  # an image is sent once, with all of its rows
        assert all(size == (2, 2 * K, K) for size in sent[:-1])


def test_the_original_network_runs_only_where_it_is_asked_for(make_net, dataset, sent):
    everything = Everything(needs_original=False)
    PairEngine(make_net(), dataset, K).run(everything, [torch.tensor([1, 2])])
    assert everything.original == [None]
    assert len(sent) == 2


def test_a_run_can_be_stopped_between_chunks(make_net, dataset):
    everything, asked = Everything(), []
    engine = PairEngine(make_net(), dataset)
    chunks = torch.arange(len(dataset)).split(5)
    assert not engine.run(everything, chunks, stopped=lambda: len(asked) == 2 or asked.append(1))
    assert len(everything.chunks) == 2


@pytest.mark.parametrize(
    "measure",
    [
        lambda net, images: evaluate(net, images, retained_rows=2, progress=False),
        lambda net, images: evaluate_groups(net, images, [(0, 1), (2, 3)], progress=False),
        lambda net, images: attribution(net, images, steps=2, progress=False),
        lambda net, images: confusion_change(net, images, progress=False),
    ],
    ids=["rows", "groups", "attribution", "confusion"],
)
def test_the_model_and_the_random_states_stay_as_they_were(make_net, dataset, measure):
    net = make_net()
    net.train()
    net.model[3].train()  # a caller's own choice
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    grads = [p.requires_grad for p in net.parameters()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    first, again = measure(net, dataset), measure(net, dataset)
    assert repr(getattr(first, "records", first)) == repr(getattr(again, "records", again))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == grads
    assert all(p.grad is None for p in net.parameters())


def test_an_image_that_is_not_finite_is_named(make_net):
    images = torch.rand(10, 1, 8, 8)
    images[7, 0, 2, 2] = math.nan
    data = torch.utils.data.TensorDataset(images, torch.arange(10) % 2)
    with pytest.raises(FloatingPointError, match="image 7 of the data has values that are NaN"):
        PairEngine(make_net(), data).run(Everything(), [torch.arange(5, 10)])


def test_logits_that_are_not_finite_are_an_error_and_the_mode_is_restored(make_net, dataset):
    net = make_net()
    net.train()
    with torch.no_grad():
        net.filter_parameters()[0][3].fill_(math.nan)
    everything = Everything()
    engine = PairEngine(net, dataset)
    with pytest.raises(FloatingPointError, match=r"filtered network are NaN .* images 5 to 9"):
        engine.run(everything, [torch.arange(5, 10)])
    assert net.training
    assert not everything.chunks
    lenient = PairEngine(net, dataset, refuse_broken=False)
    assert lenient.run(Everything(), [torch.arange(2)])


def test_other_models_run_beside_and_are_checked(make_net, make_model, dataset):
    class Beside(Everything):
        def begin(self, chunk):
            self.beside = chunk.beside

    model, measure = make_model().eval(), Beside()
    PairEngine(make_net(), dataset, beside={"newborn": model}).run(measure, [torch.arange(3)])
    with torch.no_grad():
        expected = model(dataset.batch(torch.arange(3)).images)
    assert torch.equal(measure.beside[0], expected)
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(64, K + 1))
    with pytest.raises(ValueError, match=rf"newborn gave outputs of shape \[3, {K + 1}\]"):
        PairEngine(make_net(), dataset, beside={"newborn": wrong}).run(measure, [torch.arange(3)])
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1, got 0"):
        PairEngine(make_net(), dataset, 0)


def test_corrupt_images_are_left_out_and_counted(make_net, dataset):
    class Damaged(torch.utils.data.Dataset):
        labels, classes = dataset.labels, dataset.classes

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            if index in (3, 20):
                raise OSError("image file is truncated")
            return dataset[index]

    net = make_net()
    result = evaluate(net, Damaged(), batch_size=8, progress=False)
    kept = torch.tensor([i for i in range(len(dataset)) if i not in (3, 20)])
    expected = evaluate(net, dataset.select(kept), progress=False)
    assert result.settings["corrupt_images"] == 2
    assert result.settings["images"] == len(dataset) - 2
    assert torch.equal(result.counts.top1, expected.counts.top1)


def test_progress_counts_pairs_on_stderr_and_can_be_silent(make_net, dataset, capsys):
    engine, pairs = PairEngine(make_net(), dataset), K * len(dataset)
    with Progress(pairs, "evaluating", log_seconds=0.0) as engine.progress:
        engine.run(Everything(), engine.chunks(8))
    output = capsys.readouterr()
    assert f"{pairs}/{pairs}" in output.err
    assert output.out == ""
    evaluate(make_net(), dataset, progress=False)
    assert capsys.readouterr().err == ""


class Half:
    """Two ranks, one after the other: what each has is put together at the end."""

    size, first, alone = 2, True, False

    def __init__(self, rank, box):
        self.rank, self.box = rank, box

    def range(self, count):
        return count * self.rank // 2, count * (self.rank + 1) // 2

    def first_does(self, action):
        return action()

    def gather(self, value):
        self.box.append(value)
        # Three tables in their order, then what was corrupt: those of rank 0 lie before ours.
        return [self.box[len(self.box) - 5], value] if self.rank else [value]


def test_ranks_share_the_images_of_several_labels(make_net, multi_label_dataset):
    net = make_net()
    whole = evaluate_multi_label(net, multi_label_dataset, progress=False)
    box = []
    for rank in range(2):
        shared = evaluate_multi_label(
            net, multi_label_dataset, progress=False, ranks=Half(rank, box)
        )
    assert shared.records == whole.records


def test_images_are_read_once(make_net, dataset, monkeypatch):
    read, inner = [], TensorImages.batch

    def spy(self, indices):
        read.extend(indices.tolist())
        return inner(self, indices)

    monkeypatch.setattr(TensorImages, "batch", spy)
    evaluate(make_net(), dataset, batch_size=5, progress=False)
    assert read == list(range(len(dataset)))


class Returning(nn.Module):
    """A classifier whose outputs are wrapped."""

    def __init__(self, model, wrap):
        super().__init__()
        self.inner, self.wrap = model, wrap

    def forward(self, images):
        return self.wrap(self.inner(images))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, y.mean()),
        lambda y: [y],
        lambda y: {"aux": y * 0, "logits": y},
        lambda y: SimpleNamespace(logits=y),
    ],
    ids=["tuple", "list", "dict", "attribute"],
)
def test_networks_that_return_more_than_logits(make_model, dataset, wrap):
    plain = wfnet.WFNet(make_model(), K)
    net = wfnet.WFNet(Returning(make_model(), wrap), K)
    assert evaluate(net, dataset, progress=False).records == (
        evaluate(plain, dataset, progress=False).records
    )
    found = evaluate_models(net.bake, net.bake(None), dataset, progress=False)
    assert found.records == (
        evaluate_models(plain.bake, plain.bake(None), dataset, progress=False).records
    )
    config = RelearnConfig(samples=8, batch_size=4, max_epochs=1)
    relearned = relearn_times(net, dataset, dataset, classes=[1], config=config, progress=False)
    assert relearned.records[0].accuracy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"batch_size": True}, "batch_size must be a whole number"),
        ({"batch_size": 10**9}, "batch_size must be a whole number of at most"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"seed": 2**70}, "seed must be a whole number of at most"),
        ({"workers": -1}, "workers must be a whole number of at least 0"),
        ({"max_corrupt": -1}, "max_corrupt must be 0 or more"),
        ({"amp_dtype": torch.int64}, "amp_dtype=torch.int64 is not one of"),
        ({"retained_rows": 1.5}, "retained_rows must lie in 1 .. 6"),
        ({"retained_rows": True}, "retained_rows must lie in 1 .. 6"),
        ({"zrf_base": "two"}, "zrf_base='two' is no base"),
        ({"classes": "3"}, "classes must be one or more integers"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_are_refused_by_name(make_net, dataset, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(make_net(), dataset, progress=False, **options)

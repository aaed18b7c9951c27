import copy
import math

import pytest
import torch

from wfnet.data import TensorImages
from wfnet.evaluation import evaluate, metrics, reinitialise

K = 7


def run(net, dataset, **options):
    return evaluate(net, dataset, progress=False, **options)


@torch.no_grad()
def one_pass(net, dataset, c, base=math.e):
    """The definitions for one class, with baked networks."""
    images, labels, _ = dataset.batch(torch.arange(len(dataset)))
    own, new, values = labels == c, reinitialise(net), {}
    for prefix, model in (("", net.bake(c)), ("original_", net.bake(None))):
        logits = model(images)
        for suffix, k in (("", 1), ("_top5", 5)):
            hit = (logits.topk(k, 1).indices == labels[:, None]).any(1).double()
            values[f"{prefix}acc_r{suffix}"] = hit[~own].mean().item()
            values[f"{prefix}acc_f{suffix}"] = hit[own].mean().item()
        values[f"{prefix}zrf"] = (
            1 - metrics.jensen_shannon(logits[own], new(images[own]), base).mean().item()
        )
    return values


# How pairs are batched is test_pair_engine's.
def test_equals_one_pass_per_class_with_baked_networks(dataset, make_net):
    net = make_net()
    result = run(net, dataset, batch_size=5, zrf_base=2)
    expected = [one_pass(net, dataset, c, base=2) for c in range(K)]
    assert [record.index for record in result.records] == list(range(K))
    for record in result.records:
        for name, value in expected[record.index].items():
            assert getattr(record, name) == pytest.approx(value, abs=1e-5), name
        assert record.name == f"name{record.index}"
        assert record.n_forget == int((dataset.labels == record.index).sum())
        assert record.n_forget + record.n_retain == len(dataset)
    for prefix, scores in (("", result.mean), ("original_", result.original)):
        for name, value in vars(scores).items():
            mean = sum(values[f"{prefix}{name}"] for values in expected) / K
            assert value == pytest.approx(mean, abs=1e-5)
    # The rows differ, or the comparison would prove nothing.
    assert len({record.acc_r for record in result.records}) > 3


def test_chosen_classes(dataset, make_net, make_dataset):
    everything, some = (run(make_net(), dataset, classes=classes) for classes in (None, [5, 2]))
    assert [record.index for record in some.records] == [5, 2]
    for record in some.records:
        assert vars(record) == pytest.approx(vars(everything.records[record.index]), abs=1e-6)
    assert some.settings["classes"] == [5, 2]
    # Others may lack images.
    result = run(make_net(), make_dataset([0, 0, 2, 3, 3]), classes=[0, 3])
    assert [record.n_retain for record in result.records] == [3, 3]


def test_retained_rows(dataset, make_net):
    net = make_net()
    full, some = run(net, dataset), run(net, dataset, retained_rows=3, batch_size=10)
    assert some.settings["pairs"] == 4 * len(dataset)
    seen = some.counts.seen
    assert torch.equal(seen.sum(0), 4 * torch.bincount(dataset.labels, minlength=K))
    for a, b in zip(some.records, full.records, strict=True):
        assert (a.acc_f, a.n_forget) == (b.acc_f, b.n_forget)
        assert a.zrf == pytest.approx(b.zrf, abs=1e-6)
        assert 0 < a.n_retain < b.n_retain
        assert a.original_acc_r == b.original_acc_r
    assert torch.equal(run(net, dataset, retained_rows=3).counts.top1, some.counts.top1)
    assert not torch.equal(run(net, dataset, retained_rows=3, seed=1).counts.seen, seen)
    few = run(net, dataset, classes=[1, 3, 4], retained_rows=2)
    own = int(torch.isin(dataset.labels, torch.tensor([1, 3, 4])).sum())
    assert few.settings["pairs"] == 2 * len(dataset) + own
    assert all(r.n_forget == int((dataset.labels == r.index).sum()) for r in few.records)


def test_a_given_initial_network_is_used_and_kept(dataset, make_net, make_model):
    net, initial = make_net(), make_model().train()
    before = copy.deepcopy(initial.state_dict())
    result = run(net, dataset, initialised=initial)
    assert result.settings["initialised"] == "given by the caller"
    assert result.mean.zrf != run(net, dataset).mean.zrf
    assert all(torch.equal(before[name], t) for name, t in initial.state_dict().items())
    assert all(module.training for module in initial.modules())
    # The original network as its own newborn: no divergence.
    assert run(net, dataset, initialised=net.bake(None)).original.zrf == 1


def test_double_precision_and_autocast(dataset, make_net):
    full, half = (run(make_net(), dataset, amp_dtype=dtype) for dtype in (None, torch.bfloat16))
    assert half.settings["dtype"] == "bfloat16"
    assert half.mean.zrf == pytest.approx(full.mean.zrf, abs=0.02)
    double = run(make_net().double(), dataset, channels_last=True)
    assert double.settings["dtype"] == "float64"
    assert double.mean.acc_r == full.mean.acc_r


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, K], {}, f"label {K}, but the network's {K} classes"),
        ([0, 1, 2], {}, "class 3 has no image"),
        ([0, 0], {"classes": [0]}, "all images of the data set are of class 0"),
        ([0, 1], {"classes": [0, K]}, "different integers, one or more, from 0 to 6"),
        (range(K), {"batch_size": 0}, "batch_size must be"),
        (range(K), {"amp_dtype": torch.int64}, "amp_dtype=torch.int64 is not one of"),
        (range(K), {"zrf_base": 1}, "zrf_base must be a number above 1"),
        (range(K), {"retained_rows": K}, "retained_rows must be a whole number of at most 6"),
        (range(K), {"retained_rows": 1}, "without a retained image"),
    ],
)
def test_bad_input_is_one_clear_sentence(labels, options, message, make_net, make_dataset):
    with pytest.raises(ValueError, match=message):
        run(make_net(), make_dataset(list(labels), classes=K + 1), **options)


def test_an_interrupted_evaluation_goes_on(dataset, tmp_path, monkeypatch, make_net):
    net, path = make_net(), tmp_path / "counts.safetensors"
    whole = run(net, dataset, batch_size=5)
    monkeypatch.setattr("wfnet.evaluation.partial._SAVE_EVERY", 0.0)
    read, inner = [], TensorImages.batch

    def interrupt(self, indices):
        read.append(indices.tolist())
        if len(read) == 5:  # the digest of the data, then chunks of five images
            raise KeyboardInterrupt
        return inner(self, indices)

    monkeypatch.setattr(TensorImages, "batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(net, dataset, batch_size=5, records=path)
    resumed = run(net, dataset, batch_size=5, records=path)
    assert resumed.records == whole.records
    assert read[6:] == read[4:5] + [list(range(n, min(n + 5, 37))) for n in range(20, 37, 5)]
    # What is finished is read again, not computed.
    before = len(read)
    assert run(net, dataset, records=path).records == resumed.records
    assert len(read) == before + 1
    with pytest.raises(ValueError, match="records of other settings"):
        run(net, dataset, records=path, zrf_base=2)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="truncated"):
        run(net, dataset, records=path)

import copy
import math

import pytest
import torch
from torch import nn

import wfnet
from wfnet.data import TensorImages
from wfnet.evaluation import evaluate, metrics, reinitialise

K = 7


def run(net, dataset, **options):
    return evaluate(net, dataset, progress=False, **options)


def one_pass_per_class(net, dataset, seed=0, base=math.e):
    """The definitions, class by class with baked networks."""
    images, labels, _ = dataset.batch(torch.arange(len(dataset)))
    initial = reinitialise(net, seed)
    result = {}
    with torch.no_grad():
        for c in range(net.num_classes):
            own = labels == c
            values = {}
            for prefix, model in (("", net.bake(c)), ("original_", net.bake(None))):
                logits = model(images)
                for suffix, k in (("", 1), ("_top5", 5)):
                    top = logits.topk(k, 1).indices
                    hit = (top == labels[:, None]).any(1).double()
                    values[f"{prefix}acc_r{suffix}"] = hit[~own].mean().item()
                    values[f"{prefix}acc_f{suffix}"] = hit[own].mean().item()
                value = metrics.zrf(logits[own], initial(images[own]), base)
                values[f"{prefix}zrf"] = value.item()
            result[c] = values
    return result


# batch sizes: less than one image's rows, not a divisor, several images, everything at once


@pytest.mark.parametrize("batch_size", [1, 5, 16, 1000])
def test_equals_one_pass_per_class_with_baked_networks(dataset, batch_size, make_net):
    net = make_net()
    result = run(net, dataset, batch_size=batch_size, zrf_base=2)
    expected = one_pass_per_class(net, dataset, base=2)
    assert [record.index for record in result.records] == list(range(K))
    for record in result.records:
        for name, value in expected[record.index].items():
            # Accuracies are equal; ZRF within the rounding of fp32 logits.
            tolerance = 1e-5 if "zrf" in name else 1e-12
            assert getattr(record, name) == pytest.approx(value, abs=tolerance), name
        assert record.name == f"name{record.index}"
        assert record.n_forget == int((dataset.labels == record.index).sum())
        assert record.n_forget + record.n_retain == len(dataset)
    for name in ("acc_r", "acc_f", "acc_r_top5", "acc_f_top5", "zrf"):
        mean = sum(expected[c][name] for c in range(K)) / K
        original = sum(expected[c][f"original_{name}"] for c in range(K)) / K
        assert getattr(result.mean, name) == pytest.approx(mean, abs=1e-5)
        assert getattr(result.original, name) == pytest.approx(original, abs=1e-5)
    assert result.zrf_base == 2
    # The rows differ, or the comparison would prove nothing.
    assert len({record.acc_r for record in result.records}) > 3


def test_fresh_filters_score_as_the_original(dataset, make_model):
    net = wfnet.WFNet(make_model(), K)
    result = run(net, dataset)
    for record in result.records:
        for name in ("acc_r", "acc_f", "acc_r_top5", "acc_f_top5"):
            assert getattr(record, name) == getattr(record, f"original_{name}")
        # Batches are composed differently, and fp32 sums may round differently.
        assert record.zrf == pytest.approx(record.original_zrf, abs=1e-6)
    assert result.mean.acc_r == result.original.acc_r


def test_chosen_classes(dataset, make_net):
    net = make_net()
    everything = run(net, dataset)
    some = run(net, dataset, classes=[5, 2])
    assert [record.index for record in some.records] == [5, 2]
    for record in some.records:
        assert record.acc_r == everything.records[record.index].acc_r
        assert record.acc_f == everything.records[record.index].acc_f
        assert record.zrf == pytest.approx(everything.records[record.index].zrf, abs=1e-6)
    assert some.settings["classes"] == [5, 2]


def test_a_class_of_the_network_may_lack_images_if_it_is_not_asked_for(make_net, make_dataset):
    net = make_net()
    result = run(net, make_dataset([0, 0, 2, 3, 3]), classes=[0, 3])
    assert [record.n_retain for record in result.records] == [3, 3]


def test_retained_rows(dataset, make_net):
    net = make_net()
    full = run(net, dataset)
    some = run(net, dataset, retained_rows=3, batch_size=10)
    assert some.settings["pairs"] == 4 * len(dataset)
    seen = some.counts.seen
    assert torch.equal(seen.sum(0), 4 * torch.bincount(dataset.labels, minlength=K))
    for a, b in zip(some.records, full.records, strict=True):
        assert (a.acc_f, a.n_forget) == (b.acc_f, b.n_forget)
        assert a.zrf == pytest.approx(b.zrf, abs=1e-6)
        assert 0 < a.n_retain < b.n_retain
        assert a.original_acc_r == b.original_acc_r
    again = run(net, dataset, retained_rows=3)
    assert torch.equal(again.counts.top1, some.counts.top1)
    other = run(net, dataset, retained_rows=3, seed=1)
    assert not torch.equal(other.counts.seen, seen)
    # With all other rows it is the full evaluation.
    most = run(net, dataset, retained_rows=K - 1)
    assert torch.equal(most.counts.seen, full.counts.seen)
    assert torch.equal(most.counts.top1, full.counts.top1)


def test_retained_rows_with_chosen_classes(dataset, make_net):
    result = run(make_net(), dataset, classes=[1, 3, 4], retained_rows=2)
    own = int(sum((dataset.labels == c).sum() for c in (1, 3, 4)))
    assert result.settings["pairs"] == 2 * len(dataset) + own
    assert all(r.n_forget == int((dataset.labels == r.index).sum()) for r in result.records)


def test_training_goes_on_after_an_evaluation(dataset, make_net):
    net = make_net()
    run(net, dataset)
    images, labels, _ = dataset.batch(torch.arange(8))
    nn.functional.cross_entropy(net(images, forget=labels), labels).backward()
    assert all(p.grad.isfinite().all() for p in net.filter_parameters())


def test_a_given_initial_network_is_used_and_kept(dataset, make_net, make_model):
    net = make_net()
    initial = make_model().train()
    before = copy.deepcopy(initial.state_dict())
    result = run(net, dataset, initialised=initial)
    assert result.settings["initialised"] == "given by the caller"
    assert result.mean.zrf != run(net, dataset).mean.zrf
    assert all(torch.equal(before[name], t) for name, t in initial.state_dict().items())
    assert all(module.training for module in initial.modules())
    # The original network as its own newborn: no divergence.
    assert run(net, dataset, initialised=net.bake(None)).original.zrf == 1


def test_double_precision_and_autocast(dataset, make_net, make_model):
    net = make_net()
    full = run(net, dataset)
    half = run(net, dataset, amp_dtype=torch.bfloat16)
    assert half.settings["dtype"] == "bfloat16"
    assert half.mean.zrf == pytest.approx(full.mean.zrf, abs=0.02)
    double = run(wfnet.WFNet(make_model().double(), K), dataset, channels_last=True)
    assert double.settings["dtype"] == "float64"
    assert double.mean.acc_r == run(wfnet.WFNet(make_model(), K), dataset).mean.acc_r


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, K], {}, f"label {K}, but the network's {K} classes"),
        ([0, 1, 2], {}, "class 3 \\(and 3 more\\) has no image"),
        ([0, 1, 2], {"classes": [1, 4]}, "class 4 has no image"),
        ([0, 0], {"classes": [0]}, "all images of the data set are of class 0"),
        ([], {}, "data set is empty"),
        ([0, 1], {"classes": [0, K]}, f"class {K} in classes is out of range"),
        ([0, 1], {"classes": [-1]}, "class -1 in classes is out of range"),
        ([0, 1], {"classes": []}, "one or more integers"),
        ([0, 1], {"classes": [0.5]}, "one or more integers"),
        ([0, 1], {"classes": [0, 0]}, "each class once"),
        ([0, 1], {"classes": [0, 1], "batch_size": 0}, "batch_size"),
        ([0, 1], {"classes": [0, 1], "zrf_base": 1}, "zrf_base=1"),
        ([0, 1], {"classes": [0, 1], "retained_rows": 2}, "retained_rows must lie in 1 .. 1"),
        ([0, 1], {"classes": [0, 1], "retained_rows": 0}, "retained_rows must lie in 1 .. 1"),
        ([0, 1, 2, 3, 4, 5, 6], {"retained_rows": 1}, "without a retained image"),
    ],
)
def test_bad_input_is_one_clear_sentence(labels, options, message, make_net, make_dataset):
    labels = torch.tensor(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        run(make_net(), make_dataset(labels, classes=K + 1), **options)


def test_initialised_must_be_plain(make_net, make_dataset):
    net = make_net()
    with pytest.raises(ValueError, match="plain classifier"):
        run(net, make_dataset(range(K)), initialised=net)


def test_an_interrupted_evaluation_goes_on(dataset, tmp_path, monkeypatch, make_net):
    net, path = make_net(), tmp_path / "counts.safetensors"
    whole = run(net, dataset, batch_size=5)
    monkeypatch.setattr("wfnet.evaluation.partial._SAVE_EVERY", 0.0)
    read = []
    inner = TensorImages.batch

    def interrupt(self, indices):
        read.append(indices.tolist())
        if len(read) == 5:  # two for the digest of the data, then chunks of five images
            raise KeyboardInterrupt
        return inner(self, indices)

    monkeypatch.setattr(TensorImages, "batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(net, dataset, batch_size=5, records=path)
    first = len(read)
    resumed = run(net, dataset, batch_size=4, records=path)
    seen = [index for part in read[first + 1 :] for index in part]
    assert seen[0] == read[first - 1][0]  # the chunk that was interrupted, none before it
    assert seen[-1] == len(dataset) - 1
    for left, right in zip(resumed.records, whole.records, strict=True):
        assert left.acc_r == right.acc_r
        assert left.acc_f == right.acc_f
        assert left.zrf == pytest.approx(right.zrf, abs=1e-6)
    # What is finished is read again, not computed.
    before = len(read)
    assert run(net, dataset, records=path).records == resumed.records
    assert len(read) == before + 1
    with pytest.raises(ValueError, match="records of other filters"):
        run(make_net(seed=8), dataset, records=path)
    with pytest.raises(ValueError, match="records of other settings"):
        run(net, dataset, records=path, zrf_base=2)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="truncated"):
        run(net, dataset, records=path)


def test_zrf_modes_of_other_code(dataset, make_net):
    net = make_net()
    values = {}
    for mode in metrics.ZRF_MODES:
        result = run(net, dataset, zrf_mode=mode)
        assert result.settings["zrf_mode"] == mode
        values[mode] = result.mean.zrf
    assert 1 - values["elementwise_mean"] == pytest.approx((1 - values["definition"]) / K)
    assert len(set(values.values())) == 4
    with pytest.raises(ValueError, match="zrf_mode='other'"):
        run(net, dataset, zrf_mode="other")

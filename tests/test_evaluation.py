import copy
import csv
import json
import math
import random

import numpy as np
import pytest
import torch
from evaluated_networks import K, make_dataset, make_model, make_net, uneven_dataset
from torch import nn

import wfnet
from wfnet.data import TensorImages
from wfnet.evaluation import EvaluationResult, evaluate, metrics, reinitialise


@pytest.fixture
def dataset():
    return uneven_dataset()


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
def test_equals_one_pass_per_class_with_baked_networks(dataset, batch_size):
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


def test_fresh_filters_score_as_the_original(dataset):
    net = wfnet.WFNet(make_model(), K)
    result = run(net, dataset)
    for record in result.records:
        for name in ("acc_r", "acc_f", "acc_r_top5", "acc_f_top5"):
            assert getattr(record, name) == getattr(record, f"original_{name}")
        # Batches are composed differently, and fp32 sums may round differently.
        assert record.zrf == pytest.approx(record.original_zrf, abs=1e-6)
    assert result.mean.acc_r == result.original.acc_r


def test_images_are_sent_once_per_batch_and_rows_are_mixed(dataset, monkeypatch):
    net = make_net()
    sent, rows, read = [], [], []
    forward, batch = wfnet.WFNet.forward, TensorImages.batch

    def spy(self, images, forget=None, source=None):
        if forget is not None:
            sent.append((len(images), len(forget)))
            rows.append(len(forget.unique()))
            assert source.min() == 0
            assert source.max() == len(images) - 1
        return forward(self, images, forget, source)

    def spy_batch(self, indices):
        read.extend(indices.tolist())
        return batch(self, indices)

    monkeypatch.setattr(wfnet.WFNet, "forward", spy)
    monkeypatch.setattr(TensorImages, "batch", spy_batch)
    run(net, dataset, batch_size=2 * K)
    assert sum(pairs for _, pairs in sent) == K * len(dataset)
    assert all(images == 2 and pairs == 2 * K for images, pairs in sent[:-1])
    assert min(rows) == K
    assert read == list(range(len(dataset)))


def test_chosen_classes(dataset):
    net = make_net()
    everything = run(net, dataset)
    some = run(net, dataset, classes=[5, 2])
    assert [record.index for record in some.records] == [5, 2]
    for record in some.records:
        assert record.acc_r == everything.records[record.index].acc_r
        assert record.acc_f == everything.records[record.index].acc_f
        assert record.zrf == pytest.approx(everything.records[record.index].zrf, abs=1e-6)
    assert some.settings["classes"] == [5, 2]


def test_a_class_of_the_network_may_lack_images_if_it_is_not_asked_for():
    net = make_net()
    result = run(net, make_dataset([0, 0, 2, 3, 3]), classes=[0, 3])
    assert [record.n_retain for record in result.records] == [3, 3]


def test_retained_rows(dataset):
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


def test_retained_rows_with_chosen_classes(dataset):
    result = run(make_net(), dataset, classes=[1, 3, 4], retained_rows=2)
    own = int(sum((dataset.labels == c).sum() for c in (1, 3, 4)))
    assert result.settings["pairs"] == 2 * len(dataset) + own
    assert all(r.n_forget == int((dataset.labels == r.index).sum()) for r in result.records)


def test_the_model_and_the_random_state_stay_as_they_were(dataset):
    net = make_net()
    net.train()
    net.model[3].train()  # a caller's own choice
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    grads = [p.requires_grad for p in net.parameters()]
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    run(net, dataset, retained_rows=2)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == grads
    assert all(p.grad is None for p in net.parameters())


def test_the_mode_is_restored_after_an_error(dataset):
    net = make_net()
    net.train()
    with torch.no_grad():
        net.filter_parameters()[0][3].fill_(math.nan)
    with pytest.raises(FloatingPointError, match="filtered network are NaN or infinite"):
        run(net, dataset)
    assert net.training


def test_training_goes_on_after_an_evaluation(dataset):
    net = make_net()
    run(net, dataset)
    images, labels, _ = dataset.batch(torch.arange(8))
    nn.functional.cross_entropy(net(images, forget=labels), labels).backward()
    assert all(p.grad.isfinite().all() for p in net.filter_parameters())


def test_results_repeat_bit_by_bit(dataset):
    net = make_net()
    first, second = run(net, dataset), run(net, dataset)
    assert first.records == second.records
    assert first.mean == second.mean


def test_a_given_initial_network_is_used_and_kept(dataset):
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


def test_double_precision_and_autocast(dataset):
    net = make_net()
    full = run(net, dataset)
    half = run(net, dataset, amp_dtype=torch.bfloat16)
    assert half.settings["dtype"] == "bfloat16"
    assert half.mean.zrf == pytest.approx(full.mean.zrf, abs=0.02)
    double = run(wfnet.WFNet(make_model().double(), K), dataset, channels_last=True)
    assert double.settings["dtype"] == "float64"
    assert double.mean.acc_r == run(wfnet.WFNet(make_model(), K), dataset).mean.acc_r


def test_corrupt_images_are_left_out_and_counted(dataset):
    class Damaged(torch.utils.data.Dataset):
        labels, classes = dataset.labels, dataset.classes

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, index):
            if index in (3, 20):
                raise OSError("image file is truncated")
            return dataset[index]

    net = make_net()
    result = run(net, Damaged(), batch_size=8)
    kept = torch.tensor([i for i in range(len(dataset)) if i not in (3, 20)])
    expected = run(net, dataset.select(kept))
    assert result.settings["corrupt_images"] == 2
    assert result.settings["images"] == len(dataset) - 2
    assert torch.equal(result.counts.top1, expected.counts.top1)


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
        ([0, 1], {"classes": [0, 1], "initialised": make_model(5)}, "initialised gave outputs"),
        ([0, 1, 2, 3, 4, 5, 6], {"retained_rows": 1}, "without a retained image"),
    ],
)
def test_bad_input_is_one_clear_sentence(labels, options, message):
    labels = torch.tensor(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        run(make_net(), make_dataset(labels, classes=K + 1), **options)


def test_initialised_must_be_plain():
    net = make_net()
    with pytest.raises(ValueError, match="plain classifier"):
        run(net, make_dataset(range(K)), initialised=net)


def test_progress_goes_to_stderr_and_can_be_silent(dataset, capsys, monkeypatch):
    monkeypatch.setattr("wfnet.services.progress._LOG_SECONDS", 0.0)
    evaluate(make_net(), dataset, batch_size=8)
    output = capsys.readouterr()
    assert f"{K * len(dataset)}/{K * len(dataset)}" in output.err
    assert output.out == ""
    run(make_net(), dataset)
    assert capsys.readouterr().err == ""


# -- results in files and on the terminal ---------------------------------------------------------


def test_json_round_trip(dataset, tmp_path):
    result = run(make_net(), dataset, classes=[1, 2])
    result.to_json(tmp_path / "out" / "result.json")
    read = EvaluationResult.from_json(tmp_path / "out" / "result.json")
    assert read == result
    assert read.counts is None
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    assert content["zrf_base"] == math.e
    assert content["settings"]["images"] == len(dataset)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["result.json"]


def test_json_that_is_something_else(dataset, tmp_path):
    path = tmp_path / "result.json"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        EvaluationResult.from_json(path)
    run(make_net(), dataset).to_json(path)
    whole = path.read_text()
    for text in (whole[: len(whole) // 2], "[]", "{}", whole.replace('"format": 1', '"format": 9')):
        path.write_text(text)
        with pytest.raises(ValueError, match="damaged or not a result"):
            EvaluationResult.from_json(path)


def test_csv(dataset, tmp_path):
    result = run(make_net(), dataset, zrf_base=2)
    result.to_csv(tmp_path / "result.csv")
    with open(tmp_path / "result.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["class"] * K + ["mean", "original"]
    assert all(float(row["zrf_base"]) == 2 for row in rows)
    for row, record in zip(rows[:K], result.records, strict=True):
        assert (int(row["index"]), row["name"]) == (record.index, record.name)
        for name in ("acc_r", "acc_f", "acc_r_top5", "zrf", "original_acc_f"):
            assert float(row[name]) == getattr(record, name)
    assert float(rows[-2]["acc_r"]) == result.mean.acc_r
    assert float(rows[-1]["acc_r"]) == result.original.acc_r


def test_table_of_few_classes(dataset):
    result = run(make_net(), dataset)
    lines = result.table().splitlines()
    assert lines[0].split()[:2] == ["class", "images"]
    assert "Acc_r@5" in lines[0]
    assert len(lines) == 1 + 1 + K + 1 + 2 + 1
    assert lines[2].startswith("0 name0")
    assert f"{100 * result.records[0].acc_r:.2f}" in lines[2]
    assert f"{100 * result.mean.acc_f:.2f}" in lines[-3]
    assert "log base e" in lines[-1]
    assert max(map(len, lines)) <= 100


def test_table_of_many_classes_leaves_out_the_middle(dataset):
    small = run(make_net(), dataset)
    records = [
        type(r)(**{**r.__dict__, "index": i, "name": f"a very long class name, {i}, and more"})
        for i in range(1000)
        for r in (small.records[i % K],)
    ]
    result = EvaluationResult(records, small.mean, small.original, 2, {"num_classes": 1000}, 0.0)
    table = result.table()
    lines = table.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 110
    assert "... 980 more classes" in table
    assert "forgotten worst" in table
    assert "999 a very long class" in table
    assert "log base 2" in table


# -- the newly initialised network ----------------------------------------------------------------


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_independent_of_weights(model, seed=0):
    """Two models of one architecture with other weights become the same, and finite."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    a, b = state(reinitialise(model, seed)), state(reinitialise(other, seed))
    assert a.keys() == b.keys() == model.state_dict().keys()
    for name in a:
        assert a[name].isfinite().all(), name
        assert torch.equal(a[name], b[name]), name


def test_reinitialise_a_convolutional_network():
    model = make_model()
    before = state(model)
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    new = reinitialise(model, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(module.training for module in new.modules())
    assert not torch.equal(new[0].weight, model[0].weight)
    assert torch.equal(new[1].running_mean, torch.zeros(6))
    assert torch.equal(new[1].running_var, torch.ones(6))
    assert torch.equal(new[1].weight, torch.ones(6))
    assert not torch.equal(new[0].weight, reinitialise(model, seed=4)[0].weight)
    assert_independent_of_weights(model)


def test_reinitialise_is_what_a_new_network_would_be():
    layer = nn.Linear(5, 3)
    torch.manual_seed(11)
    fresh = nn.Linear(5, 3)
    new = reinitialise(layer, seed=11)
    assert torch.equal(new.weight, fresh.weight)
    assert torch.equal(new.bias, fresh.bias)


def test_reinitialise_removes_filters():
    net = make_net()
    new = reinitialise(net)
    assert not any("alpha" in name for name in new.state_dict())
    assert not any(isinstance(m, wfnet.layers.MaskedLayer) for m in new.modules())
    assert all(
        torch.equal(t, state(reinitialise(net.bake(None)))[n]) for n, t in state(new).items()
    )
    with torch.no_grad():
        logits = new(torch.rand(2, 1, 8, 8))
    assert logits.shape == (2, K)


class Raw(nn.Module):
    """Parameters that no module resets."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.full((1, 1, 64), 9.0))
        self.layer_scale = nn.Parameter(torch.full((64, 1, 1), 9.0))
        self.temperature = nn.Parameter(torch.arange(1.0, 65.0))
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(x)


def test_reinitialise_raw_parameters(caplog):
    model = Raw()
    new = reinitialise(model)
    assert new.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(new.layer_scale, torch.full((64, 1, 1), 1e-6))
    assert not torch.equal(new.temperature, model.temperature)
    assert torch.equal(new.temperature.sort().values, model.temperature)
    assert "temperature" in caplog.text


def test_reinitialise_uses_the_model_s_own_initialisation():
    class Own(Raw):
        def init_weights(self, mode=""):
            nn.init.constant_(self.temperature, 2)
            nn.init.zeros_(self.head.bias)

    new = reinitialise(Own())
    assert torch.equal(new.temperature, torch.full((64,), 2.0))
    assert torch.equal(new.head.bias, torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "init_values": 1e-4}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (2, 4), "embed_dim": 16,
                                          "img_size": 56}),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    ],
)  # fmt: skip
def test_reinitialise_timm_networks(name, options, caplog):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5, **options)
    assert_independent_of_weights(model)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_reinitialise_torchvision_networks(name, caplog):
    models = pytest.importorskip("torchvision.models")
    assert_independent_of_weights(models.get_model(name, weights=None, num_classes=5))
    assert caplog.text == ""


def test_an_interrupted_evaluation_goes_on(dataset, tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match="records of another filters"):
        run(make_net(seed=8), dataset, records=path)
    with pytest.raises(ValueError, match="records of another settings"):
        run(net, dataset, records=path, zrf_base=2)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="truncated"):
        run(net, dataset, records=path)


def test_zrf_modes_of_other_code(dataset):
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

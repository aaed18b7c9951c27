"""Trust checks: attacks do what their formulas say; the runner loses and changes nothing."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import wfnet
from wfnet import trust
from wfnet.data import Splits
from wfnet.data.tensor_images import TensorImages
from wfnet.trust import closeness, collateral, membership, probing, removal
from wfnet.trust import relearn as relearning
from wfnet.trust import runner as running
from wfnet.trust.subject import ImageReader, Sample, Subject, TrustSettings

pytest.importorskip("sklearn")

CLASSES, SIDE = 4, 8
LAYERS = ("conv1", "conv2")
QUICK = TrustSettings(samples=24, relearn_steps=2, relearn_images=(1, 3))


class Network(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def make_network(seed, norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Network(norm)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
        return model.eval()


def make_images(per_class, seed):
    """Classes are bright in one quarter each: easily learned."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat_interleave(per_class)
    images = torch.rand(len(labels), 1, SIDE, SIDE, generator=generator) * 0.5
    for i, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        images[i, 0, top : top + 4, left : left + 4] += 0.5
    return TensorImages(images, labels, [f"quarter {k}" for k in range(CLASSES)])


@pytest.fixture(scope="module")
def data():
    train, test = make_images(8, 0), make_images(5, 1)
    return Splits(train, test, test, train.classes, "quarters", 0)


def make_subject(data, label=1, retrained=(), **models):
    train, test = (ImageReader(part, 100) for part in (data.train, data.test))
    return Subject(
        label=label,
        num_classes=CLASSES,
        forgetful=models.get("forgetful", make_network(1)),
        original=models.get("original", make_network(0)),
        retrained=retrained,
        train_forget=train.of(label),
        train_retain=train.without(label),
        test_forget=test.of(label),
        test_retain=test.without(label),
        layers=LAYERS,
        reader=test,
        settings=QUICK,
    )


def state(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return values, flags, [m.training for m in model.modules()]


def assert_same(model, before):
    values, flags, modes = before
    now = model.state_dict()
    assert now.keys() == values.keys()
    assert all(torch.equal(now[name], values[name]) for name in values)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes


# -- samples --------------------------------------------------------------------------------------


def test_samples_are_bounded_repeatable_and_of_the_classes_asked_for(data):
    reader = ImageReader(data.train, 5, seed=3)
    own, rest = reader.of(2), reader.without(2)
    assert own.labels.tolist() == [2] * 5
    assert len(rest) <= 5
    assert 2 not in rest.labels
    again = ImageReader(data.train, 5, seed=3).of(2)
    assert torch.equal(own.images, again.images)
    assert not torch.equal(own.images, ImageReader(data.train, 5, seed=4).of(2).images)
    assert set(ImageReader(data.train, 99).without(0, 3).labels.tolist()) == {1, 2}
    with pytest.raises(ValueError, match="no image of class 9"):
        reader.of(9)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        ImageReader(data.train, 0)


@pytest.mark.parametrize(
    ("change", "part"),
    [({"samples": 1}, "samples must"), ({"relearn_steps": 0}, "relearn_steps must"),
     ({"relearn_images": ()}, "relearn_images must"), ({"relearn_images": (0,)}, "relearn_images")],
)  # fmt: skip
def test_settings_that_make_no_sense(change, part):
    with pytest.raises(ValueError, match=part):
        TrustSettings(**change)


# -- membership -----------------------------------------------------------------------------------


def test_area_under_the_curve_is_that_of_sklearn():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, 1.0, -2.0):
        positive = torch.randn(17, generator=generator).add(shift).round(decimals=1).double()
        negative = torch.randn(23, generator=generator).round(decimals=1).double()
        truth = [1] * 17 + [0] * 23
        expected = roc_auc_score(truth, torch.cat((positive, negative)))
        assert membership.roc_auc(positive, negative) == pytest.approx(expected, abs=1e-12)
    assert membership.roc_auc(torch.ones(3), torch.ones(4)) == 0.5


def test_standard_error_of_the_area_is_that_of_repeated_draws():
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2000):
        positive, negative = torch.randn(2, 30, generator=generator)
        found.append(membership.roc_auc(positive + 0.5, negative))
    spread = torch.tensor(found).std().item()
    mean = sum(found) / len(found)
    assert membership.auc_error(mean, 30, 30) == pytest.approx(spread, rel=0.1)


def test_confidence_is_the_logit_of_the_probability():
    logits = torch.tensor([[2.0, -1.0, 0.5], [200.0, 0.0, 0.0]], dtype=torch.float64)
    p = torch.softmax(logits, 1)[0, 0]
    found = membership.confidence(logits, 0)
    assert found[0].item() == pytest.approx(torch.log(p / (1 - p)).item())
    assert found[1].item() == pytest.approx(200 - math.log(2))  # where 1 - p would be 0


def test_true_positives_at_a_bounded_false_positive_rate():
    positive = torch.tensor([5.0, 6.0, 0.5, 2.0])
    negative = torch.arange(10.0)  # one of ten may be above the threshold: 9, so it is 8
    assert membership.true_positives(positive, negative, 0.1) == 0.0
    assert membership.true_positives(positive + 5, negative, 0.1) == 0.5


def test_an_overconfident_member_is_found_and_one_more_retrained_model_is_not(data):
    class Constant(nn.Module):
        """log-odds of class 1: `level` for each image, and the image's own hardness."""

        def __init__(self, level, seed):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.level, self.seed = level, seed

        def forward(self, x):
            logits = torch.zeros(len(x), CLASSES)
            hard = 10 * x.mean((1, 2, 3))
            noise = 0.1 * torch.randn(len(x), generator=torch.Generator().manual_seed(self.seed))
            logits[:, 1] = self.level + hard + noise
            return logits + 0 * self.weight

    retrained = [Constant(-5.0, seed) for seed in (1, 2, 3)]
    subject = make_subject(data, retrained=retrained)
    alike = membership.measure(Constant(-5.0, 4), subject, retrained)["values"]
    knows = membership.measure(Constant(-3.0, 4), subject, retrained)["values"]
    over = membership.measure(Constant(-9.0, 4), subject, retrained)["values"]
    assert 0.2 < alike["lira_auc"] < 0.8
    assert knows["lira_auc"] == 1.0
    assert over["lira_auc"] == 0.0
    with_one = membership.measure(retrained[0], subject, retrained[1:2])["values"]
    assert "lira_auc" not in with_one
    assert "auc_calibrated" in with_one
    assert "auc_calibrated" not in membership.measure(retrained[0], subject, [])["values"]


# -- probes ---------------------------------------------------------------------------------------


def test_probe_separates_what_can_be_separated():
    rng = np.random.default_rng(0)
    wanted, truth = np.arange(60) % 3 == 0, np.arange(40) % 4 == 0
    train, test = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    train[wanted, 2] += 20
    test[truth, 2] += 20
    assert probing.probe(train, wanted, test, truth, 0) == 1.0
    assert probing.probe(1e-6 * train, wanted, 1e-6 * test, truth, 0) == 1.0  # small gates
    blank = probing.probe(np.zeros((60, 5)), wanted, np.zeros((40, 5)), truth, 0)
    assert blank == 0.5  # nothing to be read from pruned features


@pytest.mark.parametrize(
    ("shape", "width"),
    [((2, 16, 9, 7), 16 * 8 * 7), ((2, 2048, 4, 4), 2048), ((2, 49, 96), 10 * 96), ((2, 33), 33)],
)
def test_features_are_pooled_to_a_bounded_width(shape, width):
    features = torch.randn(shape)
    found = probing.pooled(features)
    assert found.shape == (2, width)
    if len(shape) == 4 and width == 2048:
        torch.testing.assert_close(found, features.mean((2, 3)))


def test_features_of_layers_and_of_the_head(data):
    model = make_network(0)
    images = data.test.images[:6]
    found = probing.layer_features(model, LAYERS, images)
    assert list(found) == [*LAYERS, probing.HEAD]
    hidden = model.bn2(model.conv2(model.bn1(model.conv1(images)).relu())).relu().mean((2, 3))
    np.testing.assert_allclose(found[probing.HEAD], hidden.detach().numpy(), rtol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_features_of_windows_belong_to_their_images():
    class Windows(nn.Module):
        """Halves of the image as windows [2 B, 4, 8], as a window transformer has them."""

        def __init__(self):
            super().__init__()
            self.qkv, self.never, self.fc = nn.Linear(8, 6), nn.Linear(8, 8), nn.Linear(6, 3)

        def forward(self, x):
            self.qkv(torch.zeros(len(x), 8))  # a first run
            y = self.qkv(x.reshape(-1, 4, 8))
            return self.fc(y.reshape(len(x), 8, 6).mean(1))

    model = Windows()
    images = torch.randn(300, 1, 8, 8)  # more than one batch
    found = probing.layer_features(model, ["qkv", "never"], images)
    assert list(found) == ["qkv", probing.HEAD]
    expected = model.qkv(images.reshape(300, 8, 8)).mT.flatten(1).detach()
    np.testing.assert_allclose(found["qkv"], expected.numpy(), rtol=1e-4, atol=1e-6)


def test_probes_are_reported_by_layer(data):
    subject = make_subject(data)
    found = probing.measure(subject.forgetful, subject, [])
    layers = found["details"]["layers"]
    assert list(layers) == [*LAYERS, probing.HEAD]
    assert layers["conv1"] > 0.9  # quarters of the image are plain to see
    assert found["values"]["probe_best"] == max(layers.values())
    assert found["values"]["probe_last"] == layers[probing.HEAD]


# -- removal --------------------------------------------------------------------------------------


def closed(model, factor):
    """A copy whose rows 0 and 3 of conv1 are scaled by ``factor``."""
    changed = make_network(0)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.conv1.weight[[0, 3]] *= factor
    return changed


def test_batchnorm_estimated_anew_undoes_any_gate_but_zero(data):
    base = make_network(0)
    images = data.train.images
    wanted = removal.reestimated(base, images)(data.test.images)
    # Small variances meet eps: the scale must stay well above sqrt(eps).
    found = removal.reestimated(closed(base, 0.2), images)(data.test.images)
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    zero = removal.reestimated(closed(base, 0.0), images)(data.test.images)
    assert (zero - wanted).abs().max() > 0.05
    assert removal.reestimated(make_network(0, norm=False), images) is None


def test_estimated_statistics_are_those_of_the_images(data):
    model = make_network(0)
    images = data.train.images
    found = removal.reestimated(model, images)
    features = model.conv1(images)
    torch.testing.assert_close(found.bn1.running_mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(found.bn1.running_var, features.var((0, 2, 3)))
    assert not found.training


def test_rows_are_recognised_as_multiples_of_the_base():
    base = make_network(0)
    rows = removal.rows_against_base(closed(base, 0.05), base, LAYERS)
    assert rows["rows"] == 14
    assert rows["zero_rows"] == 0
    assert rows["multiples"] == 1.0
    assert rows["closed"] == pytest.approx(2 / 14)
    assert rows["median_ratio"] == pytest.approx(1.0)
    assert removal.rows_against_base(closed(base, 0.0), base, LAYERS)["zero_rows"] == 2
    assert removal.rows_against_base(make_network(5), base, LAYERS)["multiples"] == 0.0


def test_base_norms_restore_everything_but_zeros():
    base = make_network(0)
    restored = removal.with_base_norms(closed(base, 0.05), base, LAYERS)
    torch.testing.assert_close(restored.conv1.weight, base.conv1.weight)
    torch.testing.assert_close(restored.conv2.bias, base.conv2.bias)
    zero = removal.with_base_norms(closed(base, 0.0), base, LAYERS)
    assert not zero.conv1.weight[[0, 3]].any()


def test_equalised_rows_have_the_median_norm():
    model = closed(make_network(0), 0.0)
    found = removal.equalised(model, LAYERS)
    norms = found.conv1.weight.flatten(1).norm(dim=1)
    kept = [1, 2, 4, 5]
    expected = model.conv1.weight[kept].flatten(1).norm(dim=1).median()
    torch.testing.assert_close(norms[kept], expected.expand(4))
    assert not norms[[0, 3]].any()


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9, 1.0])
def test_offset_predicts_the_class_as_often_as_asked(share):
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)).double()
    offset = removal.class_offset(logits, 2, share)
    logits[:, 2] += offset
    assert (logits.argmax(1) == 2).sum() == round(40 * share)


def test_a_class_that_is_voted_down_at_the_output_comes_back(data):
    class Oracle(Network):
        """Knows every class; the logit of class 1 is lowered by 100."""

        def forward(self, x):
            quarters = nn.functional.avg_pool2d(x, 4).flatten(1)
            return 10 * quarters - 100 * torch.eye(CLASSES)[1] + 0 * super().forward(x)

    model = Oracle().eval()
    subject = make_subject(data, forgetful=model)
    found = removal.measure(model, subject, [])["values"]
    assert found["acc_f"] == 0.0
    assert found["acc_f_batchnorm_all"] == 0.0
    assert found["acc_f_offset"] == found["acc_f_standardised"] == found["auc_logit"] == 1.0
    assert found["acc_f_recovered"] == 1.0


def test_removal_reports_every_attack_that_applies(data):
    subject = make_subject(data, forgetful=closed(make_network(0), 0.05))
    found = removal.measure(subject.forgetful, subject, [])
    assert set(found["values"]) == set(removal.MEASURES)
    assert found["details"]["rows"]["multiples"] == 1.0
    level = removal.measure(subject.original, subject, [])["values"]
    assert "acc_f_base_norms" not in level
    plain = make_subject(data, forgetful=make_network(0, norm=False))
    plain.original = make_network(2, norm=False)
    without = removal.measure(plain.forgetful, plain, [])["values"]
    assert not [name for name in without if "batchnorm" in name]
    assert without["acc_f_recovered"] >= without["acc_f"]


# -- collateral damage and closeness --------------------------------------------------------------


def test_nearest_classes_by_confusion():
    logits = torch.tensor([[5.0, 9.0, 4.0, 1.0, 3.0]]).repeat(6, 1)
    assert collateral.nearest_by_confusion(logits, 1, 2) == [0, 2]
    assert collateral.nearest_by_confusion(logits[:, :2], 1, 3) == [0]


def test_nearest_classes_by_features_are_those_of_near_means(data):
    subject = make_subject(data, label=0)
    found = collateral.nearest_by_features(subject, 3)
    features = probing.layer_features(subject.original, (), subject.train_retain.images)
    own = probing.layer_features(subject.original, (), subject.train_forget.images)
    mean = own[probing.HEAD].mean(0)
    distance = {
        k: np.linalg.norm(
            features[probing.HEAD][(subject.train_retain.labels == k).numpy()].mean(0) - mean
        )
        for k in (1, 2, 3)
    }
    assert found == sorted(distance, key=distance.get)


def test_collateral_accuracies_are_of_the_right_images(data):
    subject = make_subject(data)
    found = collateral.measure(subject.forgetful, subject, [])
    by_class = found["details"]["accuracy_by_class"]["confusion"]
    assert set(by_class) == {"0", "2", "3"}
    logits = subject.forgetful(data.test.images)
    for k, value in by_class.items():
        own = data.test.labels == int(k)
        assert value == (logits[own].argmax(1) == int(k)).double().mean().item()
    assert found["values"]["acc_worst"] == min(by_class.values())
    assert found["values"]["acc_nearest_confusion"] == pytest.approx(sum(by_class.values()) / 3)


def test_distances_between_distributions():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    same = closeness.distances(logits, logits + 3)
    assert same["kl"] == pytest.approx(0, abs=1e-12)
    assert same["tv"] == pytest.approx(0, abs=1e-6)
    assert same["agreement"] == 1.0
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    found = closeness.distances(p.log(), q.log())
    assert found["kl"] == pytest.approx(math.log(2))
    assert found["tv"] == pytest.approx(0.5)
    m = (p + q) / 2
    expected = 0.5 * (0.5 * torch.log(p / m)[0, :2]).sum() + 0.5 * (q * (q / m).log()).sum()
    assert found["js"] == pytest.approx(expected.item())


def test_closeness_needs_retrained_models(data):
    subject = make_subject(data)
    assert closeness.measure(subject.forgetful, subject, [])["values"] == {}
    found = closeness.measure(subject.forgetful, subject, [subject.forgetful, make_network(7)])
    alone = closeness.measure(subject.forgetful, subject, [make_network(7)])
    assert set(found["values"]) == set(closeness.MEASURES)
    assert found["values"]["kl_forget"] == pytest.approx(alone["values"]["kl_forget"] / 2)


# -- relearning -----------------------------------------------------------------------------------


def test_relearning_uses_the_images_that_it_says(data, monkeypatch):
    seen = []

    def spy(model, train, images, label, original, config):
        seen.append((train.labels.tolist(), len(images), label, config.max_epochs))
        return relearn(model, train, images, label, original, config)

    relearn = relearning.relearn
    monkeypatch.setattr(relearning, "relearn", spy)
    subject = make_subject(data)
    found = relearning.measure(subject.forgetful, subject, [])
    retain, one, three = seen
    assert 1 not in retain[0]
    assert one[0].count(1) == 1
    assert len(one[0]) == 10
    assert three[0].count(1) == 3
    assert all(images == 5 and label == 1 and epochs == 2 for _, images, label, epochs in seen)
    assert list(found["values"]) == ["acc_f_retain_only", "acc_f_from_1", "acc_f_from_3"]
    for name, course in found["details"]["course"].items():
        assert found["values"][f"acc_f_{name}"] == max(course)
    assert "10 of its images" in relearning.describe("acc_f_from_10")


# -- the runner -----------------------------------------------------------------------------------


def run(data, folder=None, classes=(0, 2), retrained=2, checks=None, **more):
    base = make_network(0)
    net = wfnet.WFNet(base, CLASSES)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for alpha in net.filter_parameters():
            alpha.copy_(3 * torch.randn(alpha.shape, generator=generator))
    models = [make_network(10 + i) for i in range(retrained)]
    more.setdefault("settings", QUICK)
    return trust.run_checks(
        net.bake, net.bake(None), data, LAYERS, classes, checks, lambda label: models,
        folder=folder, progress=False, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trust")
    return folder, run(data, folder)


def without_seconds(result):
    return [{**r.__dict__, "seconds": 0} for r in result.records]


def test_every_check_for_every_class(finished):
    folder, result = finished
    pairs = [(record.index, record.check) for record in result.records]
    assert pairs == [(k, check) for k in (0, 2) for check in trust.CHECKS]
    for record in result.records:
        module = trust.CHECKS[record.check]
        assert set(module.MEASURES) <= set(record.forgetful)
        assert all(0 <= v <= 1 or "kl" in k for k, v in record.forgetful.items())
        assert module.HEADLINE in record.forgetful
        assert record.retrained_models == 2
        assert ("original" in module.REFERENCES) == bool(record.original)
    again = trust.TrustResult.from_json(folder / "trust.json")
    assert again.records == result.records
    assert not (folder / "trust.partial.jsonl").exists()


def test_means_distances_and_the_csv(finished):
    folder, result = finished
    rows = list(csv.DictReader((folder / "trust.csv").open()))
    for row in rows:
        if row["distance"]:
            gap = float(row["forgetful"]) - float(row["retrained"])
            assert float(row["distance"]) == pytest.approx(gap)
    values = [float(r["forgetful"]) for r in rows if r["measure"] == "js_forget"]
    mean = result.means()["closeness"]["js_forget"]
    assert len(values) == 2
    assert mean["forgetful"] == pytest.approx(sum(values) / 2)
    assert mean["classes"] == 2
    assert (
        json.loads((folder / "trust.json").read_text())["means"]["closeness"]["js_forget"] == mean
    )
    table = result.table()
    assert f"{mean['forgetful']:.3f}" in table
    assert closeness.QUESTION in table


def test_an_interrupted_run_goes_on_and_ends_the_same(data, tmp_path, finished, monkeypatch):
    calls = []
    work = running._run_check

    def stop(name, subject, *rest):
        calls.append((subject.label, name))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return work(name, subject, *rest)

    monkeypatch.setattr(running, "_run_check", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path)
    assert not (tmp_path / "trust.json").exists()
    journal = tmp_path / "trust.partial.jsonl"
    journal.write_text(journal.read_text() + '{"index": 0, "na')  # died while writing
    result = run(data, tmp_path)
    assert len(calls) == 4 + len(finished[1].records) - 3
    assert calls.count((0, "membership")) == 1
    assert without_seconds(result) == without_seconds(finished[1])


def test_a_second_run_computes_nothing_and_adds_classes(data, tmp_path, monkeypatch):
    checks = ["membership", "closeness"]
    first = run(data, tmp_path, classes=[0], checks=checks)
    calls = []
    work = running._run_check
    monkeypatch.setattr(running, "_run_check", lambda *a: calls.append(a[1].label) or work(*a))
    run(data, tmp_path, classes=[0], checks=checks)
    assert calls == []
    both = run(data, tmp_path, classes=[3], checks=checks)
    assert calls == [3, 3]
    assert [r.index for r in both.records] == [0, 0, 3, 3]
    assert both.records[:2] == first.records
    other = TrustSettings(samples=20, relearn_steps=2)
    alone = run(data, tmp_path, classes=[1], checks=checks, settings=other)
    assert [r.index for r in alone.records] == [1, 1]  # of other settings: not mixed


def test_other_retrained_models_are_other_work(data, tmp_path):
    checks = ["closeness"]
    without = run(data, tmp_path, retrained=0, checks=checks)
    having = run(data, tmp_path, retrained=1, checks=checks)
    assert without.records[0].forgetful == {}
    assert having.records[0].forgetful


def test_no_model_is_changed_and_neither_is_the_random_state(data):
    base = make_network(0)
    net = wfnet.WFNet(base, CLASSES)
    forgetful, original, other = net.bake(1), net.bake(None), make_network(9)
    before = [state(model) for model in (net, forgetful, original, other)]
    random = torch.get_rng_state()
    trust.run_checks(
        lambda label: forgetful, original, data, LAYERS, [1], None, lambda label: [other],
        QUICK, progress=False,
    )  # fmt: skip
    for model, was in zip((net, forgetful, original, other), before, strict=True):
        assert_same(model, was)
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_missing_is_said(data):
    result = run(data, classes=[2], retrained=0, advice=lambda label: f"make one for {label}")
    sentences = result.missing()
    assert len(sentences) == len(trust.CHECKS)
    assert all("make one for 2" in sentence for sentence in sentences)
    assert any(sentence.startswith("Closeness") for sentence in sentences)
    enough = run(data, classes=[2], retrained=2)
    assert enough.missing() == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [({"checks": ["magic"]}, "there is no check 'magic'"), ({"classes": [4]}, "class 4 is out of"),
     ({"classes": []}, "at least one check and one class")],
)  # fmt: skip
def test_a_wrong_request_is_refused(data, arguments, part):
    with pytest.raises(ValueError, match=part):
        run(data, **arguments)


def test_images_with_several_labels_are_refused(data):
    several = make_images(2, 0)
    several.multi_hot = torch.ones(len(several), CLASSES, dtype=torch.bool)
    with pytest.raises(ValueError, match="several labels per image"):
        run(Splits(several, several, several, several.classes, "several", 0))


def test_a_damaged_result_is_named(data, tmp_path):
    (tmp_path / "trust.json").write_text('{"format": 1, "records": [{}]}')
    with pytest.raises(ValueError, match="is damaged or not a result of wfnet's trust checks"):
        run(data, tmp_path)
    with pytest.raises(FileNotFoundError, match="`wfnet trust` writes such a file"):
        trust.TrustResult.from_json(tmp_path / "nothing.json")


def test_nan_is_an_error_and_no_number(data):
    broken = make_network(0)
    with torch.no_grad():
        broken.fc.bias[0] = math.nan
    subject = make_subject(data, forgetful=broken)
    with pytest.raises(FloatingPointError, match="gives NaN"):
        membership.measure(broken, subject, [])


def test_samples_can_be_joined():
    first = Sample(torch.zeros(2, 1, 2, 2), torch.tensor([0, 0]))
    both = first.with_others(Sample(torch.ones(1, 1, 2, 2), torch.tensor([3])))
    assert both.labels.tolist() == [0, 0, 3]
    assert both.only(torch.tensor([2])).images.eq(1).all()

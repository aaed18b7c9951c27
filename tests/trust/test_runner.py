"""The runner loses nothing and changes nothing."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import average_precision_score

import wfnet
from wfnet import trust
from wfnet.data import MultiLabelTensors, Splits
from wfnet.services.files import fingerprint
from wfnet.trust import runner
from wfnet.trust.subject import ImageReader, predict

TWO = ["membership", "closeness"]


def without_seconds(result):
    return [{**r.__dict__, "seconds": 0} for r in result.records]


@pytest.fixture(scope="module")
def run(data, make_network, quick):
    net = wfnet.WFNet(make_network(0), 4)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for alpha in net.filter_parameters():
            alpha.copy_(3 * torch.randn(alpha.shape, generator=generator))

    def run_checks(folder=None, classes=(0, 2), retrained=2, checks=None, extra=(), **more):
        models = [make_network(10 + i) for i in range(retrained)] + list(extra)
        more = {"settings": quick, "folder": folder, "progress": False, **more}
        about = net.bake, net.bake(None), data, ("conv1", "conv2"), classes, checks
        return trust.run_checks(*about, lambda label: models, **more)

    return run_checks


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trust")
    return folder, run(folder)


@pytest.fixture
def calls(monkeypatch):
    """The (class, check) pairs that are measured."""
    seen, work = [], runner._run_check

    def spy(check, subject, *rest):
        seen.append((subject.label, check.name))
        return work(check, subject, *rest)

    monkeypatch.setattr(runner, "_run_check", spy)
    return seen


def test_every_check_for_every_class(finished):
    folder, result = finished
    pairs = [(record.index, record.check) for record in result.records]
    assert pairs == [(k, check) for k in (0, 2) for check in trust.CHECKS]
    for record in result.records:
        check = trust.CHECKS[record.check]
        assert set(check.measures) <= set(record.forgetful)
        unbounded = "kl", "cka"
        assert all(0 <= v <= 1 or k.startswith(unbounded) for k, v in record.forgetful.items())
        assert not set(record.forgetful) & {check.meaning(name) for name in record.forgetful}
        assert check.headline in record.forgetful
        assert record.retrained_models == 2
        assert check.original == bool(record.original)
        for trivial in (record.logit_masked, record.bias_shifted, record.also_masked):
            assert set(trivial) == set(record.forgetful)
            assert trivial.get("acc_f", 0.0) == 0.0
    assert result.settings["attackers_images"] == "classes in the proportion of the training part"
    assert trust.TrustResult.from_json(folder / "trust.json").records == result.records
    assert not (folder / "trust.partial.json").exists()
    assert result.missing() == []


def test_an_interrupted_run_goes_on_and_ends_the_same(run, tmp_path, finished, calls):
    def stop(label):
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, advice=stop)
    assert not (tmp_path / "trust.json").exists()
    result = run(tmp_path)
    assert len(calls) == len(finished[1].records)
    assert without_seconds(result) == without_seconds(finished[1])


def test_a_second_run_computes_nothing_and_adds_classes(run, tmp_path, calls, monkeypatch):
    first = run(tmp_path, classes=[0], checks=TWO)
    calls.clear()
    run(tmp_path, classes=[0], checks=TWO)
    assert calls == []
    both = run(tmp_path, classes=[3], checks=TWO)
    assert {label for label, _ in calls} == {3}
    assert [r.index for r in both.records] == [0, 0, 3, 3]
    assert both.records[:2] == first.records
    without = run(tmp_path, classes=[0], checks=TWO, retrained=0)  # other models are other work
    assert without.records[1].forgetful == {}
    monkeypatch.setattr(runner, "code_digest", lambda modules: "of another formula")
    again = run(tmp_path, classes=[0], checks=TWO)
    assert calls[-2:] == [(0, "membership"), (0, "closeness")]
    assert [r.index for r in again.records] == [0, 0]  # what is older is not shown beside it
    alone = run(tmp_path, classes=[1], checks=TWO, settings=trust.TrustSettings(samples=20))
    assert [r.index for r in alone.records] == [1, 1]  # of other settings: not mixed


def test_no_model_is_changed_and_neither_is_the_random_state(run, make_network):
    def state(model):
        flags = [(p.requires_grad, p.grad) for p in model.parameters()]
        return fingerprint(model), flags, [m.training for m in model.modules()]

    model, random = make_network(9), torch.get_rng_state()
    before = state(model)
    result = run(classes=[1], retrained=0, extra=[model], advice=lambda label: f"make {label}")
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    sentences = result.missing()  # one more would be needed
    assert 0 < len(sentences) <= len(trust.CHECKS)
    assert all("make 1" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("request_", "part"),
    [({"checks": ["magic"]}, "magic"), ({"classes": [4]}, "range"), ({"classes": []}, "one class")],
)
def test_a_wrong_request_is_refused(run, request_, part):
    with pytest.raises(ValueError, match=part):
        run(**request_)


def test_a_head_without_bias_leaves_a_column_empty_and_says_so_once(
    data, make_network, quick, caplog
):
    def make(seed):
        model = make_network(seed)
        model.fc = torch.nn.Linear(8, 4, bias=False)
        return model

    about = make, make(0), data, ("conv1", "conv2"), (0, 2), ["collateral"]
    result = trust.run_checks(*about, settings=quick, progress=False)
    assert [record.bias_shifted for record in result.records] == [{}, {}]
    assert sum("lowers a bias of the head" in message for message in caplog.messages) == 1


def test_classes_forgotten_together_are_each_checked(run, tmp_path):
    """Of a pair, images of both are no test of what was kept."""
    result = run(tmp_path, classes=[2, (0, 2)], checks=["removal"], retrained=1)
    names = ["quarter 2", "quarter 0 (with quarter 2)", "quarter 2 (with quarter 0)"]
    assert [record.name for record in result.records] == names
    single, *pair = result.records
    assert pair[0].forgetful["acc_r"] == pair[1].forgetful["acc_r"] != single.forgetful["acc_r"]
    assert [record.logit_masked["acc_f"] for record in result.records] == [0.0] * 3
    assert result.sizes == [1, 2]
    assert result.means()["removal"]["acc_f"]["forgetful"] == single.forgetful["acc_f"]
    both = sum(record.forgetful["acc_f"] for record in pair) / 2
    assert result.means(2)["removal"]["acc_f"]["forgetful"] == both
    assert "2 classes forgotten together" in result.table()
    with pytest.raises(ValueError, match="no image of other classes"):
        run(classes=[(0, 1, 2, 3)])


@pytest.fixture
def several():
    """Images with one to three of four labels."""
    generator = torch.Generator().manual_seed(0)
    multi_hot = torch.rand(60, 4, generator=generator) < 0.4
    multi_hot[:, 3] = ~multi_hot[:, :3].any(1)
    images = torch.rand(60, 1, 8, 8, generator=generator)
    images += multi_hot.float()[:, :, None].repeat(1, 1, 16).reshape(60, 1, 8, 8)
    images = MultiLabelTensors(images, multi_hot, list("abcd"))
    return Splits(images, images, images, images.classes, "several", 0)


@pytest.mark.parametrize("samples", [100, 15])
def test_several_labels_are_judged_by_average_precision(several, make_network, quick, samples):
    original, forgetful = make_network(0), make_network(1)
    settings = replace(quick, samples=samples)
    about = original, several, ("conv1", "conv2"), [1], None, lambda label: [make_network(2)]
    result = trust.run_checks(lambda label: forgetful, *about, settings, progress=False)
    known = [check.name for check in trust.CHECKS.values() if check.several_labels]
    assert [record.check for record in result.records] == known
    assert len(known) == len(trust.CHECKS) - 3
    found = {record.check: record for record in result.records}
    values, truth = found["removal"].forgetful, several.test.multi_hot
    reader = ImageReader(several.test, samples)
    parts = reader.of(1), reader.without(1)
    drawn = torch.cat([part.labels for part in parts])
    own = drawn[:, 1].double().mean()
    share = truth[:, 1].double().mean()
    weights = torch.where(drawn[:, 1], share / own, (1 - share) / (1 - own))
    logits = predict(forgetful, torch.cat([part.images for part in parts]))
    precision = [
        average_precision_score(drawn[:, k], logits[:, k].float(), sample_weight=weights)
        for k in range(4)
    ]
    assert values["ap_f"] == pytest.approx(precision[1])
    assert values["ap_r"] == pytest.approx(sum(precision[:1] + precision[2:]) / 3)
    assert found["removal"].logit_masked["ap_f"] == pytest.approx(share.item())
    assert found["removal"].bias_shifted["ap_f"] == found["removal"].original["ap_f"]
    assert not {"ap_f_offset", "ap_f_standardised", "acc_f"} & set(values)
    assert {"ap_f_head", "ap_f_head_1"} <= set(found["prototypes"].forgetful)
    assert found["relearning"].forgetful["ap_f_from_3"] >= values["ap_f"]
    assert found["removal"].forgetful.keys() >= {"ap_f_batchnorm_all", "ap_f_recovered"}

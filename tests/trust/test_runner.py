"""The runner loses nothing and changes nothing."""

import json

import pytest
import torch

import wfnet
from wfnet import trust
from wfnet.trust import runner
from wfnet.trust.subject import TrustSettings


@pytest.fixture(scope="module")
def run(data, make_network, quick):
    def run_checks(folder=None, classes=(0, 2), retrained=2, checks=None, **more):
        net = wfnet.WFNet(make_network(0), 4)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for alpha in net.filter_parameters():
                alpha.copy_(3 * torch.randn(alpha.shape, generator=generator))
        models = [make_network(10 + i) for i in range(retrained)]
        return trust.run_checks(
            net.bake,
            net.bake(None),
            data,
            ("conv1", "conv2"),
            classes,
            checks,
            lambda label: models,
            folder=folder,
            progress=False,
            **{"settings": quick, **more},
        )

    return run_checks


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trust")
    return folder, run(folder)


@pytest.fixture
def calls(monkeypatch):
    """The (class, check) pairs that are measured; ``calls.stop_at`` interrupts before one."""

    class Calls(list):
        stop_at = 0

    seen, work = Calls(), runner._run_check

    def spy(check, subject, *rest):
        seen.append((subject.label, check.name))
        if len(seen) == seen.stop_at:
            raise KeyboardInterrupt
        return work(check, subject, *rest)

    monkeypatch.setattr(runner, "_run_check", spy)
    return seen


def without_seconds(result):
    return [{**r.__dict__, "seconds": 0} for r in result.records]


def test_every_check_for_every_class(finished):
    folder, result = finished
    pairs = [(record.index, record.check) for record in result.records]
    assert pairs == [(k, check) for k in (0, 2) for check in trust.CHECKS]
    for record in result.records:
        check = trust.CHECKS[record.check]
        assert set(check.measures) <= set(record.forgetful)
        assert all(0 <= v <= 1 or "kl" in k for k, v in record.forgetful.items())
        assert all(check.meaning(name) for name in record.forgetful)
        assert check.headline in record.forgetful
        assert record.retrained_models == 2
        assert check.original == bool(record.original)
        if record.check == "removal":  # a class of four equal ones
            drawn = record.details["attackers_images"]
            others = drawn["unlabelled"] - drawn["of_the_class"]
            assert drawn["of_the_class"] == round(others / 3)
    assert result.settings["attackers_images"] == "classes in the proportion of the training part"
    assert trust.TrustResult.from_json(folder / "trust.json").records == result.records
    assert not (folder / "trust.partial.jsonl").exists()


def test_an_interrupted_run_goes_on_and_ends_the_same(run, tmp_path, finished, calls):
    calls.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / "trust.json").exists()
    journal = tmp_path / "trust.partial.jsonl"
    journal.write_text(journal.read_text() + '{"index": 0, "na')  # died while writing
    result = run(tmp_path)
    assert len(calls) == 4 + len(finished[1].records) - 3
    assert calls.count((0, "membership")) == 1
    assert without_seconds(result) == without_seconds(finished[1])


def test_a_second_run_computes_nothing_and_adds_classes(run, tmp_path, calls):
    checks = ["membership", "closeness"]
    first = run(tmp_path, classes=[0], checks=checks)
    calls.clear()
    run(tmp_path, classes=[0], checks=checks)
    assert calls == []
    both = run(tmp_path, classes=[3], checks=checks)
    assert {label for label, _ in calls} == {3}
    assert [r.index for r in both.records] == [0, 0, 3, 3]
    assert both.records[:2] == first.records
    other = TrustSettings(samples=20, relearn_steps=2)
    alone = run(tmp_path, classes=[1], checks=checks, settings=other)
    assert [r.index for r in alone.records] == [1, 1]  # of other settings: not mixed


def test_other_retrained_models_are_other_work(run, tmp_path):
    without = run(tmp_path, retrained=0, checks=["closeness"])
    having = run(tmp_path, retrained=1, checks=["closeness"])
    assert without.records[0].forgetful == {}
    assert having.records[0].forgetful


def test_no_model_is_changed_and_neither_is_the_random_state(data, make_network, quick):
    def state(model):
        values = {name: value.clone() for name, value in model.state_dict().items()}
        flags = [(p.requires_grad, p.grad) for p in model.parameters()]
        return values, flags, [m.training for m in model.modules()]

    net = wfnet.WFNet(make_network(0), 4)
    models = (net, net.bake(1), net.bake(None), make_network(9))
    before = [state(model) for model in models]
    random = torch.get_rng_state()
    trust.run_checks(
        lambda label: models[1],
        models[2],
        data,
        ("conv1", "conv2"),
        [1],
        retrained=lambda label: [models[3]],
        settings=quick,
        progress=False,
    )
    for model, (values, flags, modes) in zip(models, before, strict=True):
        now = state(model)
        assert now[1:] == (flags, modes)
        assert all(torch.equal(now[0][name], values[name]) for name in values | now[0])
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_missing_is_said(run):
    result = run(classes=[2], retrained=0, advice=lambda label: f"make one for {label}")
    sentences = result.missing()
    assert len(sentences) == len(trust.CHECKS)
    assert all("make one for 2" in sentence for sentence in sentences)
    assert any(sentence.startswith("Closeness") for sentence in sentences)
    assert run(classes=[2], retrained=2).missing() == []


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("checks", ["magic"], "there is no check 'magic'"),
        ("classes", [4], "class 4 is out of"),
        ("classes", [], "at least one check and one class"),
    ],
)
def test_a_wrong_request_is_refused(run, name, value, part):
    with pytest.raises(ValueError, match=part):
        run(**{name: value})


def test_a_damaged_earlier_result_is_named_before_work_starts(run, tmp_path, calls):
    (tmp_path / "trust.json").write_text(json.dumps({"format": 1, "records": [{}]}))
    with pytest.raises(ValueError, match="is damaged or not a result of"):
        run(tmp_path)
    assert calls == []

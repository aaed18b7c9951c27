"""The runner loses nothing and changes nothing."""

import pytest
import torch

import wfnet
from wfnet import trust
from wfnet.services.files import fingerprint
from wfnet.trust import runner

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
        for trivial in (record.logit_masked, record.bias_shifted):
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

"""benchmarks/device_smoke.py on the CPU: right kernels pass, wrong ones are named, none hides."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import device_smoke

from wfnet import backends

ARGUMENTS = ["--device", "cpu", "--dtypes", "float32"]


@pytest.fixture(autouse=True)
def as_before():
    """Fresh memory is NaN while a case runs, for other tests it is not."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def smoke(capsys, *words):
    status = device_smoke.main([*words, *ARGUMENTS])
    return status, capsys.readouterr().out.splitlines()


def test_eager_passes_every_family(capsys):
    families = [name for name in device_smoke.FAMILIES if name != "compiled"]
    status, lines = smoke(capsys, "eager", *families)
    assert status == 0, lines
    cases = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert set(cases) == set(families)
    assert lines[-1] == f"{len(cases)} of {len(cases)} cases passed"


def forgets_an_element(call):
    def wrong(*arguments):
        found = call(*arguments)
        found[0].view(-1)[3] = float("nan")
        return found

    return wrong


def loses_a_sum(call):
    def wrong(*arguments):
        found = list(call(*arguments))
        found[1] = found[1] * 1.02
        return tuple(found)

    return wrong


def raises(call):
    def wrong(*arguments):
        raise RuntimeError("an illegal instruction\nwas encountered")

    return wrong


@pytest.mark.parametrize(
    ("method", "family", "break_it", "shown"),
    [
        ("linear", "linear", forgets_an_element, "out nan"),
        ("linear_backward", "linear", loses_a_sum, "t1 2.0e-02"),
        ("conv2d_backward", "expansion", raises, "RuntimeError: an illegal instruction"),
    ],
)
def test_what_is_wrong_is_named_and_the_rest_runs(
    capsys, monkeypatch, method, family, break_it, shown
):
    eager = backends.get("eager")
    monkeypatch.setattr(eager, method, break_it(getattr(eager, method)))
    status, lines = smoke(capsys, "eager", family, "gates")
    assert status == 1
    wrong = [line for line in lines if line.startswith(f"FAILED {family} ")]
    assert len(wrong) >= 2
    assert all(shown in line for line in wrong)
    assert sum(line.startswith("ok gates") for line in lines) == 2


def test_a_backend_that_cannot_run_says_why(capsys, monkeypatch):
    monkeypatch.setattr(backends.get("triton"), "refuse_conv2d", lambda *call: "no such device")
    status, lines = smoke(capsys, "triton", "gates")
    assert (status, lines) == (1, ["triton cannot run: no such device"])


def test_unknown_families(capsys):
    with pytest.raises(SystemExit):
        device_smoke.parse(["eager", "magic"])
    assert "no family magic" in capsys.readouterr().err

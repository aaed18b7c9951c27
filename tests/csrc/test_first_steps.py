"""The first steps on a device (first_steps.py): do they say what is wrong?

They run on the emulated device here; wrong kernels are made up.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wfnet.backends import cuda_launch
from wfnet.backends.contract import Activation


@pytest.fixture
def steps(emulated_cuda):
    """The script, on an emulated device."""
    path = Path(__file__).with_name("first_steps.py")
    spec = importlib.util.spec_from_file_location("first_steps", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    yield script
    torch.use_deterministic_algorithms(False)


def test_right_kernels_pass(steps, capsys):
    names = ["one slice", "im2col past the end", "im2col 1x5", "dgrad 64 columns"]
    assert steps.run_steps(names) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines] == ["begins", "ok    "] * 4


def broken(monkeypatch, change):
    """The forward kernel, whose result ``change`` spoils."""
    right = cuda_launch.conv2d

    def wrong(*arguments):
        return Activation(change(right(*arguments).out))

    monkeypatch.setattr(cuda_launch, "conv2d", wrong)


def test_says_where_a_tile_is_wrong(steps, monkeypatch, capsys):
    def second_half(out):
        rows = out.permute(0, 2, 3, 1).view(-1, out.shape[1])
        rows[64:128] = 0
        rows[192:256, 32:] = float("nan")
        return out

    broken(monkeypatch, second_half)
    assert steps.run_steps(["one slice"]) == 1
    out = capsys.readouterr().out
    assert "FAILED one slice: error inf" in out
    assert "all of it where row // 64 % 2 (half of a tile) is [1] of [0, 1]" in out
    assert "first at row 64, column 0: 0, not" in out
    assert "row // 128" not in out
    assert "12.50% not finite" in out


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        ([(3, 3), (19, 0)], 1, "no answer within"),
        ([(1, 3)] * 3, 1, "not begun, after 3 that hang: ragged, "),
        ([(2, -11), (20, 0)], 1, "the process ended, -11"),
        ([(0, 1)], 1, "no step has begun"),
        ([(2, 2), (20, 0)], 1, ""),
        ([(22, 1)], 1, ""),
        ([(22, 0)], 0, ""),
    ],
    ids=["hang", "hangs", "crash", "no start", "exception", "failure", "fine"],
)
def test_a_step_that_ends_its_process_costs_that_step(
    steps, monkeypatch, capsys, ends, status, said
):
    """``ends``: how many steps each process begins, and its exit status."""
    assert len(steps.STEPS) == 22
    left = list(ends)

    def start(command, **_):
        begun, code = left.pop(0)
        lines = [f"begins {name}\n" for name in command[2:][:begun]]
        return SimpleNamespace(stdout=lines, wait=lambda: code)

    monkeypatch.setattr(steps.subprocess, "Popen", start)
    assert steps.supervise() == status
    assert not left
    assert said in capsys.readouterr().out

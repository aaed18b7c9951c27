"""The first steps on a device (first_steps.py): do they say what is wrong?

They run on the emulated device here; wrong kernels are made up.
"""

import importlib.util
import signal
from pathlib import Path

import pytest
import torch

from wfnet.backends import cuda_launch


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
        return change(right(*arguments).out), None, None

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


def ends(monkeypatch, script, *rounds):
    """Each round of ``follow``: steps that finish, then the step it ends in, and its status."""
    left = list(rounds)

    def follow(words, seen):
        finished, begun, status = left.pop(0)
        for name in words[:finished]:
            seen(name)
        return (words[finished] if begun else ""), status

    monkeypatch.setattr(script, "follow", follow)
    return left


def test_one_hang_costs_one_step(steps, monkeypatch, capsys):
    count = len(steps.STEPS)
    ends(monkeypatch, steps, (2, True, -signal.SIGKILL), (count - 3, False, 0))
    assert steps.supervise() == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 1
    assert "WFNET_CUDA_DEADLINE" in out


def test_hangs_end_it(steps, monkeypatch, capsys):
    """A machinery that is broken as a whole does not take half a minute for each step."""
    left = ends(monkeypatch, steps, *[(0, True, -signal.SIGKILL)] * len(steps.STEPS))
    assert steps.supervise() == 1
    assert len(left) == len(steps.STEPS) - steps.MOST_HANGS
    assert "not begun, after 3 that hang: ragged, " in capsys.readouterr().out


def test_a_process_that_does_not_start_ends_it(steps, monkeypatch, capsys):
    ends(monkeypatch, steps, (0, False, 1))
    assert steps.supervise() == 1
    assert "no step has begun" in capsys.readouterr().out


def test_a_step_that_failed_fails_the_whole(steps, monkeypatch):
    ends(monkeypatch, steps, (3, False, 2), (len(steps.STEPS) - 3, False, 0))
    assert steps.supervise() == 1  # status 2: a step has failed
    ends(monkeypatch, steps, (len(steps.STEPS), False, 0))
    assert steps.supervise() == 0

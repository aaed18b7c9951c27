"""Runs that are killed or stopped come to the same end as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from wfnet.cli import main
from wfnet.untraining.run_state import CHECKPOINT_NAME, read_checkpoint
from wfnet.untraining.signals import Stopped, StopSignals

TEMPORARY = f".{CHECKPOINT_NAME}.*"


@pytest.fixture(scope="module")
def uninterrupted(go):
    return go()


def newest_step(folder):
    path = folder / CHECKPOINT_NAME
    return read_checkpoint(path)[1]["step"] if path.exists() else 0


def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(tmp_path, runs, go, uninterrupted):
    """Every other time in the middle of a save. The interval is two steps: no more is lost."""
    steps = multiprocessing.get_context("fork").Value("i", 0)  # that children have begun

    def count(indices):
        steps.value += len(indices) == 4

    def work():
        sync = os.fsync
        os.fsync = lambda handle: (time.sleep(0.004), sync(handle))  # saves take their time
        go(tmp_path, runs.InMemory(runs.bars(), count), checkpoint_every=2)

    chance = random.Random(0)
    killed = saving = 0
    while True:
        assert killed < 30
        start = steps.value = newest_step(tmp_path)
        more = chance.randint(1, 8)
        child = runs.forked(work)
        status = runs.wait_until(lambda: steps.value >= start + more, child)  # noqa: B023
        if status is None and killed % 2:
            status = runs.wait_until(lambda: list(tmp_path.glob(TEMPORARY)), child)
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = runs.ended(child)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
        saving += bool(list(tmp_path.glob(TEMPORARY)))
        # The step that had begun was not done, and may have been the one after a save.
        assert newest_step(tmp_path) >= steps.value - 3
    assert killed >= 3
    assert saving >= 1
    net, result = go(tmp_path, checkpoint_every=2)
    runs.assert_same_run(net, result, *uninterrupted)
    saved = load_file(tmp_path / "wf_model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in net.named_filters().items())
    assert not list(tmp_path.glob(TEMPORARY))


@pytest.mark.parametrize(
    ("number", "when", "step"), [(signal.SIGTERM, 1, 0), (signal.SIGINT, 8, 7)]
)
def test_a_signal_stops_at_the_step_boundary(
    tmp_path, runs, go, uninterrupted, number, when, step, caplog
):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    # No checkpoint is due for long: the one that is found was written for the signal.
    with pytest.raises(Stopped, match=rf"stopped after step {step} of 20") as stopped:
        go(tmp_path, runs.raising(runs.bars(), 4, when, number), checkpoint_every=1000)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert stopped.value.signal == number
    assert f"{number.name}: a checkpoint is written after this step" in caplog.text
    assert newest_step(tmp_path) == step
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    runs.assert_same_run(*go(tmp_path), *uninterrupted)


def test_the_second_signal_ends_it_at_once(tmp_path, runs):
    def work():
        with StopSignals() as signals:
            (tmp_path / "ready").touch()
            while not signals.received:
                time.sleep(0.01)
            (tmp_path / "noticed").touch()
            time.sleep(30)

    child = runs.forked(work)
    assert runs.wait_until((tmp_path / "ready").exists, child) is None
    os.kill(child, signal.SIGTERM)
    assert runs.wait_until((tmp_path / "noticed").exists, child) is None
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(runs.ended(child)) == signal.SIGTERM


def test_the_command_line_ends_with_128_plus_the_signal(image_folder, tmp_path, runs):
    folder, shown = tmp_path / "run", tmp_path / "shown"
    call = ["untrain", "--data-dir", str(image_folder), "--model", "small/resnet"]
    call += ["--model-kwargs", "width=8", "--img-size", "32", "-b", "4", "-M", "2", "-j", "0"]
    call += ["--steps", "100000", "--patience", "9999", "--output", str(folder)]

    def work():
        handle = os.open(shown, os.O_CREAT | os.O_WRONLY)
        sys.stderr = os.fdopen(handle, "w", buffering=1)
        os._exit(main(call))

    child = runs.forked(work)
    assert runs.wait_until(lambda: newest_step(folder) >= 2, child) is None
    os.kill(child, signal.SIGTERM)
    assert os.WEXITSTATUS(runs.ended(child)) == 143, shown.read_text()
    assert "Traceback" not in shown.read_text()
    assert f"the last checkpoint is in {folder}" in shown.read_text()
    assert newest_step(folder) >= 2
    assert main(["untrain", "--resume", str(folder), "--steps", "3"]) == 2  # another length

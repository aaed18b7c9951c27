"""Runs that are killed, stopped and broken in every way come to the same end, or lose nothing."""

import json
import logging
import math
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    CLASSES,
    Files,
    assert_same_run,
    config,
    ended,
    forked,
    images,
    network,
    wait_until,
)

from wfnet.cli import main
from wfnet.data import CorruptImage
from wfnet.data.loading import LostWorker
from wfnet.untraining import checkpoints, throughput, untrain
from wfnet.untraining.checkpoints import CHECKPOINT_NAME, Checkpoints
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.signals import Stopped, StopSignals

TEMPORARY = f".{CHECKPOINT_NAME}.*"


@pytest.fixture(scope="module")
def uninterrupted():
    net = network()
    return net, untrain(net, images(), images(4, 1), config(), progress=False)


def go_on(folder, train=None, validation=None, **changes):
    net = network()
    result = untrain(
        net, train or images(), validation or images(4, 1), config(**changes), folder, True, False
    )
    return net, result


# -- killed ---------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_ends_as_if_nothing_had_happened(tmp_path, uninterrupted):
    """Every other time in the middle of a save. The interval is two steps: no more is lost."""
    folder = tmp_path / "run"
    folder.mkdir()
    steps = multiprocessing.get_context("fork").Value("i", 0)  # that children have begun

    def work():
        sync = os.fsync
        os.fsync = lambda handle: (time.sleep(0.004), sync(handle))  # saves take their time
        go_on(folder, Counting(images(), steps), checkpoint_every=2)

    chance = random.Random(0)
    killed = saving = 0
    while True:
        assert killed < 30
        start = steps.value = newest_step(folder)
        more = chance.randint(1, 8)
        child = forked(work)
        status = wait_until(lambda: steps.value >= start + more, child)  # noqa: B023
        if status is None and killed % 2:
            status = wait_until(lambda: list(folder.glob(TEMPORARY)), child)
        elif status is None:
            time.sleep(chance.uniform(0, 0.02))
        if status is None:
            os.kill(child, signal.SIGKILL)
            status = ended(child)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
        saving += bool(list(folder.glob(TEMPORARY)))
        # The step that had begun was not done, and may have been the one after a save.
        assert newest_step(folder) >= steps.value - 3
    assert killed >= 3
    assert saving >= 1
    net, result = go_on(folder, checkpoint_every=2)
    assert_same_run(net, result, *uninterrupted)
    saved = load_file(folder / "wf_model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in net.named_filters().items())
    assert not list(folder.glob(TEMPORARY))


def newest_step(folder):
    store = Checkpoints(folder)
    return store.load()[1]["step"] if store.exist() else 0


class Counting:
    """In memory; counts the minibatches that are asked for."""

    def __init__(self, dataset, count):
        self.dataset, self.count = dataset, count
        self.labels, self.classes = dataset.labels, dataset.classes

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices):
        self.count.value += len(indices) == 4
        return self.dataset.batch(indices)


# -- stopped --------------------------------------------------------------------------------------


class Raising:
    """In memory; raises a signal when a minibatch of so many images is asked for the n-th time."""

    def __init__(self, dataset, size, when, number=signal.SIGTERM):
        self.dataset, self.size, self.when, self.number = dataset, size, when, number
        self.labels, self.classes = dataset.labels, dataset.classes

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices):
        if len(indices) == self.size:
            self.when -= 1
            if self.when == 0:
                signal.raise_signal(self.number)
        return self.dataset.batch(indices)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize(("when", "step"), [(1, 0), (8, 7)])
def test_a_signal_stops_at_the_step_boundary(
    tmp_path, uninterrupted, number, when, step, caplog, request
):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    # No checkpoint is due for long: the one that is found was written for the signal.
    with pytest.raises(Stopped, match=rf"stopped after step {step} of 24") as stopped:
        go_on(tmp_path, Raising(images(), 4, when, number), checkpoint_every=1000)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert stopped.value.signal == number
    assert f"{number.name}: a checkpoint is written after this step" in caplog.text
    assert Checkpoints(tmp_path).load()[1]["step"] == step
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert_same_run(*go_on(tmp_path), *uninterrupted)


def test_a_signal_breaks_off_a_validation_which_comes_first_when_the_run_goes_on(
    tmp_path, uninterrupted
):
    expected = [record["step"] for record in uninterrupted[1].history]
    with pytest.raises(Stopped, match=rf"stopped after step {expected[1]} of 24"):
        go_on(tmp_path, validation=Raising(images(4, 1), 24, 2))
    state = Checkpoints(tmp_path).load()[1]
    assert state["step"] == expected[1]
    assert [record["step"] for record in state["history"]] == expected[:1]
    assert_same_run(*go_on(tmp_path), *uninterrupted)


def test_a_signal_in_the_last_validation(tmp_path, uninterrupted):
    last = len(uninterrupted[1].history)
    with pytest.raises(Stopped, match="stopped after step 24 of 24"):
        go_on(tmp_path, validation=Raising(images(4, 1), 24, last))
    assert not (tmp_path / "wf_model.safetensors").exists()
    assert_same_run(*go_on(tmp_path), *uninterrupted)
    assert (tmp_path / "wf_model.safetensors").exists()


def test_without_a_folder_an_interrupt_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt) as stopped:
        untrain(network(), Raising(images(), 4, 3, signal.SIGINT), None, config(), progress=False)
    assert not isinstance(stopped.value, Stopped)


def test_the_second_signal_ends_it_at_once(tmp_path):
    def work():
        with StopSignals():
            (tmp_path / "ready").touch()
            time.sleep(30)
            time.sleep(30)

    child = forked(work)
    assert wait_until((tmp_path / "ready").exists, child) is None
    os.kill(child, signal.SIGTERM)
    assert ended(child, 0.2) is None
    os.kill(child, signal.SIGTERM)
    assert os.WTERMSIG(ended(child)) == signal.SIGTERM


def test_the_command_line_ends_with_128_plus_the_signal(image_folder, tmp_path):
    folder = tmp_path / "run"
    call = ["untrain", "--data-dir", image_folder, "--model", "small/resnet", "--model-kwargs",
            "width=8", "--img-size", "32", "-b", "4", "-M", "2", "-j", "0", "--steps", "100000",
            "--output", folder, "--keep-checkpoints", "3", "--patience", "9999"]  # fmt: skip
    shown = tmp_path / "shown"

    def work():
        handle = os.open(shown, os.O_CREAT | os.O_WRONLY)
        sys.stderr = os.fdopen(handle, "w", buffering=1)
        os._exit(main([str(argument) for argument in call]))

    child = forked(work)
    assert wait_until(lambda: Checkpoints(folder).older(), child) is None
    os.kill(child, signal.SIGTERM)
    assert os.WEXITSTATUS(ended(child)) == 143, shown.read_text()
    assert "Traceback" not in shown.read_text()
    assert f"the last checkpoint is in {folder}" in shown.read_text()
    step = Checkpoints(folder).load()[1]["step"]
    assert step >= 2
    assert 1 <= len(Checkpoints(folder).older()) <= 2
    options = json.loads((folder / "config.json").read_text())["options"]
    assert options["keep_checkpoints"] == 3
    assert main(["untrain", "--resume", str(folder), "--steps", "3"]) == 2  # another length


# -- broken ---------------------------------------------------------------------------------------


def test_lost_data_workers_are_replaced(tmp_path, uninterrupted, monkeypatch, caplog):
    """Killed in the middle of the run, as for lack of memory; it ends as it would have."""
    monkeypatch.setattr(
        torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data,
        "__defaults__", (0.1,),
    )  # fmt: skip
    mark = tmp_path / "killed"
    main_process = os.getpid()

    def kill_once(index):
        if index == 13 and not mark.exists() and os.getpid() != main_process:
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    net, result = go_on(tmp_path / "run", Files(images(), kill_once), workers=1)
    assert mark.exists()
    assert "a data worker died" in caplog.text
    assert "(1 of at most 3 times)" in caplog.text
    assert_same_run(net, result, *uninterrupted)


def test_workers_that_die_again_and_again_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data,
        "__defaults__", (0.1,),
    )  # fmt: skip
    main_process = os.getpid()

    def kill_always(index):
        read.append(index)
        if len(read) > 18 and os.getpid() != main_process:  # every worker: it has a list of its own
            os.kill(os.getpid(), signal.SIGKILL)

    read = []
    with pytest.raises(LostWorker, match="a data worker died"):
        go_on(tmp_path, Files(images(), kill_always), workers=1, checkpoint_every=1000)
    assert Checkpoints(tmp_path).load()[1]["step"] >= 1  # what was done is kept


def test_a_disk_that_fails_to_read_ends_the_run_and_nothing_is_lost(tmp_path, uninterrupted):
    class Failing(Exception):
        pass

    def fail(index):
        calls.append(index)
        if len(calls) == 30:
            raise Failing("the disk is gone")

    calls = []
    with pytest.raises(Failing, match="the disk is gone"):
        go_on(tmp_path, Files(images(), fail), checkpoint_every=1000)
    assert Checkpoints(tmp_path).load()[1]["step"] == 7
    assert_same_run(*go_on(tmp_path, Files(images())), *uninterrupted)


def test_a_disk_that_is_full_for_a_while(tmp_path, uninterrupted, monkeypatch, caplog):
    write, attempts = checkpoints.write_tensors, []

    def full_for_a_while(*arguments):
        attempts.append(None)
        if 5 <= len(attempts) < 8:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(checkpoints, "write_tensors", full_for_a_while)
    net, result = go_on(tmp_path)
    assert "could not be written (No space left on device; 1 of at most 3" in caplog.text
    assert_same_run(net, result, *uninterrupted)


def test_a_damaged_newest_checkpoint_costs_one_interval(tmp_path, uninterrupted, caplog):
    with pytest.raises(Stopped):
        go_on(tmp_path, Raising(images(), 4, 11))
    path = tmp_path / CHECKPOINT_NAME
    assert Checkpoints(tmp_path).load()[1]["step"] == 10
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.unlink()
    path.write_bytes(content)
    caplog.set_level(logging.INFO, "wfnet")
    net, result = go_on(tmp_path)
    assert "do not have the checksum" in caplog.text
    assert "at step 9" in caplog.text
    assert_same_run(net, result, *uninterrupted)


# -- data beside the network ----------------------------------------------------------------------


@pytest.mark.parametrize("slow", ["data", "network"])
def test_the_log_says_when_the_data_starve_the_network(slow, caplog, monkeypatch):
    monkeypatch.setattr(throughput, "_WORTH_SAYING", 0.1)

    class Slow(BalancedObjective):
        def __call__(self, *arguments):
            time.sleep(0.1 * (slow == "network"))
            return super().__call__(*arguments)

    train = Files(images(), lambda index: time.sleep(0.02 * (slow == "data")))
    with caplog.at_level(logging.INFO, "wfnet"):
        result = untrain(network(), train, None, config(steps=8), progress=False, objective=Slow())
    record = result.history[-1]
    assert {"images_per_second", "data_wait"} <= set(record)
    if slow == "data":
        assert "the data starve the network" in caplog.text
        assert record["data_wait"] > 0.5
        assert record["images_per_second"] < 100
    else:
        assert record["data_wait"] < 0.2 or "starve" in caplog.text
        assert record["data_wait"] < 0.5


def test_the_number_of_classes_is_that_of_the_images():
    assert int(images().labels.max()) + 1 == CLASSES


# -- losses that are not finite -------------------------------------------------------------------


class SometimesNaN(BalancedObjective):
    """A loss of NaN whenever a minibatch has image ``label`` first."""

    def __init__(self, label=2):
        super().__init__()
        object.__setattr__(self, "label", label)

    def __call__(self, logits, batch, original, net):
        losses = super().__call__(logits, batch, original, net)
        bad = math.nan if batch.target[0] == self.label else 0.0
        return type(losses)(losses.total + bad, losses.terms)


def test_a_few_steps_of_nan_are_left_out_and_counted(tmp_path, caplog):
    def go(folder=None, train=None, **changes):
        net = network()
        settings = config(steps=10, checkpoint_every=1, **changes)
        return net, untrain(
            net, train or images(), images(4, 1), settings, folder, folder is not None, False,
            SometimesNaN(),
        )  # fmt: skip

    net, result = go(max_nan_steps=20)
    skipped = caplog.text.count("is not finite: its images are left out")
    assert skipped >= 2
    assert f"({skipped} of at most 20)" in caplog.text
    assert result.steps == 10
    assert all(p.isfinite().all() for p in net.filter_parameters())
    with pytest.raises(Stopped):
        go(tmp_path, Raising(images(), 4, 7), max_nan_steps=20)
    assert_same_run(*go(tmp_path, max_nan_steps=20), net, result)
    with pytest.raises(FloatingPointError, match="is not finite"):
        go(max_nan_steps=skipped - 1)


# -- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_system_in_a_worker_is_one_sentence(workers):
    def gone(index):
        if index >= 12:
            raise FileNotFoundError(2, "No such file or directory", "/data/train-007.tar")

    message = r"^\[Errno 2\] No such file or directory: '/data/train-007.tar'$"
    with pytest.raises(FileNotFoundError, match=message):
        untrain(network(), Files(images(), gone), None, config(workers=workers), progress=False)


def test_validation_images_none_of_which_can_be_read(caplog):
    def corrupt(index):
        raise CorruptImage(f"image {index}", "half a JPEG")

    settings = config(max_corrupt=100)
    with pytest.raises(RuntimeError, match="no validation image can be read"):
        untrain(network(), images(), Files(images(2, 1), corrupt), settings, progress=False)
    assert caplog.text.count("half a JPEG") == 12

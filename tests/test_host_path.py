"""What the host does beside a CUDA device in a whole run: it waits only where it must.

The device is pretended (tests/pretended_cuda.py): it finds every wait, but says nothing of time.
"""

import collections
import time

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import pretended_cuda

from wfnet import UntrainConfig, models, untrain
from wfnet.data import CachedImages, batches, open_data
from wfnet.data.cache import _uniform
from wfnet.services.device_copies import to_device_async, to_device_overlapped
from wfnet.untraining.objectives import BalancedObjective, Losses
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.throughput import Throughput
from wfnet.wrapping import wrap

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a real device: tests/gpu"
)
SIZE = 16


@pytest.fixture
def device():
    with pretended_cuda.pretended_cuda() as pretended:
        yield pretended


def opened(folder, cache=None, augment=False, place="cuda", cache_dir=None):
    return open_data(
        folder, image_size=SIZE, cache=cache, cache_dir=cache_dir, augment=augment, device=place,
        validation_fraction=0.34,
    )  # fmt: skip


def settings(steps, **changes):
    changes = {"fuse": False, "amp": "bfloat16", "validations_per_epoch": 0.01, **changes}
    return UntrainConfig.recipe("balanced", 3, steps=steps, batch_size=4, **changes)


def waits_of(device, data, steps, validate=False, **changes):
    """Places that waited in a run of so many steps, and how often."""
    net = wrap(models.create("resnet", 3, 3, seed=0, width=8), 3).to("cuda")
    device.waits.clear()
    validation = data.validation if validate else None
    result = untrain(net, data.train, validation, settings(steps, **changes), progress=False)
    assert result.steps == steps
    return collections.Counter(device.waits)


@pytest.mark.parametrize("capture", [None, False], ids=["captured", "as it is"])
@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
@pytest.mark.parametrize("cache", [None, "host", "device", "disk"])
def test_no_step_waits_for_the_device(device, image_folder, tmp_path, cache, augment, capture):
    """Twice as many steps wait no more often: for no image, no label and no loss."""
    data = opened(image_folder, cache, augment, cache_dir=tmp_path)
    once = waits_of(device, data, 8, capture=capture)  # fills the cache
    assert once, "a run waits at least for its last losses"
    few, many = (waits_of(device, data, steps, capture=capture) for steps in (8, 16))
    assert many == few, many - few


@pytest.mark.parametrize("several", [False, True], ids=["one minibatch", "two minibatches"])
def test_sixteen_bit_filters_do_not_wait_either(device, image_folder, several):
    data = opened(image_folder, "device")

    def waits(steps):
        net = wrap(models.create("resnet", 3, 3, seed=0, width=8), 3,
                   filter_dtype=torch.bfloat16).to("cuda")  # fmt: skip
        device.waits.clear()
        untrain(net, data.train, None, settings(steps, grad_accum_steps=1 + several, capture=False),
                progress=False)  # fmt: skip
        return collections.Counter(device.waits)

    waits(6)
    assert waits(12) == waits(6)


def test_losses_are_read_in_one_piece(device, image_folder):
    """25 steps are looked at once, not number by number."""
    data = opened(image_folder, "device")
    few, many = waits_of(device, data, 24), waits_of(device, data, 60)
    more = many - few
    assert sum(more.values()) <= 4, more
    assert {place for _, place in more} <= {"loss_watch.py:read"}


def test_a_validation_waits_for_no_batch(device, image_folder, monkeypatch):
    monkeypatch.setattr("wfnet.untraining.validation.PAIRS_PER_PASS", 6)
    data = opened(image_folder, "device")
    waits_of(device, data, 1, validate=True)
    few = waits_of(device, data, 1, validate=True)
    monkeypatch.setattr("wfnet.untraining.validation.PAIRS_PER_PASS", 3)
    assert waits_of(device, data, 1, validate=True) == few


# -- what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
def test_a_gpu_normalises_what_the_host_would(device, image_folder, augment):
    """Bytes cross the bus; the images are those that the host's transforms make."""
    on_host = opened(image_folder, augment=augment, place="cpu")
    on_device = opened(image_folder, augment=augment)
    assert not isinstance(on_host.train, CachedImages)
    assert isinstance(on_device.train, CachedImages)
    order = [torch.tensor([3, 0, 5]), torch.tensor([0, 8])]
    for part in ("train", "validation", "test"):
        chosen = order if part == "train" else [torch.tensor([0, 1])]
        found = list(batches(getattr(on_device, part), chosen, pin_memory=True, seed=7, start=2))
        expected = batches(getattr(on_host, part), chosen, seed=7, start=2)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.images.is_cuda
            assert torch.equal(mine.images.cpu(), theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
            assert torch.equal(mine.indices, theirs.indices)


def test_draws_of_an_image_depend_on_seed_position_and_index_alone():
    indices = torch.arange(4000)
    found = _uniform(3, 5, indices, 5)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert (found < 1).all()
    assert torch.equal(_uniform(3, 5, indices[17:18], 5), found[17:18])
    for others in (_uniform(4, 5, indices, 5), _uniform(3, 6, indices, 5), found.roll(1, 0)):
        assert (others != found).float().mean() > 0.99
    # Even, and columns and neighbours independent of each other.
    assert (found.mean(0) - 0.5).abs().max() < 0.02
    correlation = np.corrcoef(found.T.numpy())
    assert np.abs(correlation - np.eye(5)).max() < 0.06
    assert abs(np.corrcoef(found[:-1, 0], found[1:, 0])[0, 1]) < 0.06
    assert _uniform(-1, 0, indices[:2], 5).shape == (2, 5)  # as for every other seed


# -- parts -----------------------------------------------------------------------------------------


def test_labels_are_sent_from_page_locked_memory(device):
    labels = torch.arange(5)
    assert torch.equal(to_device_async(labels, "cuda").cpu(), labels)
    assert [what for what, _ in device.waits] == ["copy to the host"]
    assert to_device_async(labels, "cpu") is labels


def test_only_page_locked_images_are_sent_beside_the_work(device):
    images = torch.rand(2, 3)
    pinned = images.pin_memory()
    device.waits.clear()
    moved = to_device_overlapped(pinned, "cuda")
    assert device.waits == []
    assert device.beside == 1
    assert torch.equal(moved.cpu(), images)
    to_device_overlapped(images, "cuda")
    assert device.beside == 1
    assert to_device_overlapped(images, "cpu") is images


def test_rows_that_occurred_are_given_on_the_host(device):
    parameter = torch.nn.Parameter(torch.zeros(6, 4).cuda())
    parameter.grad = torch.ones(6, 4).cuda()
    optimizer = RowAdam([parameter], lr=0.1)
    device.waits.clear()
    optimizer.step(rows=torch.tensor([1, 4]))
    assert device.waits == []
    moved = (parameter.detach() != 0).any(1).cpu()
    assert moved.tolist() == [False, True, False, False, True, False]


class Clock:
    """Seconds of host and device, moved by hand."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                # When the device comes to it: not before the host has asked for it.
                clock.device = max(clock.device, clock.host)
                self.at = clock.device

            def query(self):
                return True

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr("wfnet.untraining.throughput.time.perf_counter", lambda: self.host)


@pytest.mark.parametrize("busy", [0.0, 3.0, 10.0])
def test_waiting_counts_as_far_as_the_device_is_idle(monkeypatch, busy):
    """The host waits 4 s for an image while the device still has ``busy`` seconds of work."""
    clock = Clock(monkeypatch)
    throughput = Throughput("cuda")

    def images():
        for _ in range(2):
            clock.host += 4
            yield 1

    for _ in throughput.timed(images()):
        throughput.images += 1
        clock.host += 0.5  # the step is asked for
        clock.device = max(clock.device, clock.host) + busy
    clock.host = max(clock.host, clock.device)
    seconds = clock.host
    record = throughput.record()
    # The device is idle before the first image, and as long as it has done the first step's work.
    idle = 4 + max(0.0, 4 - busy)
    assert record["data_wait"] == pytest.approx(idle / seconds)
    assert throughput.total == pytest.approx(idle)
    assert throughput.record()["data_wait"] == 0


def test_what_the_time_was_spent_on_adds_up(image_folder, tmp_path):
    data = opened(image_folder, place="cpu")

    class Slow(BalancedObjective):
        def __call__(self, *arguments):
            time.sleep(0.01)
            losses = super().__call__(*arguments)
            return Losses(losses.total, {**losses.terms, "a number": 0.25})

    def run(steps, resume=False):
        net = wrap(models.create("resnet", 3, 3, seed=0, width=8), 3)
        config = settings(steps, amp=None, validations_per_epoch=1)
        return untrain(net, data.train, data.validation, config, tmp_path, resume=resume,
                       progress=False, objective=Slow())  # fmt: skip

    result = run(12)
    assert set(result.spent) == {"start", "data", "steps", "validation", "checkpoints"}
    assert all(seconds >= 0 for seconds in result.spent.values())
    assert sum(result.spent.values()) == pytest.approx(result.seconds)
    assert result.spent["steps"] > 0.1
    assert min(result.spent[name] for name in ("start", "validation", "checkpoints")) > 0
    assert result.history[-1]["a number"] == pytest.approx(0.25)
    assert run(12, resume=True).spent["start"] == pytest.approx(result.spent["start"])

"""A whole run on a device, from image files: data workers, pinned memory, copies beside steps."""

import logging

import pytest
import torch
from image_files import CLASS_NAMES, write_image

from wfnet import UntrainConfig, models, untrain
from wfnet.data import batches, open_data
from wfnet.services.device_copies import to_device_overlapped
from wfnet.wrapping import wrap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZE, STEPS = 32, 60


@pytest.fixture
def folder(tmp_path):
    for label, name in enumerate(CLASS_NAMES):
        for number in range(12):
            part = "val" if number < 2 else "train"
            write_image(tmp_path / part / name / f"{number}.jpg", 100 * label + number)
    return tmp_path


def opened(folder, place="cuda", **options):
    return open_data(folder, image_size=SIZE, device=place, **options)


def run(data, workers: int):
    net = wrap(models.create("resnet", len(CLASS_NAMES), 3, seed=0, width=16), len(CLASS_NAMES))
    config = UntrainConfig.recipe(
        "balanced",
        len(CLASS_NAMES),
        steps=STEPS,
        batch_size=8,
        amp="bfloat16",
        workers=workers,
        validations_per_epoch=0.2,
    )
    result = untrain(net.cuda(), data.train, data.validation, config, progress=False)
    return torch.cat([p.detach().flatten() for p in net.filter_parameters()]).cpu(), result


@pytest.mark.parametrize("cache", [None, "host", "device"])
@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
def test_a_whole_run_is_captured_beside_its_workers_and_repeats(folder, cache, augment, caplog):
    caplog.set_level(logging.INFO, "wfnet")
    alone, _ = run(opened(folder, cache=cache, augment=augment), 0)
    beside, result = run(opened(folder, cache=cache, augment=augment), 2)
    assert caplog.text.count("captured accumulate as a CUDA graph") == 2
    assert torch.equal(alone, beside), "the filters depend on who reads the images"
    assert sum(result.spent.values()) == pytest.approx(result.seconds)


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
def test_a_whole_run_reads_the_images_that_the_host_would(folder, augment):
    order = torch.arange(24).split(8)
    found = batches(opened(folder, augment=augment).train, order, 2, pin_memory=True)
    expected = batches(opened(folder, "cpu", augment=augment).train, order)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.images.is_cuda
        assert torch.equal(mine.labels, theirs.labels)
        torch.testing.assert_close(mine.images.cpu(), theirs.images, rtol=0, atol=1e-5)


def test_what_is_sent_beside_a_whole_run_is_there_when_it_is_read():
    """Copies of changing sizes, beside work that takes longer than they do."""
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    sums, expected = [], []
    for number in range(200):
        host = torch.full((1 + number % 7, 3, 256, 256), number % 251, dtype=torch.uint8)
        expected.append(host.sum(dtype=torch.int64))
        busy = (busy @ busy).clamp_(-1, 1)
        sums.append(to_device_overlapped(host.pin_memory(), "cuda").sum(dtype=torch.int64))
        del host
    assert torch.equal(torch.stack(sums).cpu(), torch.stack(expected))

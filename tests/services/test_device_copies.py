"""Copies for which the host does not wait, on a pretended device."""

import torch

from wfnet.services.device_copies import to_device_async, to_device_overlapped


def test_only_page_locked_images_are_sent_beside_the_work(pretended_device):
    labels, images = torch.arange(5), torch.rand(2, 3)
    assert torch.equal(to_device_async(labels, "cuda").cpu(), labels)
    assert [what for what, _ in pretended_device.waits] == ["copy to the host"]
    pinned = images.pin_memory()
    pretended_device.waits.clear()
    moved = to_device_overlapped(pinned, "cuda")
    assert pretended_device.waits == []
    assert pretended_device.beside == 1
    assert torch.equal(moved.cpu(), images)
    to_device_overlapped(images, "cuda")
    assert pretended_device.beside == 1
    assert to_device_overlapped(images, "cpu") is images
    assert to_device_async(labels, "cpu") is labels

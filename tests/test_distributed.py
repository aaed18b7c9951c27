"""DistributedDataParallel over two processes; labels travel as the forward argument."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import wfnet

CLASSES = 5
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, CLASSES),
    )  # fmt: skip
    net = wfnet.WFNet(model.eval(), CLASSES)
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter)
    return net


def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 6, 6, generator=generator)
    return images, torch.tensor(
        [[0, 1], [2, -1], [-1, -1], [4, 4], [3, 1], [0, -1], [2, 3], [1, 1]]
    )


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = DistributedDataParallel(network())
    net.train()
    images, forget = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    for _ in range(2):
        net.zero_grad()
        net(images[mine], forget=forget[mine]).square().mean().backward()
    torch.save([p.grad for p in net.module.filter_parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_equal_one_process_on_the_joint_batch(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    net = network()
    images, forget = batch()
    net(images, forget=forget).square().mean().backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for parameter, a, b in zip(net.filter_parameters(), first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, parameter.grad)


def test_data_parallel_is_refused(monkeypatch):
    """What DataParallel does on several GPUs, without a GPU: it calls replicas of the module."""
    images, forget = batch()
    parallel = DataParallel(network())
    parallel.module = parallel.module._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        parallel(images, forget=forget)

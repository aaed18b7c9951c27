"""Files that run without this package compute what the network does, for any batch and label."""

import shutil

import pytest
import torch
from torch import nn

import wfnet
from wfnet.deployment import Deployment, onnx_logits

X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def random_filters(net):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(2 * torch.randn(alpha.shape, generator=generator))
    return net


def test_a_server_chooses_the_class_of_each_image(make_model, tmp_path):
    net = random_filters(wfnet.WFNet(make_model(), 7, gate="durable"))
    deployment = Deployment(net, X)
    assert deployment.inputs["forget"].tolist() == [6, -1, 0, 1, 2]
    assert deployment.save_program(tmp_path / "net.pt2") < 1e-5
    program = torch.export.load(tmp_path / "net.pt2")
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("wfnet" in name for name in called)
    run = program.module()
    for labels in ([3], [-1, 6], [0, 1, 2, 3, 4, 5, 6, -1]):
        forget = torch.tensor(labels)
        images = torch.randn(len(labels), 1, 8, 8)
        torch.testing.assert_close(run(images, forget), net(images, forget))
    wrong = run(X, torch.tensor([0, 7, -2, -1, 6])).isnan().all(1)
    assert wrong.tolist() == [False, True, True, False, False]
    with pytest.raises((AssertionError, RuntimeError)):
        run(X, torch.tensor([0, 1]))


@pytest.fixture
def token_net():
    """Of images as three tokens each."""
    layers = nn.Flatten(2), nn.Linear(4, 5), nn.GELU(), nn.Flatten(), nn.Linear(15, 3)
    return random_filters(wfnet.WFNet(nn.Sequential(*layers), 3, targets="1"))


def test_a_filtered_network_in_onnx(token_net, tmp_path):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    deployment = Deployment(token_net, torch.randn(4, 3, 2, 2))
    assert deployment.save_onnx(tmp_path / "net.onnx") < 1e-5
    images, forget = torch.randn(7, 3, 2, 2), torch.tensor([2, -1, 0, 1, 2, 2, 3])
    found = onnx_logits(tmp_path / "net.onnx")(images, forget)
    assert found[6].isnan().all()
    torch.testing.assert_close(found[:6], token_net(images[:6], forget[:6]))
    with pytest.raises(ValueError, match="would share one scale"):
        deployment.save_int8(tmp_path / "int8.onnx", images)


def test_a_compiled_package(tmp_path):
    deployment = Deployment(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.randn(3, 1, 2, 2))
    if shutil.which("g++"):
        assert deployment.save_package(tmp_path / "net.pt2") < 1e-5
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-compiler",)})
    with no_compiler, pytest.raises(RuntimeError, match="needs a C"):
        deployment.save_package(tmp_path / "other.pt2")
    assert not (tmp_path / "other.pt2").exists()


def test_files_that_compute_something_else_are_noticed(make_net, tmp_path):
    net = make_net()
    deployment = Deployment(net.bake(2), X)
    deployment.expected = net.bake(3)(X).detach()
    with pytest.raises(RuntimeError, match="does not compute what the network does"):
        deployment.save_program(tmp_path / "net.pt2")
    with pytest.raises(ValueError, match="1 image is not enough"):
        Deployment(net, X[:1])

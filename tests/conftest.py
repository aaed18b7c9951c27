"""What several rooms test with: networks, images, folders of files, the emulated CUDA kernels."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from image_files import write_class_folders, write_idx
from torch import nn

import wfnet
from wfnet.data import TensorImages

pytest_plugins = ["pretended_cuda"]  # its fixture pretended_device

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _same_start():
    """Whatever ran before: the same random numbers, and a log that no --quiet has silenced."""
    torch.manual_seed(0)
    logging.getLogger("wfnet").setLevel(logging.NOTSET)


def load_module(name: str, path: Path) -> ModuleType:
    """The module at ``path``, which is not on ``sys.path``."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def csrc_build() -> ModuleType:
    """csrc/build.py, which is not part of the installed package."""
    return load_module("csrc_build", ROOT / "csrc/build.py")


@pytest.fixture(scope="session")
def emulated_module(csrc_build):
    """A function that builds and loads an emulated module; it skips without a C++ compiler."""

    def load(name: str, sources: list[Path]) -> ModuleType:
        try:
            library = csrc_build.build_emulated(name, sources, ROOT / "build/emulated")
        except csrc_build.BuildError as error:
            if "failed:" in str(error):
                raise
            pytest.skip(str(error))
        return load_module(name, library)

    return load


@pytest.fixture(scope="session")
def emulated_kernels(csrc_build, emulated_module) -> ModuleType:
    """The compiled kernels on the emulated device."""
    return emulated_module("_emulated", csrc_build.kernel_sources())


@pytest.fixture
def emulated_cuda(emulated_kernels, monkeypatch) -> ModuleType:
    """The launchers of backend ``cuda`` on CPU tensors, late completions, nothing left out.

    The backend's part in Triton runs on CPU tensors with TRITON_INTERPRET=1 alone.
    """
    from wfnet.backends import cuda_launch

    loaded = cuda_launch.Library(emulated_kernels, None)
    monkeypatch.setattr(cuda_launch, "library", lambda: loaded)
    emulated_kernels.set_schedule(0, emulated_kernels.Completion.LATE)
    emulated_kernels.leave_out(emulated_kernels.Fault.NONE)
    yield emulated_kernels
    emulated_kernels.leave_out(emulated_kernels.Fault.NONE)


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves tests of interpreted kernels to a process that decorates kernels so."""
    if not _INTERPRETED:
        chosen = [item for item in items if item.get_closest_marker("interpreter") is not None]
        config.hook.pytest_deselected(items=chosen)
        items[:] = [item for item in items if item not in set(chosen)]


@pytest.fixture(autouse=_INTERPRETED)
def exact_interpreter(monkeypatch):
    """Undoes two novelties of Triton 3.9's interpreter.

    It spreads the result of a scalar comparison as integers, and then refuses a mask that is
    combined with it ("mask has unsupported dtype"). And it rounds fp32 to TF32 where a tensor
    descriptor allows it, as devices do: here indices are tested, by numbers that are exact.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    spread = interpreter.InterpreterBuilder.create_splat

    def create_splat(self, *arguments):
        scalar = arguments[-1]
        found = spread(self, *arguments)
        if np.asarray(scalar.data).dtype != np.bool_:
            return found
        return interpreter.TensorHandle(found.data.astype(np.bool_), tl.int1)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", create_splat)
    monkeypatch.setattr(interpreter, "_round_f32_to_tf32", lambda data: data, raising=False)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Class folders with training and validation images."""
    return write_class_folders(tmp_path / "images")


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    """40 training and 20 test images in IDX files, the training files compressed."""
    rng = np.random.default_rng(0)
    root = tmp_path / "idx"
    for part, count, suffix in (("train", 40, ".gz"), ("t10k", 20, "")):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(root / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    return root


# -- small random networks with filters, and images for them --------------------------------------

_CLASSES = 7


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """Makes a classifier with BatchNorm, of 7 classes unless told otherwise."""

    def make(classes: int = _CLASSES, channels: int = 1) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(channels, 6, 3, bias=True),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(6, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return model

    return make


@pytest.fixture(scope="session")
def make_net(make_model) -> Callable[..., wfnet.WFNet]:
    """Makes that classifier with random filters, whose rows differ."""

    def make(classes: int = _CLASSES, seed: int = 1, spread: float = 3.0) -> wfnet.WFNet:
        net = wfnet.WFNet(make_model(classes), classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for alpha in net.filter_parameters():
                alpha.copy_(spread * torch.randn(alpha.shape, generator=generator))
        return net

    return make


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., TensorImages]:
    """Makes random images with given labels; classes are called name0, name1, ..."""

    def make(labels, classes: int = _CLASSES, seed: int = 2) -> TensorImages:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(len(labels), 1, 8, 8, generator=generator)
        names = [f"name{i}" for i in range(classes)]
        return TensorImages(images, torch.as_tensor(labels), names, mean=0.5, std=0.2)

    return make


@pytest.fixture
def uneven_dataset(make_dataset) -> TensorImages:
    """37 images of 7 classes of unequal sizes, in shuffled order."""
    labels = torch.arange(_CLASSES).repeat_interleave(torch.tensor([4, 9, 3, 5, 6, 2, 8]))
    return make_dataset(labels[torch.randperm(37, generator=torch.Generator().manual_seed(3))])


# -- a task that is learned, and forgotten, in an epoch or two ------------------------------------

_PLACES = 3


@pytest.fixture(scope="session")
def patches() -> Callable[..., TensorImages]:
    """Makes images of 3 classes; the class is the place of a bright square."""

    def make(per_class: int = 40, seed: int = 0) -> TensorImages:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(_PLACES).repeat(per_class)
        images = 0.1 * torch.rand(len(labels), 1, 6, 6, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[0, 2 * label : 2 * label + 2] += 0.8
        return TensorImages(images, labels, [str(c) for c in range(_PLACES)])

    return make


@pytest.fixture(scope="session")
def linear() -> Callable[..., nn.Module]:
    """Makes a network that knows all of them but ``forgotten``, which never wins."""

    def make(forgotten: int | None = None) -> nn.Module:
        head = nn.Linear(36, _PLACES)
        with torch.no_grad():
            head.weight.zero_()
            for label in range(_PLACES):
                head.weight[label, 12 * label : 12 * label + 12] = 1.0
            head.bias.zero_()
            if forgotten is not None:
                head.bias[forgotten] = -20.0
        return nn.Sequential(nn.Flatten(), head)

    return make


# -- numerics of Triton's kernels, in its interpreter ---------------------------------------------


@pytest.fixture
def interpreted(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs Python, or pytest, with Triton's interpreter switched on.

    In a process of its own: kernels are decorated for the interpreter, or for the compiler.
    """

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
        if words[:2] == ("-m", "pytest"):  # the test that runs it has its own time limit
            words += ("-q", "--no-header", "--override-ini=addopts=", "-p", "no:cacheprovider")
        switched = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,  # not the repository: `-m` puts the working directory on sys.path
            env={**os.environ, **switched},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )

    return run


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fresh memory reads as NaN: what a kernel forgets to write fails the comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)

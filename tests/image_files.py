"""Writes small image files in the formats that data sets come in."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CLASS_NAMES = ("ant", "bee", "cat")


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 36), mode: str = "RGB") -> Path:
    """A random smooth image; the file name's suffix chooses the format."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).convert(mode).save(path)
    return path


def write_class_folders(root: Path) -> Path:
    """`train/` with 6 and `val/` with 2 images for each of three classes, in five formats."""
    suffixes = ("jpg", "png", "gif", "webp", "bmp", "JPEG")
    for label, name in enumerate(CLASS_NAMES):
        for number in range(6):
            write_image(root / "train" / name / f"{number}.{suffixes[number]}", 10 * label + number)
        for number in range(2):
            write_image(root / "val" / name / f"{number}.jpg", 100 + 10 * label + number)
    return root


def truncate(path: Path, keep: float = 0.5) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def write_idx(path: Path, values: np.ndarray) -> None:
    content = bytes([0, 0, 8, values.ndim])
    content += np.array(values.shape, dtype=">i4").tobytes() + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


WORDNET = ("n01443537", "n01629819", "n02056570")


def write_tiny_imagenet(root: Path) -> Path:
    """Four training and two validation images of each of three classes, one without a label."""
    for number, name in enumerate(WORDNET):
        for image in range(4):
            folder = root / "train" / name
            write_image(folder / "images" / f"{name}_{image}.JPEG", 10 * number + image)
        (folder / f"{name}_boxes.txt").write_text("x")
    lines = []
    for number in range(6):
        write_image(root / "val" / "images" / f"val_{number}.JPEG", 100 + number)
        lines.append(f"val_{number}.JPEG\t{WORDNET[number * 2 % 3]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    write_image(root / "test" / "images" / "test_0.JPEG", 7)
    return root


def write_tar(path: Path, members: dict[str, bytes], compression: str = "") -> Path:
    """A WebDataset shard, or an archive; `compression` is tarfile's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, f"w:{compression}") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pack_folder(root: Path, packed: Path, order: list[str] | None = None) -> Path:
    """The images of `root/<part>/<class>/` as shards `packed/<part>/0.tar`, in the same order.

    Classes have the numbers of `order`, by default of their sorted names.
    """
    for part in sorted(path for path in root.iterdir() if path.is_dir()):
        members = {}
        names = order or sorted(path.name for path in part.iterdir())
        for folder in sorted(part.iterdir()):
            label = names.index(folder.name)
            for image in sorted(folder.iterdir()):
                key = f"{folder.name}-{image.stem}-{image.suffix[1:].swapcase()}"
                members[f"{key}{image.suffix}"] = image.read_bytes()
                members[f"{key}.cls"] = str(label).encode()
        write_tar(packed / part.name / "0.tar", members)
        (packed / "classes.txt").write_text("\n".join(names) + "\n")
    return packed

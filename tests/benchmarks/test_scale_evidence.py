"""benchmarks/scale_evidence.py at a size that takes seconds."""

import json

import pytest
import render
import scale_evidence
import torch

from wfnet.benchmarking.provenance import commit
from wfnet.untraining import optimizers


def test_a_part_keeps_what_the_file_has_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    path = tmp_path / "scale_cpu.json"
    path.write_text(json.dumps({"ranks": {"steps": 6}}))
    scale_evidence.main(
        ["--parts", "evaluation", "--images", "40", "--classes", "20", "--output", str(path)]
    )
    written = json.loads(path.read_text())
    assert written["ranks"] == {"steps": 6}
    found = written["evaluation"]
    assert (found["images"], found["classes"], found["commit"]) == (40, 20, commit())
    assert found["cpu_seconds"] > 0
    assert found["mebibytes_before"] > 50
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert render.many_classes().startswith("40 images x 20 rows (8 x 8 pixels, a ResNet-8")
    assert render.rounding() == "Not run."


def test_rounding_to_nearest_is_the_optimisers_without_its_noise():
    values = torch.full((1, 1000), 1 + 2**-10)
    key = torch.arange(1).view(1, 1), torch.ones(1, 1), 0
    assert 0 < (optimizers.stochastic_round(values, torch.bfloat16, *key) != 1).sum() < 1000
    with scale_evidence.rounding_to_nearest():
        assert (optimizers.stochastic_round(values, torch.bfloat16, *key) == 1).all()
    with pytest.raises(KeyError), scale_evidence.rounding_to_nearest():
        raise KeyError
    assert (optimizers.stochastic_round(values, torch.bfloat16, *key) != 1).any()

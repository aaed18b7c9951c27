"""The history of a run: files, progress, TensorBoard, a callback."""

import csv
import importlib
import json

from wfnet import WFNet


def test_files_progress_and_callback_without_tensorboard(
    go, base, runs, tmp_path, monkeypatch, capsys, caplog
):
    real_import = importlib.import_module

    def refuse(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(importlib, "import_module", refuse)
    records = []
    about = {"progress": True, "log": records.append, "log_interval": 1e-6}
    net, result = go(tmp_path, None, runs.bars(4, 1), steps=16, **about)
    assert records == result.history
    assert result.filters == tmp_path
    runs.assert_same_filters(WFNet.from_pretrained(tmp_path, base), net)
    content = json.loads((tmp_path / "history.json").read_text())
    assert content["config"]["steps"] == 16
    assert content["history"] == result.history
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [record["step"] for record in result.history]
    assert {"acc_r", "acc_f", "score", "loss", "retain", "forget", "lr"} <= set(rows[0])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "tensorb"))]
    assert f"{tmp_path} holds no checkpoint: the run starts from the beginning" in caplog.text
    lines = [line for line in capsys.readouterr().err.splitlines() if "untraining" in line]
    assert len(lines) >= 16
    for word in ("retain", "forget", "Acc_r", "Acc_f", "samples/s"):
        assert word in lines[-1]

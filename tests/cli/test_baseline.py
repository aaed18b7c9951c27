import pytest

from wfnet.cli import main

SMALL = ["--model-kwargs", "width=8", "--workers", "0", "--quiet"]


def test_bad_settings_of_baselines(digits_run, capsys, fails):
    run = digits_run
    with pytest.raises(SystemExit):
        main(["baseline", str(run), "--set", "retrained=3"])
    assert "METHOD.NAME=VALUE" in capsys.readouterr().err
    fails(["baseline", run, "--set", "random_labels.lr=high", *SMALL], "must be like")
    fails(["baseline", run, "--set", "random_labels.lr=-1", *SMALL], "above 0, got -1")
    fails(["baseline", run, "--set", "retrained.lr=0.1", *SMALL], "would change nothing")
    fails(["baseline", run, "--set", "neggrad_plus.epochs=1.5", *SMALL], "whole number")
    for method in ("neggrad_plus", "random_labels"):
        call = ["baseline", run, "--methods", method, "--set", "negative_gradient.lr=1", *SMALL]
        fails(call, "negative_gradient is not among --methods")
    fails(["baseline"], "name the folder of a run")
    fails(["train", "--config", "digits/resnet"], "--output DIR")
    fails(["train", "--config", "digits/resnet", "--output", run], "--force")

import json
from dataclasses import replace

import pytest

from wfnet.baselines import METHODS, Origin, tune, tuning, unlearn

PLAIN = replace(METHODS["random_labels"].defaults, epochs=10, batch_size=20, max_norm=10.0)


def test_the_best_settings_are_taken_and_trials_are_kept(patches, linear, tmp_path, monkeypatch):
    origin, validation = Origin(linear(), patches()), patches(10, seed=1)
    made, path = [], tmp_path / "tuning.json"

    def spy(method, origin, label, config):
        made.append((config.lr, label))
        if config.lr == 0.03 and label == 2:
            raise FloatingPointError
        if len(made) == 3:
            raise KeyboardInterrupt
        return unlearn(method, origin, label, config)

    monkeypatch.setattr(tuning, "unlearn", spy)
    arguments = "random_labels", origin, validation, [0, 2], PLAIN
    with pytest.raises(KeyboardInterrupt):
        tune(*arguments, records=path)
    config, tried = tune(*arguments, records=path)
    assert len(made) == len(tried) + 1 == 9
    assert [one["settings"]["lr"] for one in tried[::2]] == [0.003, 0.001, 0.01, 0.03]
    assert tried[-1]["acc_r"] is None  # left out, however good its other class was
    gains = {one["settings"]["lr"]: one["acc_r"] - one["acc_f"] for one in tried[:6]}
    assert config == replace(PLAIN, lr=max(gains, key=gains.get))
    assert max(gains.values()) > min(gains.values())
    assert len(json.loads(path.read_text())["records"]) == 8
    assert tune(*arguments, fixed=["lr"]) == (PLAIN, [])
    with pytest.raises(ValueError, match="records of other settings"):
        tune(*arguments[:-1], replace(PLAIN, epochs=1), records=path)
    monkeypatch.setitem(METHODS, "random_labels", METHODS["scrub"])

    def diverge(*arguments):
        raise FloatingPointError

    monkeypatch.setattr(tuning, "unlearn", diverge)
    with pytest.raises(FloatingPointError, match="none of the 6 settings"):
        tune("scrub", *arguments[1:-1], METHODS["scrub"].defaults)

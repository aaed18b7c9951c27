"""Reading minibatches: what was done is saved where reading fails."""

import pytest

from wfnet.untraining.run_state import CHECKPOINT_NAME, read_checkpoint


def test_where_reading_fails_the_run_goes_on_after_the_last_step(go, runs, tmp_path):
    def fail():
        raise RuntimeError("a disk is lost")

    train = runs.InMemory(runs.bars(), runs.at_call(4, 6, fail))
    with pytest.raises(RuntimeError, match="a disk is lost"):
        go(tmp_path, train, checkpoint_every=1000)
    assert read_checkpoint(tmp_path / CHECKPOINT_NAME)[1]["step"] == 5
    runs.assert_same_run(*go(tmp_path), *go())

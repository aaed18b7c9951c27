"""Reading minibatches: what was done is saved where reading fails."""

import os
import signal

import pytest
import torch

from wfnet.data.loading import LostWorker
from wfnet.untraining.checkpoints import Checkpoints


def test_a_lost_data_worker_ends_the_run_after_a_checkpoint(go, runs, tmp_path, monkeypatch):
    """Killed in the middle of the run, as for lack of memory; the run goes on where it was."""
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.1,))  # seconds until noticed
    main_process, read = os.getpid(), []

    def kill(index):
        read.append(index)
        if len(read) > 18 and os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(LostWorker, match="a data worker died"):
        go(tmp_path, runs.Files(runs.bars(), kill), workers=1, checkpoint_every=1000)
    assert Checkpoints(tmp_path).load()[1]["step"] >= 1
    runs.assert_same_run(*go(tmp_path, runs.Files(runs.bars())), *go())

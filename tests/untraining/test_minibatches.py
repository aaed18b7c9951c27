"""Reading minibatches: unreadable images are replaced, lost workers too, errors are plain."""

import os
import signal

import pytest
import torch

from wfnet import untrain
from wfnet.data import CorruptImages
from wfnet.data.loading import LostWorker
from wfnet.services.ranks import Ranks
from wfnet.untraining.checkpoints import Checkpoints
from wfnet.untraining.minibatches import MinibatchReader, TrainingData


def reader(runs, dataset, ranks=None, **changes) -> MinibatchReader:
    config = runs.config(**changes)
    data = TrainingData.of(dataset, runs.CLASSES, config)
    return MinibatchReader(data, config, ranks or Ranks(shared=False), CorruptImages(100), False)


def read(reader, stop=3):
    return list(reader.shares(0, stop))


@pytest.mark.parametrize("share_images", [True, False])
def test_an_unreadable_image_is_replaced_by_one_of_its_class(runs, share_images):
    data, corrupt = runs.images(), {*range(12), 20, 31}
    changes = {"batch_size": 12 if share_images else 6, "share_images": share_images}
    broken = reader(runs, runs.corrupted(data, corrupt), **changes)
    whole = read(reader(runs, data, **changes), 9)
    of_image = {image.numpy().tobytes(): i for i, image in enumerate(data.batch(range(48)).images)}
    replaced = 0
    for share, expected in zip(read(broken, 9), whole, strict=True):
        assert torch.equal(share.batch.forget, expected.batch.forget)
        assert torch.equal(share.batch.target, expected.batch.target)
        for image, other in zip(share.images, expected.images, strict=True):
            found, meant = (of_image[i.numpy().tobytes()] for i in (image, other))
            assert found not in corrupt
            assert data.labels[found] == data.labels[meant]
            replaced += found != meant
    assert replaced >= 5
    assert set(broken.corrupt.found) <= {f"image {i}" for i in corrupt}
    with pytest.raises(RuntimeError, match="no image of the class of image"):
        read(reader(runs, runs.corrupted(data, set(range(2, 48, 6)))))


class Rank(Ranks):
    """One of several ranks, without the others."""

    def __init__(self, rank, size):
        self.rank, self.size, self.host = rank, size, None


@pytest.mark.parametrize("images", [4, 3])
def test_shares_of_ranks_make_up_the_minibatch(runs, images):
    data, changes = runs.images(), {"batch_size": 2 * images}
    for whole, *shares in zip(
        read(reader(runs, data, **changes)),
        *(read(reader(runs, data, Rank(rank, 2), **changes)) for rank in range(2)),
        strict=True,
    ):
        samples = {
            (row, target, image.sum().item())
            for share in shares
            for row, target, image in zip(
                share.batch.forget.tolist(),
                share.batch.target.tolist(),
                share.images[share.batch.source],
                strict=True,
            )
        }
        batch = whole.batch
        sums = whole.images.sum((1, 2, 3))[batch.source].tolist()
        expected = zip(batch.forget.tolist(), batch.target.tolist(), sums, strict=True)
        assert samples == set(expected)
        assert sum(len(share.batch) for share in shares) == len(batch)
        assert sum(share.batch.forget_size for share in shares) == batch.forget_size
        assert all(torch.equal(share.rows, whole.rows) for share in shares)


# -- broken ---------------------------------------------------------------------------------------


def test_a_lost_data_worker_ends_the_run_after_a_checkpoint(runs, tmp_path, monkeypatch):
    """Killed in the middle of the run, as for lack of memory; the run goes on where it was."""
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.1,))  # seconds until noticed
    main_process, read = os.getpid(), []

    def kill(index):
        read.append(index)
        if len(read) > 18 and os.getpid() != main_process:
            os.kill(os.getpid(), signal.SIGKILL)

    def go(train, folder, workers=0):
        net, settings = runs.network(), runs.config(workers=workers, checkpoint_every=1000)
        return net, untrain(net, train, None, settings, folder, True, False)

    with pytest.raises(LostWorker, match="a data worker died"):
        go(runs.Files(runs.images(), kill), tmp_path, workers=1)
    assert Checkpoints(tmp_path).load()[1]["step"] >= 1
    runs.assert_same_run(*go(runs.Files(runs.images()), tmp_path), *go(runs.images(), None))

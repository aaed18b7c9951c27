import pytest
import torch

from wfnet.evaluation.confusion import ConfusionChange, confusion_change
from wfnet.evaluation.pair_engine import RunOptions

K = 7
QUIET = RunOptions(batch_size=9, progress=False)


@torch.no_grad()
def test_counts_are_those_of_one_image_at_a_time(make_net, dataset):
    net = make_net(spread=5.0).eval()
    found = confusion_change(net, dataset, options=QUIET)
    own, original, correct = (torch.zeros(K, K, dtype=torch.int64) for _ in range(3))
    images = dataset.batch(torch.arange(len(dataset))).images
    for image, label in zip(images, dataset.labels.tolist(), strict=True):
        original[label, net(image[None]).argmax()] += 1
        for row in range(K):
            guess = net(image[None], forget=row).argmax().item()
            correct[row, label] += guess == label
            if row == label:
                own[row, guess] += 1
    assert torch.equal(found.destinations, own)
    assert torch.equal(found.original_destinations, original)
    assert torch.equal(found.correct, correct)
    count = dataset.labels.bincount()
    assert torch.equal(found.seen, count.expand(K, K))
    change = found.collateral()
    assert change.diagonal().isnan().all()
    assert change[1, 3].item() == pytest.approx((correct[1, 3] - original[3, 3]).item() / count[3])
    assert found.shares().sum(1).tolist() == pytest.approx([1.0] * K)


def test_some_rows_and_some_other_rows_and_their_file(make_net, dataset, tmp_path):
    rows, path = [4, 1, 2], tmp_path / "confusion.json"
    found = confusion_change(make_net(), dataset, rows, other_rows=1, options=QUIET)
    whole = confusion_change(make_net(), dataset, options=QUIET)
    assert torch.equal(found.destinations, whole.destinations[rows])
    assert int(found.seen.sum()) == found.destinations.sum() + len(dataset)
    found.to_json(path)
    again = ConfusionChange.from_json(path)
    assert again.names == found.names
    for name in ("classes", "destinations", "original_destinations", "seen", "correct"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    path.write_text('{"format": 1}')
    with pytest.raises(ValueError, match="not a confusion table of"):
        ConfusionChange.from_json(path)

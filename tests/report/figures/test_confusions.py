import pytest
import torch

from wfnet.evaluation.confusion import ConfusionChange
from wfnet.report.figures import confusion


@pytest.mark.parametrize("classes", [5, 300])
def test_maps_of_the_largest_values(drawn, tmp_path, classes):
    generator = torch.Generator().manual_seed(0)
    size = (classes, classes)
    destinations = (torch.rand(size, generator=generator) < 4 / classes).long()
    original = torch.eye(classes, dtype=torch.int64) * 4 + destinations
    hits = torch.randint(0, 3, size, generator=generator)
    names = [f"a class with a long name, {k}" for k in range(classes)]
    counts = (torch.arange(classes), destinations, original, torch.full(size, 2), hits)
    change = ConfusionChange(names, *counts)
    confusion(change, tmp_path / "confusion.png")
    assert max(len(a.get_xticks()) + len(a.get_yticks()) for a in drawn[0].axes) <= 40
    if classes == 5:
        shown = torch.from_numpy(drawn[0].axes[0].images[0].get_array().data)
        torch.testing.assert_close(shown, 100 * change.shares())

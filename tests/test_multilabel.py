"""Images with several labels each: reading, expansion, objective, untraining."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import wfnet
from wfnet.data import MultiLabelTensors, multi_hot_of, open_data, select
from wfnet.data.multi_hot import MultiLabelFiles, rarest_labels
from wfnet.untraining.multilabel import (
    MultiLabelObjective,
    bernoulli_divergence,
    expand_multi_label,
)
from wfnet.untraining.objectives import BalancedObjective, PaperObjective

K = 7


def random_labels(count, classes=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    multi_hot = torch.rand(count, classes, generator=generator) < 0.35
    multi_hot[:, 0] |= ~multi_hot.any(1)
    multi_hot[multi_hot.all(1), 1] = False
    return multi_hot


def tensors(count=24):
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    names = [f"name{i}" for i in range(K)]
    return MultiLabelTensors(images, random_labels(count), names, mean=0.5, std=0.2)


# -- data -----------------------------------------------------------------------------------------


def test_the_rarest_true_label_stands_for_an_image():
    multi_hot = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0]]).bool()
    assert rarest_labels(multi_hot).tolist() == [1, 0, 2, 1]
    with pytest.raises(ValueError, match="image 1 has no label"):
        rarest_labels(torch.tensor([[1, 0], [0, 0]]).bool())
    with pytest.raises(ValueError, match="image 0 has every label"):
        rarest_labels(torch.tensor([[1, 1], [1, 0]]).bool())


def test_labels_stay_with_their_images():
    dataset = tensors()
    chosen = torch.tensor([5, 2, 9])
    part = select(dataset, chosen)
    assert torch.equal(multi_hot_of(part), dataset.multi_hot[chosen])
    assert torch.equal(part.labels, dataset.labels[chosen])
    assert part.multi_hot.gather(1, part.labels.unsqueeze(1)).all()
    subset = torch.utils.data.Subset(dataset, [3, 1])
    assert torch.equal(multi_hot_of(subset), dataset.multi_hot[[3, 1]])
    with pytest.raises(ValueError, match=r"multi_hot must be \[2, 3\]"):
        MultiLabelTensors(torch.rand(2, 1, 4, 4), torch.ones(2, 2), list("abc"))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        for name in ("a.png", "more/b.png", "c.png", "d.png", "e.png", "f.png", "g.png"):
            picture(tmp_path / part / name)
    (tmp_path / "train/labels.csv").write_text(
        "image,labels\na.png,cat;dog\nmore/b.png,cat\nc.png,\nd.png,bee\ne.png,cat;dog\nf.png,bee\n"
        "g.png,cat\n"
    )
    (tmp_path / "val/labels.json").write_text('{"a.png": ["dog"], "d.png": ["cat", "bee"]}')
    return tmp_path


def test_a_folder_of_images_beside_a_file_of_labels(folder, caplog):
    data = open_data(folder, image_size=8, channels=1, validation_fraction=0.5)
    assert data.classes == ["bee", "cat", "dog"]
    assert "1 images have no label" in caplog.text
    val = data.test
    assert isinstance(val, MultiLabelFiles)
    assert val.multi_hot.tolist() == [[False, False, True], [True, True, False]]
    assert val.name_of(1).endswith("d.png")
    image, label = val[1]
    assert image.shape == (1, 8, 8)
    assert val.multi_hot[1, label]
    cached = open_data(folder, image_size=8, channels=1, cache="host").test
    assert torch.equal(multi_hot_of(cached), val.multi_hot)
    assert torch.equal(multi_hot_of(cached.select(torch.tensor([1]))), val.multi_hot[1:])
    assert torch.equal(cached[1][0], image)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,tags\na.png,cat\n", "columns are"),
        ("image,labels\n", "names no images"),
        ("image,labels\nz.png,cat;dog\n", r"z\.png does not exist"),
        ("image,labels\na.png,cat\n", "at least 2"),
        ("image,labels\na.png,cat;dog\n", "every label"),
    ],
)
def test_a_bad_file_of_labels_is_refused(folder, content, message):
    (folder / "train/labels.csv").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_data(folder)


def test_a_label_that_only_one_part_knows_is_refused(folder):
    (folder / "val/labels.json").write_text('{"a.png": ["fox"]}')
    with pytest.raises(ValueError, match="class 'fox', unknown to the other parts"):
        open_data(folder)
    (folder / "val/labels.json").write_text('{"a.png": "dog"}')
    with pytest.raises(ValueError, match="labels must be lists"):
        open_data(folder)


# -- expansion and objective ----------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
def test_rows_are_true_labels_in_one_half_and_lacking_ones_in_the_other(share):
    multi_hot = random_labels(10)
    generator = torch.Generator().manual_seed(0)
    batch = expand_multi_label(multi_hot, 3, generator, share_images=share)
    forget = 10 if share else 5
    assert batch.forget_size == forget
    assert len(batch) == forget + 3 * (10 if share else 5)
    truth = multi_hot[batch.source]
    assert torch.equal(batch.target, truth.float())
    own = truth.gather(1, batch.forget.unsqueeze(1)).squeeze(1)
    assert own[batch.forget_half].all()
    assert not own[batch.retain_half].any()


def test_every_true_label_of_an_image_is_drawn():
    multi_hot = torch.tensor([[1, 1, 0, 1, 0]]).bool()
    seen = torch.zeros(2, 5)
    for seed in range(300):
        batch = expand_multi_label(multi_hot, 1, torch.Generator().manual_seed(seed), True)
        seen[0, batch.forget[0]] += 1
        seen[1, batch.forget[1]] += 1
    assert (seen[0][multi_hot[0]] > 70).all()  # about 100 of 300 each
    assert (seen[1][~multi_hot[0]] > 110).all()  # about 150 each


@pytest.mark.parametrize("distil", [True, False])
def test_objective_is_its_definition(distil, make_net):
    net = make_net()
    multi_hot = random_labels(6)
    batch = expand_multi_label(multi_hot, 2, torch.Generator().manual_seed(1), True)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(len(batch), K, dtype=torch.float64, generator=generator)
    original = torch.randn(6, K, dtype=torch.float64, generator=generator)
    objective = MultiLabelObjective(BalancedObjective(0.4, distil))
    losses = objective(logits, batch, original if distil else None, net)
    forget, retain = [], []
    truth = multi_hot[batch.source]
    for b in range(len(batch)):
        row, image = int(batch.forget[b]), int(batch.source[b])
        unlearns = b < batch.forget_size
        if unlearns:
            lacking = [original[s, row].item() for s, has in zip(batch.source, truth[:, row],
                       strict=True) if not has]  # fmt: skip
            level = sum(lacking) / max(len(lacking), 1) if distil else 0.0
            forget.append(-math.log(1 - (logits[b, row] - level).sigmoid().item()))
        cost = 0.0
        for k in range(K):
            if unlearns and k == row:
                continue
            q = logits[b, k].sigmoid().item()
            p = original[image, k].sigmoid().item() if distil else float(multi_hot[image, k])
            cost += p * (math.log(p) if distil else 0) - p * math.log(q) - (1 - p) * math.log(1 - q)
            cost += (1 - p) * math.log(1 - p) if distil else 0.0
        retain.append(cost)
    expected = sum(retain) / len(retain) + 0.4 * sum(forget) / len(forget)
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)


def test_the_forget_term_has_a_gradient_where_the_network_is_sure():
    objective = MultiLabelObjective(BalancedObjective())
    for margin in (0.0, 10.0, 100.0):
        z = torch.tensor([margin], requires_grad=True)
        objective.forget(z, None).sum().backward()
        assert z.grad.item() == pytest.approx(torch.tensor(margin).sigmoid().item())
    paper = MultiLabelObjective(PaperObjective())
    z = torch.tensor([1.5])
    assert paper.forget(z, None).item() == pytest.approx(
        F.binary_cross_entropy_with_logits(z, torch.ones(1)).item()
    )
    assert not paper.needs_original
    same = torch.tensor([-80.0, -3.0, 0.0, 90.0])
    assert bernoulli_divergence(same, same).abs().max() == 0


# -- untraining ---------------------------------------------------------------------------------


def test_untraining_repeats_and_resumes(tmp_path, make_net):
    config = wfnet.UntrainConfig.recipe("balanced", K, steps=6, batch_size=8, checkpoint_every=3)
    dataset, found = tensors(), []
    for _ in range(2):
        net = make_net(spread=0.1)
        result = wfnet.untrain(net, dataset, dataset, config, progress=False)
        found.append((result.best, torch.cat([p.flatten() for p in net.filter_parameters()])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert 0 < found[0][0].acc_r <= 1

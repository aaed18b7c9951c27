"""The untraining step: gradients in one matrix, accumulation, no waits for a device."""

import collections

import pytest
import torch
from torch import nn

import wfnet
from wfnet import UntrainConfig, models, untrain
from wfnet.data import open_data
from wfnet.gate_tables import flat_matrix, flatten_filters
from wfnet.untraining.expansion import expand
from wfnet.untraining.objectives import BalancedObjective, PaperObjective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep
from wfnet.wrapping import wrap

CLASSES = 6


@pytest.fixture
def network(runs):
    def make(fuse: bool = True, dtype: torch.dtype = torch.float32) -> wfnet.WFNet:
        torch.manual_seed(0)
        net = wfnet.WFNet(runs.BarNet(CLASSES).eval(), CLASSES, fuse=fuse).to(dtype)
        for parameter in net.filter_parameters():
            nn.init.normal_(parameter, 1.0, 1.0)
        return net

    return make


def minibatch(seed: int, n: int = 6, dtype: torch.dtype = torch.float32, compound: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 8, 8, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return images, expand(labels, CLASSES, 2, generator, share_images=True, compound=compound)


def step_of(net: wfnet.WFNet, objective=None, **options) -> UntrainingStep:
    optimizer = RowAdam(net.filter_parameters(), lr=0.1)
    return UntrainingStep(net, objective or BalancedObjective(), optimizer, **options)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    ("objective", "compound"), [(BalancedObjective(), 0.5), (PaperObjective(), 0.0)]
)
def test_gradients_are_those_of_an_ordinary_loop(network, fuse, objective, compound):
    net, plain = network(fuse, torch.float64), network(False, torch.float64)
    images, batch = minibatch(1, dtype=torch.float64, compound=compound)
    original = plain(images) if objective.needs_original else None
    logits = plain(images, batch.forget, batch.source)
    expected = objective(logits, batch, original, plain)
    expected.total.backward()
    with flatten_filters(net.filter_parameters()):
        step = step_of(net, objective)
        step.gradient.fill_(torch.nan)  # what is not written would stay
        losses = step.differentiate([(images, batch)])
        torch.testing.assert_close(losses.total, expected.total.detach())
        assert flat_matrix([p.grad for p in net.filter_parameters()]) is not None
        for name, parameter in plain.named_filters().items():
            found = net.named_filters()[name].grad
            torch.testing.assert_close(found, parameter.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_accumulated_gradients_are_the_mean(network):
    with flatten_filters((net := network()).filter_parameters()):
        step = step_of(net)
        parts = [minibatch(seed) for seed in range(3)]
        alone = []
        for part in parts:
            step.differentiate([part])
            alone.append(step.gradient.clone())
        losses = step.differentiate(parts)
        torch.testing.assert_close(step.gradient, sum(alone) / 3)
        single = [step.differentiate([part]).total for part in parts]
        torch.testing.assert_close(losses.total, torch.stack(single).mean())
        parts = [minibatch(seed, compound=0.5) for seed in range(3)]
        step.differentiate(parts)
        labels = torch.cat([batch.rows for _, batch in parts]).unique()
        assert step.occurred[:-1].nonzero().flatten().tolist() == labels.tolist()


def test_filters_stay_visible_while_flat(network):
    net = network()
    params = net.filter_parameters()
    before = torch.cat([p.detach() for p in params], 1)
    with flatten_filters(params) as flat:
        flat.add_(1)
        net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
        assert torch.equal(flat, before + 2)
    assert torch.equal(torch.cat([p.detach() for p in net.filter_parameters()], 1), before + 2)
    assert all(p.is_contiguous() for p in params)


def test_what_cannot_be_a_step_is_refused(network):
    net = network()
    with pytest.raises(ValueError, match="flatten_filters"):
        step_of(net)
    with (
        flatten_filters(net.filter_parameters()),
        pytest.raises(ValueError, match="cannot be captured: CUDA graphs need a CUDA device"),
    ):
        step_of(net, capture=True)


# -- a run on a device: the host waits only where it must -----------------------------------------


@pytest.fixture
def opened(image_folder, tmp_path):
    """Images of three classes for a device that is pretended: it finds every wait."""

    def images(cache="device", augment=False):
        about = {"cache": cache, "cache_dir": tmp_path, "augment": augment, "device": "cuda"}
        return open_data(image_folder, image_size=16, validation_fraction=0.34, **about)

    return images


@pytest.fixture
def waits_of(pretended_device):
    """Places that waited in a run of so many steps, and how often."""

    def run(data, steps, validation=None, dtype=torch.float32, **changes):
        net = wrap(models.create("resnet", 3, 3, seed=0, width=8), 3, filter_dtype=dtype).to("cuda")
        changes = {"amp": "bfloat16", "fuse": False, "validations_per_epoch": 0.01, **changes}
        changes["min_validations"] = 1
        config = UntrainConfig.recipe("balanced", 3, steps=steps, batch_size=4, **changes)
        pretended_device.waits.clear()
        assert untrain(net, data.train, validation, config, progress=False).steps == steps
        return collections.Counter(pretended_device.waits)

    return run


@pytest.mark.parametrize(
    ("cache", "augment", "settings"),
    [
        (None, True, {"capture": False}),
        ("disk", True, {}),
        ("device", False, {"capture": False, "dtype": torch.bfloat16, "grad_accum_steps": 2}),
    ],
)
def test_no_step_waits_for_the_device(waits_of, opened, cache, augment, settings):
    """Twice as many steps wait no more often: for no image, no label and no loss."""
    data = opened(cache, augment)
    once = waits_of(data, 8, **settings)  # fills the cache
    assert once, "a run waits at least for its last losses"
    few, many = (waits_of(data, steps, **settings) for steps in (8, 16))
    assert many == few, many - few


def test_losses_are_read_in_one_piece_and_a_validation_waits_for_no_batch(
    waits_of, opened, monkeypatch
):
    """25 steps are looked at once, not number by number."""
    data, found = opened(), []
    few = waits_of(data, 24)  # fills the cache
    more = waits_of(data, 60) - few
    assert sum(more.values()) <= 4, more
    assert {place for _, place in more} <= {"history.py:read"}
    waits_of(data, 1, data.validation)
    for pairs in (6, 3):
        monkeypatch.setattr("wfnet.untraining.validation.PAIRS_PER_PASS", pairs)
        found.append(waits_of(data, 1, data.validation))
    assert found[0] == found[1]

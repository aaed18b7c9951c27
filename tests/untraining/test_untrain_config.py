"""Settings: ranges, choices, lengths and the shipped recipes."""

import dataclasses
import math

import pytest

from wfnet import UntrainConfig
from wfnet.services.settings import Number, attribute_texts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "steps or as epochs"),
        ({"epochs": 1.0}, "steps or as epochs"),
        ({"batch_size": 7}, "batch_size must be even"),
        ({"objective": "durable"}, "batch_size=32 must be a multiple of .* = 40"),
        ({"objective": "durable", "batch_size": 40, "compound": 0.5}, "to at least 80"),
        ({"optimizer": "sgd", "shrink": 0.1}, "shrink is a part of optimizer='row_adam'"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        UntrainConfig(**{"steps": 20, **changes})


@pytest.mark.parametrize("field", dataclasses.fields(UntrainConfig), ids=lambda field: field.name)
def test_every_setting_refuses_what_makes_no_sense(field):
    values = field.metadata["values"]
    if field.name == "classes":
        wrong = ([], ["a"], [-1], [1.5], 3)
    elif field.name == "cache_dir":
        wrong = (7, math.nan)
    elif isinstance(values, Number):
        wrong = (math.nan, -1e30, 1e30, "3", [1], True, *((2.5,) if values.whole else ()))
    else:
        wrong = ("nonsense", 7, math.nan)
    for value in wrong:
        length = {} if field.name in ("steps", "epochs") else {"steps": 20}
        with pytest.raises(ValueError, match=field.name):
            UntrainConfig(**length, **({field.name: value}))


def test_the_docstring_explains_every_setting():
    names = [field.name for field in dataclasses.fields(UntrainConfig)]
    assert list(attribute_texts(UntrainConfig)) == names


def test_lengths_and_sizes():
    config = UntrainConfig(epochs=0.5, batch_size=8, label_expansion=3, grad_accum_steps=2)
    assert (config.images, config.samples) == (4, 16)
    assert config.steps_per_epoch(96) == 12
    assert config.total_steps(96) == 6
    assert UntrainConfig(steps=7, batch_size=8, share_images=False).images == 8
    assert UntrainConfig(steps=7, batch_size=8, compound=0.5).samples == 16 + 4 + 2
    default = UntrainConfig.recipe(num_classes=10)
    assert default.steps_between_validations(54_000) == default.steps // 10
    assert default.steps_between_validations(1257) == 16  # five an epoch, where that is more


def test_the_learning_rate_decays_and_shrinking_ends_before():
    config = UntrainConfig(steps=10, lr=2.0, lr_final=0.1, shrink=0.15)
    assert config.lr_at(0, 10) == 2
    assert config.lr_at(5, 10) == pytest.approx(1.1)
    assert config.lr_at(10, 10) == pytest.approx(0.2)
    assert [config.shrink_at(step, 10) for step in (0, 6, 7, 9)] == [0.15, 0.15, 0, 0]
    assert UntrainConfig(steps=10, lr=2.0, schedule="constant").lr_at(9, 10) == 2


def test_recipes():
    ten, hundred = (UntrainConfig.recipe(num_classes=k) for k in (10, 100))
    assert (ten.objective, ten.compound, ten.shrink) == ("balanced", 0.5, 0.15)
    durable = [UntrainConfig.recipe("durable", transformer=linear) for linear in (False, True)]
    assert [(c.steps, c.match, c.shrink) for c in durable] == [(450, 0.1, 0), (630, 0, 0.07)]
    crowded = UntrainConfig.recipe("durable", 100)
    assert (crowded.steps, crowded.match, crowded.margin, crowded.compound) == (4000, 0, 1.5, 0)
    assert UntrainConfig.recipe(num_classes=2).compound == 0
    assert hundred.steps > ten.steps
    assert hundred.lr < ten.lr
    assert UntrainConfig.recipe(num_classes=100, batch_size=64).steps == hundred.steps // 2
    paper = UntrainConfig.recipe("paper")
    assert (paper.lr, paper.clip, paper.optimizer, paper.batch_size) == (100, 3, "sgd", 32)
    assert (paper.lambda0, paper.lambda1, paper.lambda2, paper.label_expansion) == (1, 1, 1, 5)
    assert UntrainConfig.recipe(num_classes=10, epochs=2).steps is None
    with pytest.raises(ValueError, match="no recipe 'nicest'"):
        UntrainConfig.recipe("nicest")
    with pytest.raises(TypeError, match="unexpected"):
        UntrainConfig.recipe(leraning_rate=1)


def test_recipe_quick_is_few_visits_of_few_images_validated_once():
    for classes in (10, 100, 1000):
        quick = UntrainConfig.recipe("quick", classes)
        visits = quick.steps * quick.images / classes
        assert 32 <= visits <= 100
        images = quick.images_per_class * classes
        assert quick.steps_between_validations(images) == quick.steps
        # A step is about three passes of its samples; a validation one for every image and row.
        passes = quick.validation_images * (quick.validation_rows + 2)
        assert passes <= 0.15 * 3 * quick.samples * quick.steps

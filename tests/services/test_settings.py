import argparse
from dataclasses import dataclass

import numpy as np
import pytest

from wfnet.services import settings
from wfnet.services.settings import check_settings, setting


@dataclass(frozen=True)
class Config:
    steps: int | None = setting(None, settings.positive_int)
    lr: float = setting(0.1, settings.positive_float)
    schedule: str = setting("cosine", ("cosine", "constant"))

    def __post_init__(self):
        check_settings(self)


@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (settings.seed, str(2**70), "is not a whole number of at most 9223372036854775807"),
        (settings.positive_float, "nan", "'nan' is not a number above 0"),
        (settings.below_one, "1", "'1' is not a number below 1"),
    ],
)
def test_text_out_of_range_is_refused_in_one_sentence(number, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        number(text)
    assert settings.seed(str(2**63 - 1)) == 2**63 - 1
    assert isinstance(settings.fraction("1"), float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": True}, "steps must be a whole number of at least 1, got True"),
        ({"lr": "0.1"}, "lr must be a number above 0, got '0.1'"),
        ({"schedule": "step"}, "schedule='step' is not one of 'cosine', 'constant'"),
    ],
)
def test_a_configuration_refuses_values_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)
    assert Config().steps is None
    assert Config(steps=2.0).steps == Config(steps=np.int64(2)).steps == 2

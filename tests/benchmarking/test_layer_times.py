import pytest

from wfnet.backends import autotune, mixed
from wfnet.benchmarking import layer_times
from wfnet.benchmarking.roofline import Rates
from wfnet.benchmarking.steps import StepSettings, make_problem
from wfnet.cli.classifier import create_classifier

RATES = Rates(1e12, 1e11, 4)


@pytest.fixture
def problem():
    settings = StepSettings(image_size=8, batch_size=2, label_expansion=2)
    model = create_classifier("small/resnet", 10, in_channels=3, image_size=8, seed=0)
    return make_problem(model, settings)


def test_every_call_of_a_step_is_timed_and_its_work_counted(problem):
    calls, failed = layer_times.time_layers(problem, ["eager"], 2, RATES)
    assert not failed
    layers = {
        direction: [call["layer"] for call in calls if call["direction"] == direction]
        for direction in ("forward", "backward")
    }
    assert len(layers["forward"]) == len(set(layers["forward"])) == 9
    assert set(layers["backward"]) == set(layers["forward"]) - {"conv1"}
    assert all(min(call["ms"]["eager"], call["floor_ms"]) > 0 for call in calls)
    by_key = {(call["layer"], call["direction"]): call for call in calls}
    samples, pixels, channels = 3, 16, 24
    for direction in ("forward", "backward"):
        call = by_key["layer1.0.conv2", direction]
        assert call["flops"] == 2 * samples * pixels * channels * channels * 9
        least = 4 * (2 * samples * pixels * channels + channels * channels * 9)
        assert least <= call["bytes"] <= 4 * least
    # The stem is computed once per image; expanded samples read it.
    assert by_key["conv1", "forward"]["flops"] == 2 * 1 * pixels * channels * 27


def test_a_backend_that_fails_or_is_wrong_has_no_times(problem, monkeypatch):
    class Wrong(mixed.MixedEager):
        def conv2d_dgrad(self, *arguments):
            found = super().conv2d_dgrad(*arguments)
            return type(found)(*(None if t is None else 2 * t for t in found))

    candidates = autotune.default_candidates() | {"triton": Wrong()}
    monkeypatch.setattr(layer_times, "default_candidates", lambda: candidates)
    calls, failed = layer_times.time_layers(problem, ["eager", "triton", "cuda"], 1, RATES)
    assert list(failed) == ["cuda", "triton"]
    assert failed["triton"].endswith("backward: its results differ by 1.0e+00 (bound 5e-03)")
    assert failed["cuda"].startswith("conv1 forward: ")  # it is not built, or takes no fp32
    for call in calls:  # the lowest input gradient gives sums alone, which are not doubled
        right = call["direction"] == "forward" or call["layer"] == "layer1.0.conv1"
        assert set(call["ms"]) == ({"eager", "triton"} if right else {"eager"})

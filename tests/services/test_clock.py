import torch

from wfnet.services.clock import interleaved, reason_of, timed


def test_calls_take_turns_and_one_that_fails_costs_no_other():
    order = []

    def fails():
        order.append("b")
        if order.count("b") == 3:
            raise KeyError("gone")

    def clock(call):
        call()
        return float(len(order))

    calls = {"a": lambda: order.append("a"), "b": fails, "c": lambda: order.append("c")}
    times, failed = interleaved(calls, 4, clock, at_most={"c": 2})
    assert order == list("abcabcaba")
    assert times == {"a": [1.0, 4.0, 7.0, 9.0], "b": [2.0, 5.0], "c": [3.0, 6.0]}
    assert failed == {"b": "KeyError: 'gone'"}


def test_reason_of():
    errors = ValueError("first\nsecond"), RuntimeError(""), TypeError("no")
    assert [*map(reason_of, errors)] == ["first", "RuntimeError: ", "TypeError: no"]


def test_a_call_takes_time():
    assert timed(lambda: torch.ones(2**16).sum(), torch.device("cpu")) > 0

"""Searched tiles: stored by device and versions, used, ignored, searched only when asked for."""

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")

from wfnet.kernels import autotune
from wfnet.kernels.config import TARGETS, Choice, GemmConfig

H100 = TARGETS[90]
DEFAULT = Choice(GemmConfig("gather", 128, 64, 32, 8, 3), "default")
STORED = f"conv_fprop key bfloat16 default {DEFAULT.config}"
OTHER = GemmConfig("box", 64, 64, 32, 4, 4, box=(1, 8, 8))


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("WFNET_AUTOTUNE", raising=False)
    autotune._decided.clear()
    autotune._load.cache_clear()
    yield autotune.store_path(H100)
    autotune._decided.clear()
    autotune._load.cache_clear()


def choose(plan=None):
    return autotune.choose("conv_fprop", "key", torch.bfloat16, H100, DEFAULT, plan)


def put(path, config=OTHER):
    autotune._save(path, STORED, {"config": asdict(config), "ms": 0.5})


def test_stored_results_are_used_and_may_be_ignored(store, monkeypatch):
    assert choose() == DEFAULT
    put(store)
    autotune._decided.clear()
    assert choose().config == OTHER
    assert "0.5000 ms" in choose().reason
    monkeypatch.setenv("WFNET_AUTOTUNE", "0")
    assert choose() == DEFAULT


def test_results_of_several_runs_add_up(store):
    autotune._save(store, "one", {"config": None, "ms": 1})
    put(store)
    assert set(json.loads(store.read_text())) == {"one", STORED}
    assert "sm90" in store.name
    assert torch.__version__ in store.name


def test_damaged_store_is_reported_and_ignored(store, caplog):
    store.parent.mkdir(parents=True)
    store.write_text("{")
    assert choose() == DEFAULT
    assert "unreadable" in caplog.text


def test_search_needs_a_device(store, monkeypatch):
    monkeypatch.setenv("WFNET_AUTOTUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose(plan=lambda config: pytest.fail("nothing may be launched")) == DEFAULT


@pytest.mark.parametrize(("wanted", "most"), [("1", 100), ("quick", 5)])
def test_search_stores_the_fastest(store, monkeypatch, wanted, most):
    times = {}

    class Timed:
        def __init__(self, config):
            self.config = config

        def run(self):
            pass

    def bench(run, **_):
        config = run.__self__.config
        times[config] = 2.0 if config.block_n != 128 else 1.0 / config.stages
        return times[config]

    monkeypatch.setenv("WFNET_AUTOTUNE", wanted)
    monkeypatch.setattr(autotune, "_can_measure", lambda: True)
    monkeypatch.setattr(autotune.triton.testing, "do_bench", bench)
    config = choose(plan=Timed).config
    assert times[config] == min(times.values())
    assert DEFAULT.config in times
    assert 2 < len(times) <= most
    autotune._decided.clear()
    assert choose(plan=lambda c: pytest.fail("already stored")).config == config


def test_unknown_mode_is_an_error(monkeypatch):
    monkeypatch.setenv("WFNET_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="WFNET_AUTOTUNE is 'yes'"):
        autotune.mode()


@pytest.mark.parametrize("config", [DEFAULT.config, OTHER])
def test_candidates_are_valid_and_few(config):
    for found in (autotune.candidates(config), autotune.neighbours(config)):
        assert found[0] == config
        assert len(set(found)) == len(found) < 200
        assert all(c.path == config.path for c in found)

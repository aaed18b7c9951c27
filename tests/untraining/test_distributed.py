"""Several processes compute what one does: DistributedDataParallel, untraining, evaluation."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

import wfnet
from wfnet import UntrainConfig, untrain
from wfnet.cli import main
from wfnet.evaluation import evaluate_multi_label
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.services import ranks
from wfnet.services.ranks import PeerFailed, Ranks
from wfnet.untraining.distributed import add_rows
from wfnet.untraining.run_state import CHECKPOINT_NAME
from wfnet.untraining.signals import Stopped

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture
def both_ranks(runs, tmp_path) -> Callable:
    """Runs ``work(rank)`` in two processes that have joined; their exit statuses."""

    def joined(rank, work):
        where = f"file://{tmp_path}/rendezvous"
        options = {"rank": rank, "world_size": 2, "timeout": ranks.TIMEOUT}
        dist.init_process_group("gloo", where, **options)
        work(rank)
        dist.destroy_process_group()

    def run(work):
        children = [runs.forked(lambda rank=rank: joined(rank, work)) for rank in (0, 1)]
        return [os.WEXITSTATUS(runs.ended(child, 120)) for child in children]

    return run


def test_gradients_of_pytorchs_own_equal_one_process_on_the_joint_batch(both_ranks, runs, tmp_path):
    pixels, labels = runs.bars(2, 0, runs.CLASSES).images, torch.arange(12) % 5

    def work(rank):
        net, mine = DistributedDataParallel(runs.network()), slice(6 * rank, 6 * rank + 6)
        net(pixels[mine], forget=labels[mine]).square().mean().backward()
        torch.save([p.grad for p in net.module.filter_parameters()], f"{tmp_path}/{rank}.pt")

    assert both_ranks(work) == [0, 0]
    net = runs.network()
    net(pixels, forget=labels).square().mean().backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for parameter, a, b in zip(net.filter_parameters(), first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, parameter.grad)


# -- untraining -----------------------------------------------------------------------------------


CORRUPT = set(range(0, 36, 3)) | set(range(1, 30, 2))
SETTINGS = {
    "even": {"steps": 6},
    "uneven": {"steps": 4, "batch_size": 6, "grad_accum_steps": 2, "compound": 0.5, "shrink": 0.2},
    "paper": {},
    "corrupt": {"steps": 10, "batch_size": 4, "share_images": False, "max_corrupt": 30},
}


@pytest.fixture
def one_run(runs):
    """The run ``name`` of SETTINGS on all ranks that there are.

    In fp64: whatever differs between numbers of ranks is then no rounding.
    """

    def run(name, folder=None, resume=False, before=lambda indices: None):
        settings = runs.config(**SETTINGS[name])
        if name == "paper":
            settings = UntrainConfig.recipe("paper", 6, steps=5, batch_size=6, label_expansion=2)
        train = runs.InMemory(runs.bars(8, 0, runs.CLASSES), before, torch.float64)
        if name == "corrupt":
            train = runs.corrupted(train, CORRUPT)
        net = runs.network(normalize_gate=name != "paper").double()
        validation = runs.InMemory(runs.bars(4, 1, runs.CLASSES), dtype=torch.float64)
        return net, untrain(net, train, validation, settings, folder, resume, False)

    return run


def test_two_ranks_learn_what_one_process_does(both_ranks, one_run, runs, tmp_path):
    def work(rank):
        found = {}
        for name in SETTINGS:
            net, result = one_run(name, tmp_path / name)
            filters = {k: p.detach().contiguous() for k, p in net.named_filters().items()}
            save_file(filters, tmp_path / f"{name}-{rank}.safetensors")
            found[name] = runs.without_times(result.history), result.corrupt_images
        torch.save(found, tmp_path / f"{rank}.pt")

    assert both_ranks(work) == [0, 0]
    histories = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for name in SETTINGS:
        net, result = one_run(name)
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        saved = load_file(tmp_path / name / "wf_model.safetensors")
        for key, expected in net.named_filters().items():
            assert torch.equal(first[key], second[key]), (name, key)
            assert torch.equal(first[key], saved[key]), (name, key)
            assert (expected != net.alpha_init).any(), (name, key)
            torch.testing.assert_close(first[key], expected, rtol=1e-9, atol=1e-9)
        history, corrupt = histories[0][name]
        assert histories[1][name][0] == history
        assert corrupt.keys() == histories[1][name][1].keys() == result.corrupt_images.keys()
        for ours, theirs in zip(history, runs.without_times(result.history), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9), name
    assert len(histories[0]["corrupt"][1]) > 10


def test_a_signal_on_one_rank_stops_both_and_any_number_of_ranks_goes_on(
    both_ranks, one_run, runs, tmp_path
):
    folder = tmp_path / "run"

    def work(rank):
        # A share of 4 images, for the third time.
        before = runs.at_call(2, 3, lambda: rank == 1 and signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped, match="stopped after step 2 of 6") as stopped:
            one_run("even", folder, before=before)
        assert stopped.value.signal == signal.SIGTERM
        dist.barrier()  # the first rank's file is there
        if rank == 0:
            os.makedirs(tmp_path / "alone")
            os.link(folder / CHECKPOINT_NAME, tmp_path / "alone" / CHECKPOINT_NAME)
        assert one_run("even", folder, resume=True)[1].steps == 6

    assert both_ranks(work) == [0, 0]
    expected, _ = one_run("even")
    alone, _ = one_run("even", tmp_path / "alone", resume=True)  # what two ranks began
    both = load_file(folder / "wf_model.safetensors")
    for key, value in expected.named_filters().items():
        torch.testing.assert_close(both[key], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.named_filters()[key], value, rtol=1e-9, atol=1e-9)


def test_a_failing_rank_ends_the_other_at_once(both_ranks, one_run, runs, tmp_path):
    def fail():
        raise ValueError("this disk is gone")

    def work(rank):
        try:
            one_run("even", before=runs.at_call(2, 3, fail if rank == 1 else str))
        except Exception as error:
            (tmp_path / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
            os._exit(3)  # without a farewell, as when it is killed

    start = time.monotonic()
    assert both_ranks(work) == [3, 3]
    assert time.monotonic() - start < 30
    assert (tmp_path / "error-1").read_text() == "ValueError: this disk is gone"
    failed = (tmp_path / "error-0").read_text()
    assert failed.startswith("PeerFailed: another process of this run has failed")


def test_what_ranks_tell_each_other(both_ranks, runs):
    def work(rank):
        ranks = Ranks()
        assert (ranks.rank, ranks.size, ranks.first) == (rank, 2, rank == 0)
        data = runs.bars(8, 0, runs.CLASSES)
        with pytest.raises(ValueError, match="cannot share minibatches of 1 images"):
            untrain(runs.network(), data, None, runs.config(batch_size=2), progress=False)
        with pytest.raises(ValueError, match=r"another configuration, network or data"):
            untrain(runs.network(), data, None, runs.config(seed=rank), progress=False)
        if rank == 0:
            with pytest.raises(KeyError, match="missing"):
                ranks.first_does(lambda: {}["missing"])
        else:
            with pytest.raises(PeerFailed, match="rank 0 failed: KeyError: 'missing'"):
                ranks.first_does(lambda: 1 / 0)  # not its own
        assert ranks.first_does(lambda: rank) == 0
        assert ranks.join({2 - rank: torch.tensor([rank])}) == [1, 0]
        # Rows that occur on either of the ranks, of 9: few, or so many that all are sent.
        for spread in ([1, 4, 7], [1, 4]), ([3], []), ([0, 1, 2, 3], [4, 5, 6]):
            gradients = torch.zeros(2, 9, 5)
            for own, rows in enumerate(spread):
                gradients[own, rows] = torch.arange(1.0, 6) * (1 + own)
            expected = gradients.sum(0)
            add_rows(gradients[rank], torch.tensor(spread[0] + spread[1]).unique(), ranks)
            assert torch.equal(gradients[rank], expected)

    assert both_ranks(work) == [0, 0]


def test_an_evaluation_shared_by_two_ranks_counts_what_one_process_counts(
    both_ranks, runs, tmp_path
):
    net = runs.network()
    with torch.no_grad():
        for p in net.filter_parameters():
            p.normal_(1, 3, generator=torch.Generator().manual_seed(p.numel()))
    test = runs.corrupted(runs.bars(5, 2, runs.CLASSES), {3, 17, 29})
    settings = {"batch_size": 7, "retained_rows": 2, "progress": False}

    def work(rank):
        for _ in range(2):  # the second time from the files of the first
            records = tmp_path / "c.safetensors"
            result = wfnet.evaluate(net, test, ranks=Ranks(), records=records, **settings)
            result.to_json(tmp_path / f"{rank}.json")
        shared = RunOptions(progress=False, ranks=Ranks())
        precisions = evaluate_multi_label(net, runs.several_labels(), options=shared)
        precisions.to_json(tmp_path / f"precisions_{rank}.json")

    assert both_ranks(work) == [0, 0]
    alone = RunOptions(progress=False)
    precisions = evaluate_multi_label(net, runs.several_labels(), options=alone)
    expected = wfnet.evaluate(net, test, **settings)
    for rank in (0, 1):
        assert (tmp_path / f"c-{rank}-of-2.safetensors").is_file()
        several = json.loads((tmp_path / f"precisions_{rank}.json").read_text())
        assert several["classes"] == [vars(record) for record in precisions.records]
        found = wfnet.EvaluationResult.from_json(tmp_path / f"{rank}.json")
        assert found.settings == expected.settings
        assert found.settings["corrupt_images"] == 3
        for ours, theirs in zip(found.records, expected.records, strict=True):
            assert (ours.acc_r, ours.acc_f) == (theirs.acc_r, theirs.acc_f)
            assert ours.n_retain == theirs.n_retain > 0
            assert ours.zrf == pytest.approx(theirs.zrf, rel=1e-6)


# -- command line ---------------------------------------------------------------------------------


@pytest.fixture
def on_two_ranks(runs, tmp_path) -> Callable:
    """Exit statuses of the command line as torchrun starts it, and what each rank has shown."""

    def launched(rank, port, arguments):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shown = os.open(tmp_path / f"shown-{port}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(shown, 2)
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os._exit(main(arguments))

    def call(*arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [str(argument) for argument in arguments]
        children = [runs.forked(lambda rank=rank: launched(rank, port, words)) for rank in (0, 1)]
        statuses = [os.WEXITSTATUS(runs.ended(child)) for child in children]
        return statuses, [(tmp_path / f"shown-{port}-{rank}").read_text() for rank in (0, 1)]

    return call


def test_the_command_line_on_two_ranks(on_two_ranks, image_folder, tmp_path):
    call = ["untrain", "--data-dir", image_folder, "--model", "small/resnet", "--augment"]
    call += ["--model-kwargs", "width=8", "--img-size", "32", "-b", "6", "-M", "2", "-j", "0"]
    call += ["--steps", "3", "--output", tmp_path / "both"]
    statuses, shown = on_two_ranks(*call)
    assert statuses == [0, 0], shown
    assert "shared by 2 processes" in shown[0]
    assert {line.partition(":")[0] for line in shown[1].splitlines()} <= {"warning"}
    assert "warning: rank 1: small/resnet has random weights" in shown[1]
    assert json.loads((tmp_path / "both" / "config.json").read_text())["result"]["steps"] == 3

    statuses, shown = on_two_ranks(*call)
    assert statuses == [2, 2]
    assert "holds a run already" in shown[0]
    assert "rank 1: wfnet untrain: error: rank 0 failed" in shown[1]

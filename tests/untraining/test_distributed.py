"""Several processes compute what one does: DistributedDataParallel, untraining, evaluation."""

import dataclasses
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
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import wfnet
from wfnet import UntrainConfig, untrain
from wfnet.cli import main
from wfnet.data import Batch
from wfnet.services import ranks
from wfnet.services.ranks import PeerFailed, Ranks
from wfnet.untraining.checkpoints import Checkpoints
from wfnet.untraining.distributed import add_rows
from wfnet.untraining.signals import Stopped

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture
def both_ranks(runs, tmp_path) -> Callable:
    """Runs ``work(rank)`` in two processes that have joined; their wait statuses."""

    def joined(rank, work):
        where = f"file://{tmp_path}/rendezvous"
        options = {"rank": rank, "world_size": 2, "timeout": ranks.TIMEOUT}
        dist.init_process_group("gloo", where, **options)
        work(rank)
        dist.destroy_process_group()

    def run(work, seconds=120):
        children = [runs.forked(lambda rank=rank: joined(rank, work)) for rank in (0, 1)]
        return [runs.ended(child, seconds) for child in children]

    return run


# -- PyTorch's own --------------------------------------------------------------------------------

LABELS = torch.tensor([[0, 1], [2, -1], [-1, -1], [4, 4], [3, 1], [0, -1], [2, 3], [1, 1]])


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 5))
    net = wfnet.WFNet(model.eval(), 5)
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter)
    return net


def pictures():
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_gradients_equal_one_process_on_the_joint_batch(both_ranks, tmp_path):
    def work(rank):
        net = DistributedDataParallel(network())
        net.train()
        mine = slice(4 * rank, 4 * rank + 4)
        for _ in range(2):
            net.zero_grad()
            net(pictures()[mine], forget=LABELS[mine]).square().mean().backward()
        torch.save([p.grad for p in net.module.filter_parameters()], f"{tmp_path}/{rank}.pt")

    assert both_ranks(work) == [0, 0]
    net = network()
    net(pictures(), forget=LABELS).square().mean().backward()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for parameter, a, b in zip(net.filter_parameters(), first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, parameter.grad)


def test_data_parallel_is_refused():
    """What DataParallel does on several GPUs, without a GPU: it calls replicas of the module."""
    parallel = DataParallel(network())
    parallel.module = parallel.module._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        parallel(pictures(), forget=LABELS)


# -- untraining -----------------------------------------------------------------------------------


class InDouble(torch.utils.data.Dataset):
    """In memory, fp64: whatever differs between numbers of ranks is then no rounding."""

    def __init__(self, dataset, before=lambda indices: None):
        self.dataset, self.before = dataset, before
        self.labels, self.classes = dataset.labels, dataset.classes

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices):
        self.before(indices)
        batch = self.dataset.batch(indices)
        return Batch(batch.images.double(), batch.labels, batch.indices)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image.double(), label


CORRUPT = set(range(0, 36, 3)) | set(range(1, 30, 2))
# Shares of 2 + 2 images, of 2 + 1, of 1 + 0, of two minibatches a step, of both halves.
SETTINGS = {
    "even": {"steps": 6},
    "uneven": {"steps": 6, "batch_size": 6},
    "fewer images than ranks": {"steps": 6, "batch_size": 2},
    "accumulated": {"steps": 4, "batch_size": 6, "grad_accum_steps": 2},
    "compound rows": {"steps": 6, "batch_size": 6, "compound": 0.5, "shrink": 0.2},
    "paper": {},
    "corrupt": {"steps": 10, "batch_size": 4, "share_images": False, "max_corrupt": 30},
}


@pytest.fixture
def one_run(runs):
    """The run ``name`` of SETTINGS on all ranks that there are."""

    def run(name, folder=None, resume=False):
        settings = runs.config(**SETTINGS[name])
        if name == "paper":
            settings = UntrainConfig.recipe("paper", 6, steps=5, batch_size=6, label_expansion=2)
        train = InDouble(runs.images())
        if name == "corrupt":
            train = runs.corrupted(train, CORRUPT)
        net = runs.network(normalize_gate=name != "paper").double()
        validation = InDouble(runs.images(4, 1))
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
            assert ours.keys() == theirs.keys()
            assert ours == pytest.approx(theirs, rel=1e-9), name
    assert len(histories[0]["corrupt"][1]) > 10


def test_a_signal_on_one_rank_stops_both_and_any_number_of_ranks_goes_on(
    both_ranks, one_run, runs, tmp_path
):
    folder = tmp_path / "run"

    def work(rank):
        net, settings = runs.network().double(), runs.config(**SETTINGS["even"])
        # A share of 4 images, for the third time.
        before = runs.at_call(2, 3, lambda: signal.raise_signal(signal.SIGTERM))
        train = InDouble(runs.images(), *([before] if rank == 1 else []))
        with pytest.raises(Stopped, match="stopped after step 2 of 6") as stopped:
            untrain(net, train, InDouble(runs.images(4, 1)), settings, folder, True, False)
        assert stopped.value.signal == signal.SIGTERM
        dist.barrier()  # the first rank's file is there
        assert Checkpoints(folder).load()[1]["step"] == 2
        if rank == 0:
            os.makedirs(tmp_path / "alone")
            os.link(Checkpoints(folder).newest, Checkpoints(tmp_path / "alone").newest)
        assert one_run("even", folder, resume=True)[1].steps == 6

    assert both_ranks(work) == [0, 0]
    expected, _ = one_run("even")
    alone, _ = one_run("even", tmp_path / "alone", resume=True)  # what two ranks began
    both = load_file(folder / "wf_model.safetensors")
    for key, value in expected.named_filters().items():
        torch.testing.assert_close(both[key], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.named_filters()[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_rank_ends_the_other_at_once(both_ranks, runs, tmp_path, failing):
    def fail():
        raise ValueError("this disk is gone")

    def work(rank):
        before = [runs.at_call(2, 3, fail)] if rank == failing else []
        train, settings = InDouble(runs.images(), *before), runs.config(**SETTINGS["even"])
        try:
            untrain(runs.network().double(), train, None, settings, None, False, False)
        except Exception as error:
            (tmp_path / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
            os._exit(3)  # without a farewell, as when it is killed

    start = time.monotonic()
    assert [os.WEXITSTATUS(status) for status in both_ranks(work)] == [3, 3]
    assert time.monotonic() - start < 30
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)]
    assert errors[failing] == "ValueError: this disk is gone"
    assert errors[1 - failing].startswith("PeerFailed: another process of this run has failed")


def test_ranks_that_do_not_fit_together_are_refused_before_work_starts(both_ranks, runs):
    def work(rank):
        ranks = Ranks()
        assert (ranks.rank, ranks.size, ranks.first) == (rank, 2, rank == 0)
        settings = runs.config(seed=rank)
        with pytest.raises(ValueError, match=r"another configuration, network or data"):
            untrain(runs.network(), runs.images(), None, settings, None, False, False)
        if rank == 0:
            with pytest.raises(KeyError, match="missing"):
                ranks.first_does(lambda: {}["missing"])
        else:
            with pytest.raises(PeerFailed, match="rank 0 failed: KeyError: 'missing'"):
                ranks.first_does(lambda: 1 / 0)  # not its own
        assert ranks.first_does(lambda: rank) == 0
        assert ranks.join({2 - rank: torch.tensor([rank])}) == [1, 0]

    assert both_ranks(work) == [0, 0]


# -- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("retained_rows", [None, 2])
def test_an_evaluation_shared_by_two_ranks_counts_what_one_process_counts(
    both_ranks, runs, tmp_path, retained_rows
):
    net = runs.network()
    with torch.no_grad():
        for p in net.filter_parameters():
            p.normal_(1, 3, generator=torch.Generator().manual_seed(p.numel()))
    test = runs.corrupted(runs.images(5, 2), {3, 17, 29})
    settings = {"batch_size": 7, "retained_rows": retained_rows, "progress": False}

    def work(rank):
        found = [
            wfnet.evaluate(net, test, ranks=Ranks(), records=tmp_path / "c.safetensors", **settings)
            for _ in range(2)  # the second time from the files of the first
        ]
        result = found[1]
        assert result == dataclasses.replace(found[0], seconds=result.seconds)
        result.to_json(tmp_path / f"{rank}.json")
        assert result.counts.seen.sum() > 50

    assert both_ranks(work) == [0, 0]
    expected = wfnet.evaluate(net, test, **settings)
    for rank in (0, 1):
        assert (tmp_path / f"c-{rank}-of-2.safetensors").is_file()
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
        os.dup2(shown, 1)
        os.dup2(shown, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

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
    call = ["untrain", "--data-dir", image_folder, "--model", "small/resnet"]
    call += ["--model-kwargs", "width=8", "--img-size", "32", "-b", "6", "-M", "2", "-j", "0"]
    call += ["--steps", "3", "--augment", "--grad-accum-steps", "2"]
    folder, alone = tmp_path / "both", tmp_path / "alone"
    statuses, shown = on_two_ranks(*call, "--output", folder)
    assert statuses == [0, 0], shown
    assert "shared by 2 processes" in shown[0]
    assert f"wfnet evaluate {folder}" in shown[0]
    assert {line.partition(":")[0] for line in shown[1].splitlines()} <= {"warning"}
    assert "warning: rank 1: small/resnet has random weights" in shown[1]
    assert json.loads((folder / "config.json").read_text())["result"]["steps"] == 3
    assert main([*map(str, call), "--output", str(alone)]) == 0
    both, one = (load_file(f / "wf_model.safetensors") for f in (folder, alone))
    for name, value in one.items():
        assert (value != 3).any()
        torch.testing.assert_close(both[name], value, rtol=1e-3, atol=1e-4)

    statuses, shown = on_two_ranks("evaluate", folder, "-j", "0", "--no-figures")
    assert statuses == [0, 0], shown
    assert "original network" in shown[0]
    assert "original network" not in shown[1]
    found = wfnet.EvaluationResult.from_json(folder / "evaluation.json")
    assert found.settings["images"] == 6

    statuses, shown = on_two_ranks(*call, "--output", folder)
    assert statuses == [2, 2]
    assert "rank 0: wfnet untrain: error:" in shown[0]
    assert "holds a run already" in shown[0]
    assert "rank 1: wfnet untrain: error: rank 0 failed" in shown[1]
    assert "Traceback" not in shown[0] + shown[1]


# -- sums of gradients ----------------------------------------------------------------------------

# Rows that occur on each of two ranks, of 9.
SPREADS = [[[1, 4, 7], [1, 4]], [[3], []], [[0, 1, 2, 3], [4, 5, 6]], [list(range(9)), [8]]]


def contribution(rank, rows):
    gradient = torch.zeros(9, 5)
    generator = torch.Generator().manual_seed(rank)
    gradient[rows] = torch.randn(len(rows), 5, generator=generator)
    return gradient


def test_few_rows_or_the_whole_matrix_give_the_same_sum(both_ranks):
    def work(rank):
        ranks = Ranks()
        for spread in SPREADS:
            rows = torch.tensor([row for own in spread for row in own]).unique()
            gradient = contribution(rank, spread[rank])
            add_rows(gradient, rows, ranks)
            expected = sum(contribution(r, own) for r, own in enumerate(spread))
            assert torch.equal(gradient, expected), spread

    assert both_ranks(work) == [0, 0]

"""Runs that are cut off, resumed, changed, or in the way of others; their checkpoints."""

import os
import resource

import pytest
import torch

from wfnet import WFNet
from wfnet.services.files import write_tensors
from wfnet.services.locks import folder_lock
from wfnet.untraining import run_state
from wfnet.untraining.run_state import CHECKPOINT_NAME, read_checkpoint, write_checkpoint

CLASSES = 4


@pytest.fixture
def interrupted(go, runs, tmp_path):
    """A folder with an unfinished run."""
    with pytest.raises(runs.Interrupted):
        go(tmp_path, runs.interrupting(runs.bars(), 7), resume=False)
    return tmp_path


@pytest.mark.parametrize(
    ("after", "dtype", "changes"),
    [
        (5, torch.bfloat16, {}),
        (9, None, {"share_images": False}),
        (16, None, {"optimizer": "sgd", "lr": 1.0}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(base, runs, go, tmp_path, after, dtype, changes):
    def run(folder, train):
        net = WFNet(base, CLASSES, filter_dtype=dtype)
        return go(tmp_path / folder, train, runs.bars(4, seed=1), net, **changes)

    train = runs.bars()
    whole, expected = run("whole", train)
    with pytest.raises(runs.Interrupted):
        run("cut", runs.interrupting(train, after, 8 if "share_images" in changes else 4))
    net, result = run("cut", train)
    runs.assert_same_run(net, result, whole, expected)
    runs.assert_same_filters(WFNet.from_pretrained(tmp_path / "cut", base), whole)
    again, loaded = run("cut", train)  # finished: only loaded
    runs.assert_same_run(again, loaded, whole, expected)
    assert loaded.history == result.history


def test_an_unfinished_run_is_not_overwritten(go, interrupted):
    path = interrupted / CHECKPOINT_NAME
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"unfinished run \(step 6\).*resume=True"):
        go(interrupted, resume=False)
    assert path.read_bytes() == before
    path.write_bytes(b"")
    for resume, error in ((True, ValueError), (False, FileExistsError)):
        with pytest.raises(error, match="truncated"):
            go(interrupted, resume=resume)


def test_a_resumed_run_must_be_the_same(base, runs, go, interrupted):
    torch.manual_seed(5)
    other_base = WFNet(runs.BarNet(), CLASSES)
    other_layers = WFNet(base, CLASSES, targets=["conv1"])
    for message, arguments in {
        r"lr=0.2, now it is 0.1": {"lr": 0.1},
        "another training data": {"train": runs.bars(seed=3)},
        "another validation data": {"validation": runs.bars(seed=3)},
        "another base network": {"net": other_base},
        r"another (base network|filters)": {"net": other_layers},
    }.items():
        with pytest.raises(ValueError, match=message):
            go(interrupted, **arguments)
    assert go(interrupted, checkpoint_every=5)[1].steps == 20  # what does not matter


def test_a_folder_that_another_process_writes_is_refused(go, runs, tmp_path):
    def work():
        with pytest.raises(FileExistsError, match=f"being written by process {os.getppid()} on "):
            go(tmp_path)

    with folder_lock(tmp_path):
        assert os.WEXITSTATUS(runs.ended(runs.forked(work))) == 0
    (tmp_path / ".history.json.half.wfnet-tmp").write_text("left behind")
    assert go(tmp_path)[1].steps == 20
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


# -- the file: whole or not there, and checksummed ------------------------------------------------


@pytest.fixture
def path(tmp_path):
    drawn = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"filters.a": drawn, "filters.b": drawn[:, :2].bfloat16()}
    write_checkpoint(tmp_path / "run" / "c.safetensors", tensors, {"step": 7, "note": "x"})
    return tmp_path / "run" / "c.safetensors"


def test_any_flipped_byte_is_noticed(path):
    """Of tensors, of the state and of the names; the padding of the header says nothing."""
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    padding = len(content[:size]) - len(content[:size].rstrip(b" "))
    for place in (*range(0, size - padding, 7), *range(size, len(content))):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged|truncated"):
            read_checkpoint(path)


def test_what_is_no_checkpoint(path, monkeypatch):
    for content in (b"", path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
            read_checkpoint(path)
    write_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(path)
    monkeypatch.setattr(run_state, "FORMAT", 99)
    write_checkpoint(path, {}, {"step": 5})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="its format is 99, this version reads"):
        read_checkpoint(path)


def test_a_disk_that_is_full(path):
    """The write breaks off in the middle; the file before stays."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match=r"checkpoint of step 10 could not be .* free some space"):
            write_checkpoint(path, {"big": torch.zeros(50_000)}, {"step": 10})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tensors, state = read_checkpoint(path)
    assert (state["step"], state["note"]) == (7, "x")
    assert torch.equal(tensors["filters.b"], tensors["filters.a"][:, :2].bfloat16())
    assert [found.name for found in path.parent.iterdir()] == [path.name]

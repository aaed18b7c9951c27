"""Index arithmetic, tile choice, stored searches and refusals of the Triton path, on the host."""

import itertools
import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("triton")

from wfnet.kernels import autotune
from wfnet.kernels.config import (
    TARGETS,
    Choice,
    ConvShape,
    GemmConfig,
    LinearShape,
    best_box,
    conv_choice,
    full_precision,
    linear_choice,
    span,
)
from wfnet.kernels.conv_dgrad import conv_dgrad, tiles_per_sample
from wfnet.kernels.conv_fprop import conv_fprop
from wfnet.kernels.epilogue_bwd import LayerBelow, by_source, epilogue_bwd
from wfnet.kernels.gate import GatedLayer, GateTables, gate_rows
from wfnet.kernels.launch import descriptor
from wfnet.kernels.linear import linear_fprop

import wfnet.functional as wf
from wfnet.backends.contract import ConvGeometry
from wfnet.backends.triton import backend

H100 = TARGETS[90]


def conv_shape(batch=512, size=56, c=64, o=64, k=3, stride=1, pad=1, dil=1):
    return ConvShape(batch, size, size, c, o, (k, k), (stride,) * 2, (pad,) * 2, (dil,) * 2)


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_span_counts_samples_of_a_flat_tile(block_m):
    for tokens in range(1, 300):
        most = max(
            (start + block_m - 1) // tokens - start // tokens + 1
            for start in range(0, block_m * tokens, block_m)
        )
        promised = span(block_m, tokens)
        assert promised == 0 or most <= promised <= 4, (tokens, most, promised)
        if most <= 2:
            assert promised > 0


@pytest.mark.parametrize("tokens", [16, 31, 49, 50, 197])
def test_flat_tiles_give_every_sample_its_own_slots(tokens):
    """The slots that a tile writes are those that the reduction reads, and no other's."""
    batch, block_m = 9, 32
    touched = span(block_m, tokens)
    written = {}
    for tile in range(-(-batch * tokens // block_m)):
        rows = range(tile * block_m, min((tile + 1) * block_m, batch * tokens))
        for row in rows:
            slot = tile * touched + row // tokens - tile * block_m // tokens
            assert slot < (tile + 1) * touched
            written.setdefault(slot, []).append(row)
    for sample in range(batch):
        first = sample * tokens // block_m
        last = ((sample + 1) * tokens - 1) // block_m
        slots = [t * touched + sample - t * block_m // tokens for t in range(first, last + 1)]
        rows = list(itertools.chain.from_iterable(written[slot] for slot in slots))
        assert rows == list(range(sample * tokens, (sample + 1) * tokens))


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_parity_classes_visit_every_tap_once(k, pad):
    """Stride 2: taps of a class, and the output row each reads, as the kernel enumerates them."""
    step, height = 2, 8
    for h in range(height):
        odd, half = h % step, h // step
        first = (odd + pad) % step
        count = (k - first + step - 1) // step
        mine = {(first + i * step, half + (odd + pad) // step - i) for i in range(count)}
        truth = {(r, (h + pad - r) // step) for r in range(k) if (h + pad - r) % step == 0}
        assert mine == truth


@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("dil", [1, 2, 3])
def test_strided_taps_lie_in_one_parity_class(pad, dil):
    """Stride 2: input row 2p + r*dilation - pad as (row of the class, class), negative or not."""
    step = 2
    for p, r in itertools.product(range(6), range(7)):
        shifted = r * dil - pad + pad * step
        row, odd = p + shifted // step - pad, shifted % step
        assert step * row + odd == step * p + r * dil - pad
        assert odd in (0, 1)


@pytest.mark.parametrize(
    ("size", "least", "cover"), [(56, 16, 1.0), (28, 16, 1.0), (14, 16, 0.87), (7, 16, 0.76)]
)
def test_boxes_cover_resnet_sizes(size, least, cover):
    """Packing samples beats (1, 8, 16), which covers 77% of 28 x 28 and 14 x 14."""
    box, found = best_box(512, size, size, 128, 8, least)
    assert box[0] * box[1] * box[2] == 128
    assert found >= cover
    tiles = -(-512 // box[0]) * -(-size // box[1]) * -(-size // box[2])
    assert found == pytest.approx(512 * size * size / (tiles * 128))


def test_box_respects_its_limits():
    box, _ = best_box(512, 28, 28, 128, 1, 16)
    assert box[0] == 1
    box, _ = best_box(512, 7, 7, 128, 8, 64)
    assert box[1] * box[2] >= 64
    assert best_box(1, 28, 28, 128, 8, 16)[0][0] == 1


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_choice_of_path(direction):
    def choose(shape, device=H100, aligned=True):
        return conv_choice(direction, shape, torch.bfloat16, device, describable=aligned)

    assert choose(conv_shape()).config.path == "box"
    assert choose(conv_shape(stride=2)).config.path == "box"
    for shape, reason in (
        (conv_shape(size=15, stride=2), "uneven phases"),
        (conv_shape(stride=3), "neither 1 nor 2"),
        (conv_shape(c=24, stride=2), "multiples of 16"),
    ):
        choice = choose(shape)
        assert choice.config.path == "gather"
        assert reason in choice.reason
    assert "no tensor memory accelerator" in choose(conv_shape(), TARGETS[80]).reason
    assert "16 bytes" in choose(conv_shape(c=3), aligned=False).reason


def test_strided_boxes_stay_inside_a_parity_class():
    """Channel tiles must divide the channels: their neighbours are the next column's."""
    for channels in (16, 48, 64, 80, 96, 192):
        shape = conv_shape(c=channels, o=channels, stride=2)
        forward = conv_choice("fprop", shape, torch.bfloat16, H100, describable=True).config
        backward = conv_choice("dgrad", shape, torch.bfloat16, H100, describable=True).config
        assert channels % forward.block_k == 0
        assert channels % backward.block_n == 0
        assert tiles_per_sample(shape, backward) * backward.box[0] >= 1


def test_small_batches_take_smaller_tiles():
    small = conv_choice("fprop", conv_shape(1, 14), torch.bfloat16, H100, describable=True)
    large = conv_choice("fprop", conv_shape(512, 14), torch.bfloat16, H100, describable=True)
    assert small.config.block_m < large.config.block_m


def test_linear_choice():
    shape = LinearShape(512, 197, 192, 576)
    choice = linear_choice(shape, torch.bfloat16, H100, columns=576, describable=True)
    assert choice.config.path == "flat"
    assert "at most 2 samples" in choice.reason
    few = LinearShape(512, 1, 192, 576)
    choice = linear_choice(few, torch.bfloat16, H100, columns=576, describable=True)
    assert "gathered table rows" in choice.reason
    old = linear_choice(shape, torch.bfloat16, TARGETS[80], columns=576, describable=True)
    assert old.config.path == "gather"


def test_default_operands_fit_into_shared_memory():
    for device in TARGETS.values():
        for dtype in (torch.bfloat16, torch.float32):
            for direction in ("fprop", "dgrad"):
                config = conv_choice(
                    direction, conv_shape(), dtype, device, describable=True
                ).config
                assert config.operand_memory(dtype.itemsize) <= device.shared_memory


def test_full_precision_follows_pytorch(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert full_precision(torch.float32, "conv")
    assert not full_precision(torch.bfloat16, "conv")
    config = conv_choice("fprop", conv_shape(), torch.float32, H100, describable=True).config
    assert config.block_m * config.block_n <= 64 * 64
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert not full_precision(torch.float32, "conv")


def test_full_precision_is_read_however_it_was_set():
    """PyTorch refuses to read its older flag once the newer setting was used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        assert full_precision(torch.float32, "linear")
        matmul.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):
            _ = matmul.allow_tf32
        assert not full_precision(torch.float32, "linear")
    finally:
        matmul.allow_tf32 = before


def test_descriptor_strides_come_from_the_shape():
    """PyTorch gives dimensions of size 1 arbitrary strides; a descriptor may not have them."""
    x = torch.zeros(64).as_strided((1, 1, 4, 16), (7, 3, 16, 1))
    view = descriptor(x, (1, 1, 4, 16), (1, 1, 4, 16))
    assert view.strides == [64, 64, 16, 1]


def test_samples_are_grouped_by_source():
    order, first = by_source(torch.tensor([3, 1, 3, 0, 3]), 4)
    assert order.tolist() == [3, 1, 0, 2, 4]
    assert first.tolist() == [0, 1, 2, 2, 5]


# -- stored searches ------------------------------------------------------------------------------

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


# -- refusals -------------------------------------------------------------------------------------

X, W = torch.zeros(1, 8, 4, 4), torch.zeros(8, 8, 1, 1)


@pytest.mark.parametrize(
    ("x", "weight", "geometry", "reason"),
    [
        (X.double(), W.double(), ConvGeometry(), "not torch.float64"),
        (X, W, ConvGeometry(), "need a CUDA tensor, and x is on cpu"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(x, weight, geometry, reason):
    assert reason in backend.refuse_conv2d(x, weight, geometry)
    assert reason in backend.refuse_linear(x[0, 0, None], weight[:, :, 0, 0])
    assert backend.explain_conv2d(x, weight, geometry).startswith("refused: ")


def test_groups_are_refused(monkeypatch):
    monkeypatch.setattr("wfnet.backends.triton._refuse_tensor", lambda x: None)
    reason = backend.refuse_conv2d(X, torch.zeros(8, 1, 1, 1), ConvGeometry(groups=8))
    assert "groups=8" in reason
    assert backend.refuse_conv2d(X, W, ConvGeometry()) is None
    assert "does not fit" in backend.refuse_conv2d(X, torch.zeros(8, 8, 7, 7), ConvGeometry())


def test_asked_for_by_name_it_runs_or_raises():
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call"):
        wf.wf_conv2d(X, W, None, torch.zeros(3, 8), None, 1, backend="triton")


def test_explain_names_config_and_reason(monkeypatch):
    monkeypatch.setattr("wfnet.backends.triton._refuse_tensor", lambda x: None)
    monkeypatch.setenv("WFNET_AUTOTUNE", "0")
    text = backend.explain_conv2d(X, W, ConvGeometry())
    assert text.startswith("forward flat ")
    assert "input gradient flat " in text
    text = backend.explain_conv2d(X, torch.zeros(8, 8, 3, 3), ConvGeometry(padding=(1, 1)))
    assert "forward box " in text
    text = backend.explain_conv2d(
        torch.zeros(2, 3, 9, 9), torch.zeros(8, 3, 7, 7), ConvGeometry((2, 2), (3, 3))
    )
    assert "pointer path" in text
    assert "persistent" in backend.explain_linear(torch.zeros(2, 7, 16), torch.zeros(8, 16))
    assert "box" in backend.explain_linear(torch.zeros(2, 7, 16), torch.zeros(8, 16), batch=3)
    assert "box" in backend.explain_conv2d(X, W, ConvGeometry(), batch=2)


def test_launchers_check_their_tensors():
    x, w, a = torch.zeros(2, 4, 4, 8), torch.zeros(8, 3, 3, 8), torch.zeros(2, 8)
    for call, message in (
        (lambda: conv_fprop(x, w.half(), a), "does not fit x"),
        (lambda: conv_fprop(x, w, a[:1]), "1 rows for 2 samples"),
        (lambda: conv_fprop(x, w, torch.zeros(2, 9)), "9 columns for 8"),
        (lambda: conv_fprop(x, w, a, torch.zeros(2, 9)), "shift"),
        (lambda: conv_fprop(x, w, a.double(), padding=(1, 1)), "float32"),
        (lambda: conv_fprop(x.transpose(1, 2), w, a, padding=(1, 1)), "contiguous"),
        (lambda: conv_fprop(x[:, :2, :2].contiguous(), w, a), "does not fit into 2x2"),
        (lambda: conv_fprop(x, w, a, source=torch.tensor([0])), "must have 2 entries"),
        (lambda: conv_fprop(x, w, a, residual=x), "residual must be"),
        (lambda: conv_dgrad(x, w, (4, 4), want=("t1",)), "pass branch="),
        (lambda: conv_dgrad(x, w, (4, 4), want=("dx",)), "must name some of"),
        (lambda: conv_dgrad(x, w, (9, 9)), "but the output is"),
        (lambda: conv_dgrad(x, w, (6, 6), LayerBelow(relu=True)), "ReLU mask"),
        (lambda: epilogue_bwd(x[0], LayerBelow(), want=("scaled_grad",)), "pass scale="),
        (lambda: linear_fprop(x[0], w[:, 0, 0, :4], a), "does not fit x"),
        (lambda: gate_rows(a, torch.tensor([1]), 1.0), r"\[B, J\] int64"),
        (lambda: gate_rows(a, torch.zeros(1, 17, dtype=torch.int64), 1.0), "1 to 16"),
        (lambda: GateTables([]), "without masked layers"),
        (lambda: GateTables([GatedLayer(a, a)]), "both or neither"),
        (lambda: GateTables([GatedLayer(a.half())]), "contiguous float32"),
        (lambda: GateTables([GatedLayer(a, gamma=torch.zeros(3))]), "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_replaced_parameters_are_noticed():
    alpha = torch.nn.Parameter(torch.zeros(2, 8))
    tables = GateTables([GatedLayer(alpha)])
    alpha.data = torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match="build new ones"):
        tables.scale_and_shift(torch.zeros(1, 1, dtype=torch.int64))


def test_empty_batches_launch_nothing():
    out, branch = conv_fprop(
        torch.zeros(0, 4, 4, 8), torch.zeros(8, 1, 1, 8), torch.zeros(0, 8), save_branch=True
    )
    assert out.shape == branch.shape == (0, 4, 4, 8)
    result = epilogue_bwd(
        torch.zeros(3, 0, 8),
        LayerBelow(torch.zeros(3, 0, 8), torch.zeros(3, 8)),
        want=("scaled_grad", "t0", "t1"),
    )
    assert (result.t0 == 0).all()
    assert (result.t1 == 0).all()

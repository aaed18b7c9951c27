"""One untraining step, forward and backward over the label-expanded batch, beside its peers.

    python benchmarks/bench_step.py --model resnet18 --image-size 32 -b 16 -M 5

Columns (the same weights, filters, images, labels, dtype and layout for all, one process,
interleaved, medians):

    loop      a masked weight copy and a convolution per sample
    by_hand   F.conv2d, then two broadcast multiplies, in plain PyTorch with autograd
    compile   torch.compile of by_hand (only with --compile)
    eager     WFNet, unfused
    fused     WFNet(fuse=True)
    unmasked  the same frozen network without masks, forward and gradient to its first activation

Prints a table and writes JSON with the raw timings, versions, commit and command. On a CUDA device
the step is timed with events after a warm-up.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wfnet

Step = Callable[[], Tensor]


class MaskedByHand(nn.Conv2d):
    """What one writes first: convolve, then scale and shift by the gates of each sample."""

    labels: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        y = y * (self.gate_scale * torch.sigmoid(self.alpha_weight[self.labels]))[:, :, None, None]
        if self.bias is not None:
            gate = self.gate_scale * torch.sigmoid(self.alpha_bias[self.labels])
            y = y + (gate * self.bias)[:, :, None, None]
        return y


class MaskedLoop(MaskedByHand):
    """A masked copy of the weights per sample, one convolution each."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for sample, label in zip(x.split(1), self.labels, strict=True):
            gate = self.gate_scale * torch.sigmoid(self.alpha_weight[label])
            bias = self.bias
            if bias is not None:
                bias = bias * self.gate_scale * torch.sigmoid(self.alpha_bias[label])
            weight = self.weight * gate[:, None, None, None]
            outputs.append(
                F.conv2d(
                    sample, weight, bias, self.stride, self.padding, self.dilation, self.groups
                )
            )
        return torch.cat(outputs)


class Unmasked(nn.Conv2d):
    """The frozen convolution."""


def with_layers(net: wfnet.WFNet, kind: type[nn.Conv2d]) -> nn.Module:
    """The network of ``net`` with its masked layers computed by ``kind``; filters are copied."""
    model = copy.deepcopy(net.model)
    for module in model.modules():
        if isinstance(module, wfnet.WFConv2d):
            module.__class__ = kind
    return model


def bind(model: nn.Module, labels: Tensor) -> nn.Module:
    for module in model.modules():
        if isinstance(module, MaskedByHand):
            module.labels = labels
    return model


def first_convolution(model: nn.Module) -> nn.Conv2d:
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d))


def make_steps(args: argparse.Namespace) -> tuple[dict[str, Step], int]:
    """One callable per column, each a forward and backward that returns the loss."""
    torch.manual_seed(args.seed)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = make_model(args.model, args.classes).eval()
    net = wfnet.WFNet(model, args.classes)
    if not all(isinstance(layer, wfnet.WFConv2d) for layer in net.masked_layers.values()):
        sys.exit(f"{args.model} masks linear layers; this benchmark compares convolutions")
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 2.0, 1.0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    net = net.to(device).to(memory_format=layout)
    retained = args.batch_size // 2
    images = torch.randn(retained, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=layout)
    own = torch.arange(retained, device=device)
    source = torch.cat([own, own.repeat_interleave(args.label_expansion)])
    samples = source.shape[0]
    labels = torch.randint(args.classes, (samples,), device=device)
    targets = torch.randint(args.classes, (samples,), device=device)
    expanded = images[source].contiguous(memory_format=layout)

    def loss_of(logits: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        return loss.detach()

    def step(forward: Callable[[], Tensor]) -> Step:
        def run() -> Tensor:
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                logits = forward()
            return loss_of(logits)

        return run

    by_hand = bind(with_layers(net, MaskedByHand), labels)
    loop = bind(with_layers(net, MaskedLoop), labels)
    plain = with_layers(net, Unmasked)
    first_convolution(plain).register_forward_hook(lambda m, i, out: out.requires_grad_())
    fused = copy.deepcopy(net)
    fused.fuse = True
    steps = {
        "loop": step(lambda: loop(expanded)),
        "by_hand": step(lambda: by_hand(expanded)),
        "eager": step(lambda: net(images, labels, source)),
        "fused": step(lambda: fused(images, labels, source)),
        "unmasked": step(lambda: plain(expanded)),
    }
    if args.compile:
        compiled = torch.compile(bind(with_layers(net, MaskedByHand), labels))
        steps["compile"] = step(lambda: compiled(expanded))
    return {name: steps[name] for name in args.columns if name in steps}, samples


def make_model(name: str, classes: int) -> nn.Module:
    if name.startswith("small/"):
        from wfnet.models import create

        return create(name.removeprefix("small/"), classes, in_channels=3)
    if name.startswith("torchvision/"):
        import torchvision

        return torchvision.models.get_model(name.removeprefix("torchvision/"), num_classes=classes)
    import timm

    return timm.create_model(name, num_classes=classes)


def timed(step: Step, device: torch.device) -> float:
    """Milliseconds of one step."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def peak_mebibytes(step: Step, device: torch.device) -> float:
    """Largest amount of tensor memory that one step adds to what is allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak / 2**20


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor()}, {torch.get_num_threads()} threads"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="resnet18", help="timm name, torchvision/NAME, small/NAME"
    )
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images n of a minibatch")
    parser.add_argument("-M", "--label-expansion", type=int, default=5)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true", help="add the compiled column")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    columns = ["loop", "by_hand", "compile", "eager", "fused", "unmasked"]
    parser.add_argument("--columns", nargs="+", choices=columns, default=columns)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    steps, samples = make_steps(args)
    losses = {name: step().item() for name, step in steps.items()}
    masked = [loss for name, loss in losses.items() if name != "unmasked"]
    if masked and max(masked) - min(masked) > (1e-3 if args.dtype == "float32" else 5e-2):
        sys.exit(f"the columns do not compute the same thing: losses {losses}")
    timings: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 2):
        for name, step in steps.items():
            slow = name == "loop" and repeat > max(2, args.repeats // 3) + 1
            if not slow:
                timings[name].append(timed(step, device))
    timings = {name: values[2:] or values for name, values in timings.items()}
    medians = {name: statistics.median(values) for name, values in timings.items()}
    memory = {name: peak_mebibytes(step, device) for name, step in steps.items()}
    base = medians.get("by_hand")
    print(f"{args.model}, {args.image_size} px, {samples} expanded samples, {device_name(device)}")
    print("column            ms       min       max  samples/s x by_hand     MiB")
    for name, ms in medians.items():
        ratio = f"{base / ms:9.2f}" if base else " " * 9
        print(
            f"{name:10} {ms:9.1f} {min(timings[name]):9.1f} {max(timings[name]):9.1f} "
            f"{samples / ms * 1e3:10.0f} {ratio} {memory[name]:7.1f}"
        )
    result = {
        "benchmark": "step",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "expanded_samples": samples,
        "device": device_name(device),
        "torch": torch.__version__,
        "wfnet": wfnet.__version__,
        "commit": commit(),
        "command": " ".join(["python", *(argv if argv is not None else sys.argv)]),
        "milliseconds": timings,
        "median_milliseconds": medians,
        "peak_mebibytes": memory,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()

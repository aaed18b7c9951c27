"""Compiles, without a device, the Triton kernels that a device run launches, to take them along.

    TRITON_CACHE_DIR=/tmp/triton python benchmarks/device_precompile.py
    TRITON_CACHE_DIR=/tmp/triton python benchmarks/device_precompile.py --networks resnet18

Run it with the Triton and the Python version of the machine with the device, on the same sources,
and put the folder to the same path there: Triton then finds every kernel in its cache by the hash
of its source and of the arguments' types, and compiles what is missing as it always does. A
ResNet-50 has about 190 kernels, half a second each. What launches them is the step benchmark and
the smoke test themselves, on a pretended device (tests/pretended_cuda.py) of compute capability
9.0; of every kernel the machine code alone is kept, which is a few tens of KB.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import device_run
import device_smoke
import pretended_cuda
import triton

from wfnet.benchmarking.steps import StepSettings, make_problem, make_step
from wfnet.cli.classifier import create_classifier
from wfnet.fusion import checked
from wfnet.labels import DeferredLabelCheck

_STEPS = 5  # until a captured step is captured


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """A pretended device without memory: what compares or checks values cannot, and is left out."""
    check, submit = checked.check_plan, DeferredLabelCheck.submit

    def launches_alone(*arguments: object) -> None:
        with contextlib.suppress(pretended_cuda.NoValues):
            check(*arguments)

    checked.check_plan = launches_alone
    DeferredLabelCheck.submit = lambda *_: None
    try:
        with pretended_cuda.pretended_cuda(compile_kernels=True, values=False):
            yield
    finally:
        checked.check_plan, DeferredLabelCheck.submit = check, submit


def steps_of(model: str, settings: StepSettings) -> None:
    """The kernels of whole steps, unfused and fused, as benchmarks/bench_step.py runs them."""
    with contextlib.ExitStack() as stack:
        made = create_classifier(
            model, settings.classes, in_channels=3, image_size=settings.image_size
        )
        stack.enter_context(without_values())
        problem = make_problem(made, settings, stack)
        for how in ("unfused", "captured"):
            step = make_step(problem, f"wfnet/triton/{how}")
            for _ in range(_STEPS):
                step()


def smoke(families: list[str]) -> None:
    """The kernels of benchmarks/device_smoke.py, as benchmarks/device_run.py runs it."""
    try:
        with pretended_cuda.pretended_cuda(compile_kernels=True):
            device_smoke.main(["triton", *families, "--dtypes", "bfloat16"])
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def counted(what: str) -> Iterator[None]:
    """Prints how many kernels were compiled inside, and how many lay in the cache."""
    found, start = {True: 0, False: 0}, time.perf_counter()

    def listen(*, cache_hit: bool, **_: object) -> None:
        found[cache_hit] += 1

    triton.knobs.compilation.listener = listen
    try:
        yield
    finally:
        triton.knobs.compilation.listener = None
        print(f"{what}: {found[False]} kernels compiled, {found[True]} were there "
              f"({time.perf_counter() - start:.0f} s)", flush=True)  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=list(device_run.NETWORKS.values()))
    parser.add_argument("--families", nargs="*", default=list(device_run.FAMILIES),
                        help="of the smoke test")  # fmt: skip
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("-b", "--batch-size", type=int, default=256)
    parser.add_argument("-M", "--label-expansion", type=int, default=3)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    settings = StepSettings(
        image_size=arguments.image_size, batch_size=arguments.batch_size,
        label_expansion=arguments.label_expansion, classes=arguments.classes, device="cuda",
        share_images=False, dtype=torch.bfloat16,
    )  # fmt: skip
    triton.knobs.compilation.store_binary_only = True
    if arguments.families:
        with counted("smoke"):
            smoke(arguments.families)
    for model in arguments.networks:
        with counted(model):
            steps_of(model, settings)
    print(f"kernels lie in {triton.knobs.cache.dir}")


if __name__ == "__main__":
    main()

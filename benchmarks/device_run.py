"""Everything that a GPU is needed for, in one command: for a machine rented by the minute.

    python benchmarks/device_run.py --output runs/device --budget 540
    python benchmarks/device_run.py --list
    python benchmarks/device_run.py --stages ops eval --output runs/device2
    python benchmarks/device_run.py --continue runs/device/summary.json --output runs/device2
    python benchmarks/device_run.py --rehearse --output runs/rehearsal      tiny, on the CPU

Stages run in order of value until the budget is spent. Each part of a stage is a process of its own
with a log and a time limit: what hangs is killed with all its children (its Python stack is in the
log), what crashes takes nothing with it, and the run goes on. Under --output lie summary.json
(renewed after every part), logs/ and results/, there numerics.json with the errors of all kernels
so far; --archive FILE keeps all of it in one .tar.gz as well, renewed as the run goes on, for
machines that hand back few files. docs/devices.md says how to read it and what to commit.

A backend whose kernels fail the first stages is left out of the measurements, and the summary says
so. Nothing here changes the device's settings. Needs Python alone; installs this checkout offline.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numerics

ROOT = Path(__file__).resolve().parent.parent
# Run first in every run: nothing else means anything without them.
ALWAYS = ("environment", "build")
_SOURCES = ("wfnet", "kernels", "csrc", "benchmarks", "tests/gpu", "tests/cuda")
_SUFFIXES = (".py", ".json", ".cu", ".cuh", ".cpp", ".h")
_GRACE = 5.0  # seconds between the signal that asks for a stack and the one that ends
_ARCHIVE_EVERY = 20.0
_LARGEST_ARCHIVED = 8 * 2**20
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_TAIL = 40  # lines of a log that the summary shows of a failure


@dataclass(frozen=True)
class Part:
    """One process. ``{results}`` in its command is the folder of results."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    tests: bool = False  # writes {results}/tests-NAME.xml
    checks: str | None = None  # the kernels whose use in measurements hangs on this part


@dataclass(frozen=True)
class Stage:
    """Parts of one purpose, ``at_once`` of them side by side.

    Attributes:
        minutes: as expected; a guess until a run has said otherwise.
        limit: seconds after which what is left of it is killed.
        measures: kernels that failed are left out of the commands.
    """

    name: str
    what: str
    minutes: float
    limit: float
    parts: tuple[Part, ...]
    at_once: int = 1
    measures: bool = False


# -- what is run -----------------------------------------------------------------------------------

FAMILIES = ("gates", "conv", "expansion", "linear", "fused", "chain", "network")
# Tests of tests/gpu by file and -k expression: few tests share a process, because an illegal
# address takes down all that come after it. Every test is in one group (tests/test_device_run.py).
TESTS = {
    "triton-conv-bf16": ("test_triton_gpu.py", "conv2d_error and bfloat16"),
    "triton-conv-fp16": ("test_triton_gpu.py", "conv2d_error and float16 and not bfloat16"),
    "triton-conv-fp32": ("test_triton_gpu.py", "conv2d_error and float32"),
    "triton-linear": ("test_triton_gpu.py", "linear_error"),
    "triton-epilogues": ("test_triton_gpu.py", "epilogues_error"),
    "triton-rest": ("test_triton_gpu.py", "not _error"),
    "portable-errors": ("test_cuda_gpu.py", "portable and _error"),
    "portable-rest": ("test_cuda_gpu.py", "portable and not _error"),
    "hopper-errors": ("test_cuda_gpu.py", "hopper and _error"),
    "hopper-rest": ("test_cuda_gpu.py", "hopper and not _error"),
    "cuda-rest": ("test_cuda_gpu.py", "not portable and not hopper"),
    "step-eager": ("test_step_gpu.py", "not triton and not cuda"),
    "step-triton": ("test_step_gpu.py", "triton"),
    "step-cuda": ("test_step_gpu.py", "cuda"),
    "step-whole-run": ("test_run_gpu.py", "whole_run"),
}
# Run by the stages memcheck and racecheck, and what it runs itself.
NO_GROUP = ("test_sanitizer.py",)
NETWORKS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "vit-small": "vit_small_patch16_224",
    "vgg16": "vgg16",
    "vit-tiny": "vit_tiny_patch16_224",
}
KERNELS = ("eager", "triton", "cuda")
_WINNERS = "{results}/winners.json"
_ROOMY_MIB = 120_000


def python(*words: str) -> tuple[str, ...]:
    return sys.executable, *words


def stages(rehearse: bool = False) -> list[Stage]:
    """All stages in the order of their value; ``rehearse``: the same at tiny size on the CPU."""
    return [
        *_first(rehearse),
        _steps("resnet18", rehearse),
        _tests(),
        _plan("resnet50", rehearse),
        _step("resnet50", rehearse),
        _profile("resnet50", rehearse),
        _sanitizer("memcheck", rehearse),
        *(_step(name, rehearse) for name in ("vit-small", "vgg16", "resnet18", "vit-tiny")),
        *(_plan(name, rehearse) for name in ("resnet18", "vgg16")),
        _compiled("resnet18", rehearse, 3),
        _tuned("resnet18", rehearse),
        _whole(1000, "resnet50", rehearse, 4),
        _whole(100, "resnet18", rehearse, 2.5),
        _compiled("vit-small", rehearse, 3),
        _compiled("resnet50", rehearse, 5),
        _tuned("resnet50", rehearse),
        _sanitizer("racecheck", rehearse),
        *(_profile(name, rehearse) for name in ("resnet18", "vit-small", "vgg16", "vit-tiny")),
        *(_compiled(name, rehearse, 3) for name in ("vgg16", "vit-tiny")),
        _whole(100, "resnet50", rehearse, 3.5),
        _whole(1000, "resnet18", rehearse, 2.5),
        _operators("ops", "every layer, kernel by kernel", 4, 360, rehearse, ()),
        _operators("ops-fused", "forward with a whole epilogue", 2, 200, rehearse, (), "--fused"),
        *_others(rehearse),
    ]  # fmt: skip


def _first(rehearse: bool) -> list[Stage]:
    device = ("--device", "cpu") if rehearse else ()
    setup = "benchmarks/device_setup.py"
    smoke = []
    for backend, kernels in (("triton", None), ("cuda", "portable"), ("cuda", "hopper"),
                             ("eager", None)):  # fmt: skip
        label = backend if kernels is None else f"{backend}-{kernels}"
        options = [*device]
        environment = {"WFNET_CUDA_HOPPER": "0"} if kernels == "portable" else {}
        families = FAMILIES if backend != "eager" else ("network", "compiled")
        if rehearse:  # what the interpreter computes rightly and the emulation quickly
            if kernels == "hopper":
                continue
            families = ("network",) if backend == "eager" else ("gates", "linear")
            options += ["--dtypes", "float16" if backend == "triton" else "bfloat16"]
            environment = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
            options += ["--emulated"] if backend == "cuda" else []
        elif kernels is not None:
            options += ["--kernels", kernels]
        else:  # each dtype is compiled anew; the tests have the others
            options += ["--dtypes", "bfloat16"]
        for family in families:
            name = f"smoke-{label}-{family}"
            command = python("benchmarks/device_smoke.py", backend, family, *options,
                             "--output", f"{{results}}/{name}.json")  # fmt: skip
            checks = None if backend == "eager" else label
            smoke.append(Part(name, command, environment, checks=checks))
    first = (Part("first-steps", python("tests/cuda/first_steps.py"), checks="cuda-hopper"),)
    if rehearse:
        first = ()
    return [
        Stage("environment", "installs this checkout; device, driver, versions", 0.5, 90, (
            Part("facts", python(setup, "facts", "--output", "{results}/environment.json",
                                 *device)),
        )),
        Stage("build", "wfnet._C for this device, unless there is one", 0.7, 240, (
            Part("build", python(setup, "build", *device)),
        )),
        Stage("first-steps", "the Hopper kernels, one thing at a time", 0.7, 180, first),
        Stage("smoke", "every kernel once, at the smallest shapes", 1.5, 360, tuple(smoke),
              1 if rehearse else 8),
    ]  # fmt: skip


@functools.cache
def images_of_a_step() -> int:
    """n, of which 2 n expanded samples: 256, as the goals have it, where the peers fit.

    Masks written by hand keep about ten bytes of every activation: 69 GB of a VGG-16 at 512
    samples, an estimate, and each captured step has a memory of its own beside it.
    """
    query = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        if float(found.stdout.split()[0]) < _ROOMY_MIB:
            return 128
    return 256


def _bench_step(network: str, rehearse: bool, name: str, columns: list[str], *more: str) -> Part:
    options = ["--image-size", "224", "--classes", "1000", "--dtype", "bfloat16", "-b",
               str(images_of_a_step()), "-M", "3"]  # fmt: skip
    model = NETWORKS[network]
    if rehearse:
        options = ["--image-size", "32", "--classes", "10", "-b", "4", "-M", "2", "--repeats", "1",
                   "--device", "cpu"]  # fmt: skip
        model = "small/vit" if network.startswith("vit") else "small/resnet"
    command = python(
        "benchmarks/bench_step.py", "--models", model, *options, "--no-share-images", *more,
        "--output", f"{{results}}/{name}.json", "--columns", *columns,
    )  # fmt: skip
    return Part(name, command)


def _steps(network: str, rehearse: bool) -> Stage:
    """One process per backend: at real sizes a kernel may still take down its own."""
    parts = []
    for backend in KERNELS:
        columns = ["eager", "unmasked"]
        columns += [f"wfnet/{backend}/{way}" for way in ("unfused", "fused", "captured")]
        parts.append(_bench_step(network, rehearse, f"steps-{network}-{backend}", columns))
    return Stage(f"steps-{network}", "whole steps, one process per backend", 1.5, 300,
                 tuple(parts), measures=True)  # fmt: skip


def _step(network: str, rehearse: bool) -> Stage:
    columns = ["eager", "unmasked", *(f"wfnet/{backend}/captured" for backend in KERNELS)]
    part = _bench_step(network, rehearse, f"step-{network}", columns)
    return Stage(f"step-{network}", "whole steps, all in one process", 0.8, 180, (part,),
                 measures=True)  # fmt: skip


def _compiled(network: str, rehearse: bool, minutes: float) -> Stage:
    columns = ["eager", "compile", "unmasked_compiled", "wfnet/eager/compiled",
               *(f"wfnet/{backend}/captured" for backend in ("triton", "cuda", "auto")),
               "wfnet/eager/compiled_captured"]  # fmt: skip
    part = _bench_step(network, rehearse, f"compiled-{network}", columns)
    if not rehearse:
        part = replace(part, environment={"WFNET_WINNERS": _WINNERS})
    return Stage(f"compiled-{network}", "the same beside torch.compile, all in one process",
                 minutes, 420, (part,), measures=True)  # fmt: skip


def _tuned(network: str, rehearse: bool) -> Stage:
    """A plan again, with a search among the nearest few tiles of every Triton kernel."""
    plan = _plan(network, rehearse).parts[0]
    rename = {f"{{results}}/plan-{network}.json": f"{{results}}/tuned-{network}.json"}
    command = tuple(rename.get(word, word) for word in plan.command if word != "cuda")
    environment = {"WFNET_AUTOTUNE": "quick", "XDG_CACHE_HOME": "{results}/cache"}
    part = Part(f"tuned-{network}", command, environment)
    return Stage(f"tuned-{network}", "the same with searched tiles, stored in results/cache", 4,
                 400, (part,), measures=True)  # fmt: skip


def _plan(network: str, rehearse: bool) -> Stage:
    """Who is fastest at every convolution; with a commit to name, as a table that `auto` reads."""
    options = ["--model", NETWORKS[network], "-b", str(images_of_a_step()), "--providers",
               *KERNELS]  # fmt: skip
    if rehearse:
        options = ["--model", "small/resnet", "--image-size", "16", "-b", "4", "--repeats", "1",
                   "--device", "cpu", "--providers", "eager"]  # fmt: skip
    name, record = f"plan-{network}", f"{{results}}/plan-{network}.json"
    script = "benchmarks/bench_plan.py"
    parts = [Part(name, python(script, *options, "--output", record))]
    if not rehearse:
        parts.append(
            Part(f"winners-{network}", python(script, "--record", record, "--winners", _WINNERS))
        )
    return Stage(name, "every convolution of a step, by every backend", 1.5, 200, tuple(parts),
                 measures=True)  # fmt: skip


def _whole(classes: int, network: str, rehearse: bool, minutes: float) -> Stage:
    """A run as a user starts it; of its columns the first whose kernels work. Images for a number
    of classes are made by the first stage that needs them."""
    options = ["--classes", f"{classes}", "--networks", network, "--columns", "wfnet/cuda/captured",
               "wfnet/triton/captured", "wfnet/eager/compiled_captured"]  # fmt: skip
    if rehearse:  # above 100 classes images show nothing, also here
        options = ["--classes", "10" if classes <= 100 else "101", "--networks", "small/resnet",
                   "--image-size", "32", "--per-class", "20", "--epochs", "1", "--samples", "600",
                   "-b", "8", "-M", "2", "--loop-steps", "1", "--workers", "1", "--threads", "1",
                   "--device", "cpu", "--columns", "wfnet/eager/captured"]  # fmt: skip
    name = f"whole-{classes}-{network}"
    command = python("benchmarks/whole_run.py", *options, "--output", f"{{results}}/{name}.json")
    what = "a whole run from JPEG files: time, quality, the loop beside it"
    return Stage(name, what, minutes, 120 * minutes, (Part(name, command),), measures=True)


def _tests() -> Stage:
    parts = []
    for name, (file, expression) in TESTS.items():
        command = python(
            "-m", "pytest", "-m", "gpu", f"tests/gpu/{file}", "-k", expression, "-v",
            "--tb=short", "-o", "timeout=120", "-o", "faulthandler_timeout=100",
            "-p", "no:cacheprovider", f"--junitxml={{results}}/tests-{name}.xml",
        )  # fmt: skip
        parts.append(Part(name, command, tests=True))
    what = "tests/gpu, few tests a process"
    return Stage("tests", what, 2.5, 300, tuple(parts), at_once=8)


def _profile(network: str, rehearse: bool) -> Stage:
    """The slowest layers under the hardware's counters; one backend after the other."""
    options = ["--image-size", "224", "--classes", "1000", "--dtype", "bfloat16", "-b",
               str(images_of_a_step()), "-M", "3", "--ncu-seconds", "100"]  # fmt: skip
    model, providers = NETWORKS[network], ("triton", "cuda")
    if rehearse:  # times alone, where nothing is counted
        options = ["--image-size", "32", "--classes", "10", "-b", "4", "-M", "2", "--repeats", "1",
                   "--device", "cpu"]  # fmt: skip
        model = "small/vit" if network.startswith("vit") else "small/resnet"
        providers = ("eager",)
    parts = []
    for backend in providers:
        name = f"profile-{network}-{backend}"
        command = python(
            "benchmarks/profile_layers.py", "--model", model, *options, "--output",
            f"{{results}}/{name}.json", "--columns", f"wfnet/{backend}/fused",
        )  # fmt: skip
        parts.append(Part(name, command))
    return Stage(f"profile-{network}", "the slowest layers, by the hardware's counters", 1.5, 260,
                 tuple(parts), measures=True)  # fmt: skip


def _sanitizer(tool: str, rehearse: bool) -> Stage:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    small = ("conv", "chain", "linear", "gates")
    scripts = {
        "all": ("tests/gpu/sanitized.py",),
        "hopper": ("benchmarks/device_smoke.py", "cuda", *small, "--kernels", "hopper", "--dtypes",
                   "bfloat16"),
        "triton": ("benchmarks/device_smoke.py", "triton", *small, "--dtypes", "bfloat16"),
    }  # fmt: skip
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "WFNET_AUTOTUNE": "0"}
    parts = tuple(
        Part(f"{tool}-{name}",
             (program, "--tool", tool, "--error-exitcode", "9", *python(*script)), environment)
        for name, script in scripts.items()
    )  # fmt: skip
    if rehearse:
        parts = ()
    return Stage(tool, "compute-sanitizer over small shapes", 1.5, 240, parts, at_once=3)


def _operators(
    name: str, what: str, minutes: float, limit: float, rehearse: bool, layers: tuple, *more: str
) -> Stage:
    providers = ["eager", "unmasked", "triton", "cuda"]
    if "--fused" in more:
        providers = ["eager", "triton", "cuda", "cudnn"]
    options = []
    if rehearse:
        options = ["--scale", "16", "-b", "2", "--repeats", "1", "--classes", "10"]
    command = python(
        "benchmarks/bench_ops.py", *(("--layers", *layers) if layers else ()), *options, *more,
        "--output", f"{{results}}/{name}", "--providers", *providers,
    )  # fmt: skip
    return Stage(name, what, minutes, limit, (Part(name, command),), measures=True)


def _others(rehearse: bool) -> list[Stage]:
    tiny = ("--device", "cpu")
    evaluation = ("--model", "resnet50", "--images", "64", "--classes", "250", "--repeats", "3")
    scaling = ("--model", "resnet18", "--columns", "eager", "unmasked", "wfnet/triton/captured",
               "wfnet/cuda/captured")  # fmt: skip
    data = ("--workers", "0", "8", "--images", "512")
    peers = "resnet18", "vit-tiny"
    if rehearse:
        evaluation = ("--model", "small/resnet", "--image-size", "16", "--images", "4", "--classes",
                      "5", "-b", "10", "--repeats", "1", *tiny)  # fmt: skip
        scaling = ("--model", "small/resnet", "--image-size", "16", "-b", "2", "--doublings", "0",
                   "--repeats", "1", "--columns", "eager", "unmasked", *tiny)  # fmt: skip
        data = ("--workers", "0", "--images", "16", "--image-size", "32", "-b", "8", "--repeats",
                "1", *tiny)  # fmt: skip

    def one(name: str, what: str, minutes: float, limit: float, *command: str, **environment: str):
        part = Part(name, python(*command), environment)
        return Stage(name, what, minutes, limit, (part,), measures=True)

    copying = tuple(
        _bench_step(network, rehearse, f"peers-{network}", ["loop", "grouped", "vmap", "eager"],
                    "--repeats", "1" if rehearse else "5")
        for network in peers
    )  # fmt: skip
    return [
        one("eval", "all-class evaluation", 2, 240, "benchmarks/bench_eval.py", *evaluation,
            "--output", "{results}/eval.json"),
        one("data", "loading and caches", 2, 240, "benchmarks/bench_data.py", *data,
            "--output", "{results}/data.json"),
        Stage("peers", "one masked weight copy per sample", 3, 300, copying, measures=True),
        one("scaling", "growth with batch, M, classes, pixels", 4, 360,
            "benchmarks/bench_scaling.py", *scaling, "--output", "{results}/scaling.json"),
    ]  # fmt: skip


# -- kernels that failed ---------------------------------------------------------------------------


def without(part: Part, failed: set[str]) -> Part | str:
    """The part without kernels that failed their first run, or why nothing is left of it.

    Args:
        failed: of ``triton``, ``cuda-portable`` and ``cuda-hopper``.
    """
    environment = dict(part.environment)
    out = {"triton"} & failed
    if "cuda-portable" in failed:
        out.add("cuda")  # the Hopper kernels leave some layers to the portable ones
    elif "cuda-hopper" in failed:
        environment["WFNET_CUDA_HOPPER"] = "0"
    option, kept = "", []
    for word in part.command:
        option = word if word.startswith("--") else option
        backend = word.split("/")[1] if word.startswith("wfnet/") else word
        if option in ("--columns", "--providers") and backend in out:
            continue
        kept.append(word)
    names = [word for word in part.command if word.startswith("wfnet/")]
    if names and not any(word.startswith("wfnet/") for word in kept):
        return f"{' and '.join(sorted(out))} failed their first run"
    return replace(part, command=tuple(kept), environment=environment)


# -- processes -------------------------------------------------------------------------------------


class Process:
    """A part that runs: in a process group of its own, output in a log."""

    def __init__(self, part: Part, output: Path, environment: dict[str, str], limit: float):
        self.part, self.limit = part, limit
        self.command = [word.replace("{results}", str(output / "results")) for word in part.command]
        self.log = output / "logs" / f"{part.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        own = {
            name: value.replace("{results}", str(output / "results"))
            for name, value in part.environment.items()
        }
        self.start = time.monotonic()
        self.child: subprocess.Popen | None = None
        with open(self.log, "wb") as log:
            try:
                self.child = subprocess.Popen(
                    self.command, cwd=ROOT, env={**environment, **own}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, preexec_fn=_alone,
                )  # fmt: skip
            except OSError as error:
                log.write(f"not started: {error}\n".encode())

    @property
    def late(self) -> bool:
        return time.monotonic() - self.start > self.limit

    def ended(self) -> bool:
        return self.child is None or self.child.poll() is not None

    def stop(self) -> None:
        """Asks for the stack of a hanging Python process, then ends it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child.pid, signal.SIGABRT)  # PYTHONFAULTHANDLER prints the stack
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(_GRACE)
        self.clear()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(_GRACE)  # one that waits for its driver may stay; the run goes on

    def clear(self) -> None:
        """Ends what is left of the group."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.child.pid, signal.SIGKILL)

    def result(self, output: Path, out_of_time: bool, rehearse: bool) -> dict[str, object]:
        """What the summary says of it."""
        code = None if self.child is None else self.child.returncode
        found: dict[str, object] = {
            "name": self.part.name,
            "status": "passed" if code == 0 else "failed",
            "exit_code": code,
            "seconds": round(time.monotonic() - self.start, 1),
            "command": " ".join(self.command),
            "environment": self.part.environment,
            "log": str(self.log.relative_to(output)),
        }
        if self.part.checks:
            found["checks"] = self.part.checks
        if self.part.tests:
            counts = _junit(output / "results" / f"tests-{self.part.name}.xml")
            found["tests"] = counts
            nothing_ran = counts is not None and counts["tests"] == counts["skipped"]
            if code == 5 or (code == 0 and nothing_ran):  # 5: no test has such a name
                found["status"] = "skipped" if code == 5 or rehearse else "failed"
                found["note"] = "no test ran"
        if out_of_time:
            found["status"] = "out of time"
        if found["status"] not in ("passed", "skipped"):
            lines = self.log.read_bytes()[-20000:].decode(errors="replace").splitlines()
            found["tail"] = lines[-_TAIL:]
        return found


def _alone() -> None:
    """In the child: a group of its own, no core file, and an end when the runner ends."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _junit(path: Path) -> dict[str, int] | None:
    try:
        suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError, StopIteration):
        return None
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


# -- the run ---------------------------------------------------------------------------------------


class Stopped(Exception):
    """The runner itself was told to end."""


class Runner:
    """Runs stages, keeps summary and archive up to date."""

    def __init__(self, options: argparse.Namespace, kept: list[dict]):
        self.options = options
        self.output: Path = options.output
        self.start = time.monotonic()
        self.archived = 0.0
        self.summary: dict[str, object] = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "rehearsal": options.rehearse,
            "budget_seconds": options.budget,
            "sources": sources_digest(),
            "command": " ".join(["python", "benchmarks/device_run.py", *sys.argv[1:]]),
            "machine": None,
            "stages": kept,
        }
        self.environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        if options.commit:
            self.environment["WFNET_COMMIT"] = options.commit

    @property
    def left(self) -> float:
        return self.options.budget - (time.monotonic() - self.start)

    def failed_kernels(self) -> set[str]:
        """Of ``triton``, ``cuda-portable``, ``cuda-hopper``: those that failed a check."""
        return {
            part["checks"]
            for stage in self.summary["stages"]
            for part in stage["parts"]
            if part.get("checks") and part["status"] != "passed"
        }

    def run(self, chosen: list[Stage]) -> bool:
        """Whether every chosen stage passed."""
        for stage in chosen:
            record = {"name": stage.name, "what": stage.what, "status": "running", "seconds": 0.0,
                      "parts": []}  # fmt: skip
            self.summary["stages"].append(record)
            self.write()
            try:
                self.run_stage(stage, record)
            except BaseException:
                record["status"] = "interrupted"
                raise
            finally:
                numerics.write(
                    self.output, self.summary["stages"], self.output / "results" / "numerics.json"
                )
                self.write()
                self.say(record)
            if stage.name == "environment" and record["status"] != "passed":
                print("nothing can run without its environment", flush=True)
                return False
        return all(s["status"] in ("passed", "skipped") for s in self.summary["stages"])

    def run_stage(self, stage: Stage, record: dict) -> None:
        if not stage.parts:
            record["status"] = "skipped"
            record["note"] = "needs a device"
            return
        if self.left < min(30 * stage.minutes, stage.limit):
            record["status"] = "no time left"
            return
        start = time.monotonic()
        waiting: list[Part] = []
        failed = self.failed_kernels() if stage.measures else set()
        if failed:
            record["without"] = sorted(failed)
        for part in stage.parts:
            fitting = without(part, failed)
            if isinstance(fitting, str):
                record["parts"].append({"name": part.name, "status": "left out", "note": fitting})
            else:
                waiting.append(fitting)
        running: list[Process] = []
        try:
            while waiting or running:
                limit = min(stage.limit - (time.monotonic() - start), self.left)
                while waiting and limit <= 0:
                    part = waiting.pop(0)
                    record["parts"].append({"name": part.name, "status": "no time left",
                                            "checks": part.checks})  # fmt: skip
                while waiting and len(running) < stage.at_once:
                    # What hangs leaves the parts behind it their share.
                    share = limit / math.ceil(len(waiting) / stage.at_once)
                    part = waiting.pop(0)
                    running.append(Process(part, self.output, self.environment, share))
                time.sleep(0.05)
                for process in [p for p in running if p.ended() or p.late]:
                    late = not process.ended()
                    if late:
                        process.stop()
                    process.clear()
                    running.remove(process)
                    found = process.result(self.output, late, self.options.rehearse)
                    record["parts"].append(found)
                    record["seconds"] = round(time.monotonic() - start, 1)
                    self.write()
                self.keep_archive()
        finally:
            for process in running:
                process.clear()
        record["status"] = _status([part["status"] for part in record["parts"]])

    def say(self, record: dict) -> None:
        """One line of a stage."""
        parts = record["parts"]
        good = [p for p in parts if p["status"] in ("passed", "skipped")]
        others = [f"{p['name']} ({_reason(p)})" for p in parts if p not in good]
        line = f"[{time.monotonic() - self.start:5.0f} s] {record['name']:18} {record['status']:12}"
        line += f" {record['seconds']:6.1f} s"
        if len(parts) > 1:
            line += f"  {len(good)} of {len(parts)}"
        if record.get("without"):
            line += f"; without {', '.join(record['without'])}"
        if others:
            line += f"; {', '.join(others)}"
        print(line, flush=True)

    def write(self) -> None:
        """Summary and, if asked for, archive."""
        facts = self.output / "results" / "environment.json"
        if facts.exists():
            self.summary["machine"] = json.loads(facts.read_text())
        self.summary["seconds"] = round(time.monotonic() - self.start, 1)
        path = self.output / "summary.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.summary, indent=1) + "\n")
        part.replace(path)
        self.keep_archive(now=True)

    def keep_archive(self, now: bool = False) -> None:
        """All files under the output in one, renewed every 20 seconds."""
        if self.options.archive is None:
            return
        if not now and time.monotonic() - self.archived < _ARCHIVE_EVERY:
            return
        self.archived = time.monotonic()
        archive: Path = self.options.archive
        archive.parent.mkdir(parents=True, exist_ok=True)
        part = archive.with_name(archive.name + ".part")
        with tarfile.open(part, "w:gz", compresslevel=3) as tar:
            for path in sorted(self.output.rglob("*")):
                with contextlib.suppress(FileNotFoundError):  # a temporary file that is gone
                    if path.is_file() and path.stat().st_size <= _LARGEST_ARCHIVED:
                        tar.add(path, path.relative_to(self.output))
        part.replace(archive)


def _status(parts: list[str]) -> str:
    """Of a stage: the worst of its parts."""
    for status in ("failed", "out of time", "no time left"):
        if status in parts:
            return status
    return "passed" if "passed" in parts else "skipped"


def _reason(part: dict) -> str:
    if part["status"] != "failed":
        return part["status"]
    if part.get("tests"):
        return "{failures} failures, {errors} errors of {tests}".format(**part["tests"])
    code = part["exit_code"]
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"status {code}"


def sources_digest() -> str:
    """A hash of everything that a stage runs: what tells whether an earlier result still counts."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SUFFIXES and "results" not in path.relative_to(ROOT).parts:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def kept_stages(path: Path) -> list[dict]:
    """Stages of an earlier run that passed.

    Raises:
        SystemExit: if there is no such summary, or it is of other sources.
    """
    try:
        summary = json.loads(path.read_text())
        passed = [stage for stage in summary["stages"] if stage["status"] == "passed"]
        sources, machine = summary["sources"], summary["machine"] or {}
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--continue {path} is not the summary of a run: {error}") from None
    if sources != sources_digest():
        raise SystemExit(
            f"--continue {path} is of other sources (commit {machine.get('commit', 'unknown')}); "
            "name the stages that are to run with --stages instead"
        )
    return [{**stage, "kept": True} for stage in passed if stage["name"] not in ALWAYS]


def listing(made: list[Stage]) -> str:
    """What ``--list`` prints."""
    lines = [f"{'stage':20}{'minutes':>8}{'parts':>7}  what"]
    for stage in made:
        lines.append(f"{stage.name:20}{stage.minutes:8.1f}{len(stage.parts):7}  {stage.what}")
    lines.append(f"{'all':20}{sum(stage.minutes for stage in made):8.1f}")
    return "\n".join([*lines, "minutes are expected, not measured; limits are about twice that"])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/device"))
    parser.add_argument("--archive", type=Path, help="one .tar.gz of everything under --output")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="of the run")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="these alone, in this order")
    parser.add_argument("--continue", dest="before", type=Path, metavar="SUMMARY",
                        help="skip what passed in an earlier run of the same sources")  # fmt: skip
    parser.add_argument("--commit", help="of this checkout, where its repository is not there")
    parser.add_argument("--rehearse", action="store_true", help="at tiny size on the CPU")
    parser.add_argument("--list", action="store_true", help="print the stages and end")
    options = parser.parse_args(argv)
    names = [stage.name for stage in stages()]
    unknown = [name for name in options.stages or () if name not in names]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; choose among {', '.join(names)}")
    if options.budget <= 0:
        parser.error(f"--budget must be positive, not {options.budget:g}")
    options.output = options.output.absolute()
    if not options.list and (options.output / "summary.json").exists():
        parser.error(f"{options.output} holds an earlier run; choose another --output")
    return options


def main(argv: list[str] | None = None, made: Callable[[bool], list[Stage]] = stages) -> int:
    options = parse(argv)
    every = made(options.rehearse)
    if options.list:
        print(listing(every))
        return 0
    kept = [] if options.before is None else kept_stages(options.before)
    there = {stage["name"] for stage in kept}
    by_name = {stage.name: stage for stage in every}
    wanted = [*(name for name in ALWAYS if name in by_name), *(options.stages or by_name)]
    chosen = [by_name[name] for name in dict.fromkeys(wanted) if name not in there]
    (options.output / "results").mkdir(parents=True, exist_ok=True)

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    signal.signal(signal.SIGTERM, stop)
    runner = Runner(options, kept)
    try:
        return 0 if runner.run(chosen) else 1
    except (Stopped, KeyboardInterrupt) as error:
        number = error.args[0] if isinstance(error, Stopped) else signal.SIGINT
        print(f"stopped by {signal.Signals(number).name}; what there is lies in {options.output}")
        return 128 + number


if __name__ == "__main__":
    sys.exit(main())

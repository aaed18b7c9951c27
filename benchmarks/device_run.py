"""Everything that a GPU is needed for, in one command: for a machine rented by the minute.

    python benchmarks/device_run.py --output runs/device --budget 540
    python benchmarks/device_run.py --list
    python benchmarks/device_run.py --stages memcheck racecheck --output runs/device2

Stages run in order of value until the budget is spent. Each is a process of its own with a log and
a limit: what hangs is killed with all its children (its Python stack is in the log), what crashes
takes nothing with it, and the run goes on; --stages and another --output run what is left. Under
--output lie summary.json, logs/, results/ and, beside it, OUTPUT.tar.gz with all of it, renewed
after every stage. docs/devices.md says how to read it and what to commit.

Needs Python 3.11 or newer, PyTorch, Triton, timm and torchvision; installs and downloads nothing,
and changes no setting of the device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "build" / "device_run"
FIRST = ("facts", "build")  # nothing else means anything without them
NETWORKS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "vit-small": "vit_small_patch16_224",
    "vgg16": "vgg16",
    "vit-tiny": "vit_tiny_patch16_224",
}
# Tests of tests/gpu by file and -k expression, every test once: an illegal address takes down all
# that come after it.
TESTS = {
    "hopper": ("test_kernels_gpu.py", "cuda"),
    "triton": ("test_kernels_gpu.py", "not cuda"),
    "step": ("test_step_gpu.py", "test"),
    "run": ("test_run_gpu.py", "test"),
}
# One operation of one backend each, in bfloat16: what the measurements below need.
SMOKE = {
    "hopper-forward": ("test_kernels_gpu.py", "cuda and conv2d_error and bfloat16"),
    "hopper-gradient": ("test_kernels_gpu.py", "cuda and chain_error and bfloat16"),
    "hopper-linear": ("test_kernels_gpu.py", "cuda and linear_error and bfloat16"),
    "triton-forward": ("test_kernels_gpu.py", "triton and conv2d_error and bfloat16"),
    "triton-gradient": ("test_kernels_gpu.py", "triton and chain_error and bfloat16"),
    "triton-linear": ("test_kernels_gpu.py", "triton and linear_error and bfloat16"),
}
# Every kernel once, on small and awkward shapes: what compute-sanitizer watches.
SMALL = "bfloat16 and (odd or pixel or window or source) or range or gate"
_CONVOLVES = {
    "cuda": ("smoke-hopper-forward", "smoke-hopper-gradient"),
    "triton": ("smoke-triton-forward", "smoke-triton-gradient"),
}
_LINEAR = {"cuda": ("smoke-hopper-linear",), "triton": ("smoke-triton-linear",)}
_GRACE = 5.0  # seconds between the signal that asks for a stack and the one that ends
_TAIL = 40  # lines of a log that the summary shows of a failure
_FACTS = """
import torch
from wfnet.benchmarking.provenance import provenance
print(torch.cuda.get_device_properties(0), provenance("cuda", []))
x = torch.randn(256, 256, device="cuda")
assert (x @ x).isfinite().all()
"""
_BUILD = """
import subprocess, sys
from wfnet.backends import cuda_launch
missing = cuda_launch.library().missing
print(missing or "wfnet._C is usable as it is")
sys.exit(missing and subprocess.call([sys.executable, "csrc/build.py"]))
"""


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        command: ``{results}`` in it is the folder of results.
        limit: seconds after which it is killed.
        needs: stages without which it means nothing. One that failed leaves it out; one that was
            out of time, or did not run, does not.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()


# -- the plan --------------------------------------------------------------------------------------


def python(*words: str) -> tuple[str, ...]:
    return sys.executable, *words


def command(name: str, line: str, limit: float, needs: tuple[str, ...] = ()) -> Stage:
    """One that writes ``{results}/NAME.json``."""
    words = f"{line} --output {{results}}/{name}.json"
    return Stage(name, python(*words.split()), limit, needs)


def tests(groups: dict[str, tuple[str, str]], prefix: str, limit: float) -> list[Stage]:
    options = "-v --tb=short -o timeout=100 -o faulthandler_timeout=90 -p no:cacheprovider"
    made = []
    for name, (file, expression) in groups.items():
        name = f"{prefix}-{name}"
        words = ["-P", "-m", "pytest", "-m", "gpu", f"tests/gpu/{file}", "-k", expression]
        report = f"--junitxml={{results}}/{name}.xml"
        made.append(Stage(name, python(*words, *options.split(), report), limit))
    return made


def sanitizer(tool: str) -> Stage:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", tool)
    words = ("-P", "-m", "pytest", "-m", "gpu", "tests/gpu/test_kernels_gpu.py", "-k", SMALL)
    return Stage(tool, (*command, "--error-exitcode", "9", *python(*words)), 240)


def plan(batch_size: int = 256) -> list[Stage]:
    """Returns all stages in the order of their value: first what the claim rests on.

    Args:
        batch_size: n of whole steps, of which 2 n expanded samples.
    """
    bench = "-P -m wfnet bench --img-size 224 --num-classes 1000 --amp --device cuda --repeats 15"
    bench += f" -b {batch_size} -M 3 --no-share-images --tune 100"

    def step(network: str, backend: str, *columns: str) -> Stage:
        """Whole steps; one process per backend: at real sizes a kernel may take down its own.

        Of ``auto`` the result has the times of every backend at every call.
        """
        hows = ("fused", "compiled_captured") if backend == "eager" else ("captured",)
        columns = ("eager", *columns, *(f"wfnet/{backend}/{how}" for how in hows))
        line = f"{bench} --model {NETWORKS[network]}"
        needs = (_LINEAR if network.startswith("vit") else _CONVOLVES).get(backend, ())
        line += f" --columns {' '.join(columns)}"
        return command(f"step-{network}-{backend}", line, 180, needs)

    steps = "-P -m pytest tests/csrc/test_first_steps.py -v --tb=short -p no:cacheprovider"
    steps += " -o timeout=40 -o faulthandler_timeout=30"
    compiled = ("unmasked_compiled", "compile")
    whole = "benchmarks/whole_run.py --classes 1000 --network resnet50 --backend cuda"
    return [
        Stage("facts", python("-P", "-c", _FACTS), 90),
        Stage("build", python("-P", "-c", _BUILD), 240),
        Stage("first-steps", python(*steps.split()), 120),
        *tests(SMOKE, "smoke", 60),
        step("resnet18", "cuda", *compiled),
        step("resnet18", "triton", *compiled),
        step("resnet50", "auto"),
        step("resnet50", "cuda", *compiled),
        step("resnet50", "triton", "unmasked_compiled"),
        *tests(TESTS, "tests", 120),
        sanitizer("memcheck"),
        *(
            step(network, backend, *compiled)
            for network in ("vit-small", "vgg16", "vit-tiny")
            for backend in ("cuda", "triton")
        ),
        step("resnet18", "eager"),
        *(step(network, "auto") for network in ("resnet18", "vgg16")),
        command(
            "step-resnet50-distil",
            f"{bench} --model resnet50 --distil --columns eager compile unmasked_compiled "
            "wfnet/cuda/captured wfnet/triton/captured",
            240,
            (*_CONVOLVES["cuda"], *_CONVOLVES["triton"]),
        ),
        command("whole-1000-resnet50", whole, 400, _CONVOLVES["cuda"]),
        sanitizer("racecheck"),
    ]


# -- the run ---------------------------------------------------------------------------------------


def execute(command: list[str], environment: dict[str, str], log: Path, limit: float) -> dict:
    """Runs a process in a group of its own, its output in a log.

    Returns:
        Its status ``passed``, ``failed`` or ``out of time``, its seconds and exit code.
    """
    start = time.monotonic()
    with open(log, "wb") as file:
        kept = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        try:
            child = subprocess.Popen(
                command, cwd=ROOT, env=environment, start_new_session=True, **kept
            )
        except OSError as error:
            file.write(f"not started: {error}\n".encode())
            return {"status": "failed", "seconds": 0.0, "exit_code": None}
    try:
        status = "passed" if child.wait(max(limit, 0)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "out of time"
        child.send_signal(signal.SIGABRT)  # PYTHONFAULTHANDLER prints the stack
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # what is left of it
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE)  # one that waits for its driver may stay; the run goes on
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": seconds, "exit_code": child.returncode}


class Runner:
    """Runs stages; keeps summary and archive up to date."""

    def __init__(self, output: Path, budget: float):
        self.output = output
        self.end = time.monotonic() + budget
        self.records: list[dict] = []
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self.environment["PYTHONPATH"] = str(PACKAGE)
        # What `auto` decides comes back with the results.
        self.environment["XDG_CACHE_HOME"] = str(self.output / "results" / "cache")

    def run(self, stages: list[Stage]) -> bool:
        """Returns whether every stage passed."""
        for stage in stages:
            record = {"name": stage.name, "status": "interrupted"}
            self.records.append(record)
            try:
                self.run_stage(stage, record)
            finally:
                self.write()
            note = f" ({record['note']})" if "note" in record else ""
            print(f"{stage.name:24}{record['status']}{note}", flush=True)
            if stage.name == "facts" and record["status"] != "passed":
                print("nothing can run here; its log says why", flush=True)
                return False
        return all(record["status"] == "passed" for record in self.records)

    def run_stage(self, stage: Stage, record: dict) -> None:
        failed = {one["name"] for one in self.records if one["status"] == "failed"}
        broken = [name for name in stage.needs if name in failed]
        if broken:
            record |= {"status": "left out", "note": f"{', '.join(broken)} failed"}
            return
        left = self.end - time.monotonic()
        if left < min(stage.limit / 4, 30):
            record["status"] = "no time left"
            return
        make_importable(PACKAGE)  # anew: the build adds to it
        results, log = str(self.output / "results"), self.output / "logs" / f"{stage.name}.log"
        command = [word.replace("{results}", results) for word in stage.command]
        record["command"] = " ".join(command)
        record |= execute(command, self.environment, log, min(stage.limit, left))
        if record["status"] != "passed":
            lines = log.read_bytes()[-20000:].decode(errors="replace").splitlines()
            record["tail"] = lines[-_TAIL:]
        if (record["exit_code"] or 0) < 0:
            record["note"] = signal.Signals(-record["exit_code"]).name

    def write(self) -> None:
        """Writes the summary, and the archive of all files."""
        command = " ".join(["python", "benchmarks/device_run.py", *sys.argv[1:]])
        summary = {"command": command, "stages": self.records}
        (self.output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        shutil.make_archive(str(self.output), "gztar", self.output)


def make_importable(folder: Path) -> None:
    """Makes ``folder`` the package as it would be installed, of links into the checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "wfnet"
    package.mkdir(parents=True)
    for path in (ROOT / "wfnet").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/device"))
    add("--budget", type=float, default=540, metavar="SECONDS", help="of the run")
    names = [stage.name for stage in plan()]
    add("--stages", nargs="+", choices=names, metavar="STAGE", help="these alone, in this order")
    add("-b", "--batch-size", type=int, default=256, help="images n of a whole step")
    add("--list", action="store_true", help="print the stages and end")
    options = parser.parse_args(argv)
    if options.budget <= 0:
        parser.error(f"--budget must be positive, not {options.budget:g}")
    options.output = options.output.absolute()
    return options


def main(argv: list[str] | None = None, stages: list[Stage] | None = None) -> int:
    options = parse(argv)
    stages = stages or plan(options.batch_size)
    if options.stages:
        by_name = {stage.name: stage for stage in stages}
        stages = [by_name[name] for name in dict.fromkeys([*FIRST, *options.stages])]
    if options.list:
        print("\n".join(f"{one.name:24}at most {one.limit:4.0f} s" for one in stages))
        return 0
    if (options.output / "summary.json").exists():
        raise SystemExit(f"{options.output} holds a run; choose another --output")
    for folder in ("results", "logs"):
        (options.output / folder).mkdir(parents=True, exist_ok=True)
    # What runs ends with the runner, and the summary is written.
    stop = lambda number, frame: sys.exit(128 + number)  # noqa: E731
    before = signal.signal(signal.SIGTERM, stop)
    try:
        return 0 if Runner(options.output, options.budget).run(stages) else 1
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())

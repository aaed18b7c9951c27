"""Everything that a GPU is needed for, in one command: for a machine rented by the minute.

    python benchmarks/device_run.py --output runs/device --budget 540
    python benchmarks/device_run.py --list
    python benchmarks/device_run.py --stages memcheck racecheck --output runs/device2
    python benchmarks/device_run.py --rehearse --output runs/rehearsal      tiny, on the CPU

Stages run in order of value until the budget is spent. Each is a process of its own with a log and
a limit: what hangs is killed with all its children (its Python stack is in the log), what crashes
takes nothing with it, and the run goes on. The same command again goes on where it ended, as long
as no source has changed. Under --output lie summary.json, logs/, results/ and device.tar.gz with
all of it, renewed after every stage. docs/devices.md says how to read it and what to commit.

Needs Python 3.11 or newer, PyTorch, Triton, timm and torchvision; installs and downloads nothing,
and changes no setting of the device.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = ("facts", "build")  # nothing else means anything without them
NETWORKS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "vit-small": "vit_small_patch16_224",
    "vgg16": "vgg16",
    "vit-tiny": "vit_tiny_patch16_224",
}
# Tests of tests/gpu by file and -k expression: few share a process, because an illegal address
# takes down all that come after it. Every test is in one of them.
TESTS = {
    "hopper-errors": ("test_kernels_gpu.py", "cuda and _error"),
    "hopper-rest": ("test_kernels_gpu.py", "cuda and not _error"),
    "triton-conv": ("test_kernels_gpu.py", "triton and conv2d_error"),
    "triton-errors": ("test_kernels_gpu.py", "triton and _error and not conv2d"),
    "triton-rest": ("test_kernels_gpu.py", "not cuda and not _error"),
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
_SOURCES = ("wfnet", "kernels", "csrc", "benchmarks", "tests/gpu", "tests/csrc")
_SUFFIXES = (".py", ".json", ".cu", ".cpp", ".h")
_GRACE = 5.0  # seconds between the signal that asks for a stack and the one that ends
_LARGEST_ARCHIVED = 8 * 2**20
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_TAIL = 40  # lines of a log that the summary shows of a failure


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
    environment: dict[str, str] = field(default_factory=dict)


# -- the plan --------------------------------------------------------------------------------------


# Every script at tiny size on the CPU; `facts` and `build` come before.
REHEARSAL = {
    "step-resnet18": "bench_step.py --models small/resnet --image-size 32 --classes 10 -b 4 -M 2 "
    "--no-share-images --columns eager wfnet/eager/fused --repeats 1",
    "plan-resnet18": "bench_plan.py --model small/resnet --image-size 32 --classes 10 -b 4 -M 2 "
    "--providers eager --repeats 1",
    "whole-10": "whole_run.py --classes 10 --network small/resnet --image-size 32 --samples 600 "
    "-b 8 -M 2 --workers 1 --threads 1",
}


def python(*words: str) -> tuple[str, ...]:
    return sys.executable, *words


def script(name: str, line: str, limit: float, needs: tuple[str, ...] = ()) -> Stage:
    """A script of this folder that writes ``{results}/NAME.json``."""
    words = f"benchmarks/{line} --output {{results}}/{name}.json"
    return Stage(name, python(*words.split()), limit, needs)


def own(name: str, limit: float, device: str) -> Stage:
    words = f"benchmarks/device_run.py --inner {name} {device} {{results}}/{name}.json"
    return Stage(name, python(*words.split()), limit)


def rehearsal() -> list[Stage]:
    """Returns the stages of ``--rehearse``."""
    first = [own("facts", 90, "cpu"), own("build", 240, "cpu")]
    return first + [script(n, f"{line} --device cpu", 300) for n, line in REHEARSAL.items()]


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
    command = (program, "--tool", tool, "--error-exitcode", "9", *python())
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    words = ("-P", "-m", "pytest", "-m", "gpu", "tests/gpu/test_kernels_gpu.py", "-k", SMALL)
    return Stage(tool, (*command, *words), 240, environment=environment)


def plan(batch_size: int = 256) -> list[Stage]:
    """Returns all stages in the order of their value: first what the claim rests on.

    Args:
        batch_size: n of whole steps, of which 2 n expanded samples.
    """
    sizes = f"--image-size 224 --classes 1000 --dtype bfloat16 -b {batch_size} -M 3"

    def step(network: str, backend: str, *columns: str) -> Stage:
        """Whole steps; one process per backend: at real sizes a kernel may take down its own."""
        hows = ("fused", "compiled_captured") if backend == "eager" else ("captured",)
        columns = ("eager", *columns, *(f"wfnet/{backend}/{how}" for how in hows))
        line = f"bench_step.py --models {NETWORKS[network]} {sizes} --no-share-images"
        needs = (_LINEAR if network.startswith("vit") else _CONVOLVES).get(backend, ())
        line += f" --columns {' '.join(columns)}"
        return script(f"step-{network}-{backend}", line, 180, needs)

    def calls(network: str) -> Stage:
        return script(f"plan-{network}", f"bench_plan.py --model {NETWORKS[network]} {sizes}", 150)

    steps = "-P -m pytest tests/csrc/test_first_steps.py -v --tb=short -p no:cacheprovider"
    steps += " -o timeout=40 -o faulthandler_timeout=30"
    compiled = ("unmasked_compiled", "compile")
    whole = "whole_run.py --classes 1000 --network resnet50 --backend cuda"
    return [
        own("facts", 90, "cuda"),
        own("build", 240, "cuda"),
        Stage("first-steps", python(*steps.split()), 120),
        *tests(SMOKE, "smoke", 60),
        step("resnet18", "cuda", *compiled),
        step("resnet18", "triton", *compiled),
        calls("resnet50"),
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
        *map(calls, ("resnet18", "vgg16", "vit-small")),
        step("resnet50", "auto", "unmasked_compiled"),
        script(
            "step-resnet50-distil",
            f"bench_step.py --models resnet50 {sizes} --no-share-images --distil --columns eager "
            "compile unmasked_compiled wfnet/cuda/captured wfnet/triton/captured",
            240,
            (*_CONVOLVES["cuda"], *_CONVOLVES["triton"]),
        ),
        script("whole-1000-resnet50", whole, 400, _CONVOLVES["cuda"]),
        sanitizer("racecheck"),
    ]


# -- what the first two stages do ------------------------------------------------------------------


def facts(device: str, output: str) -> None:
    """Writes what belongs beside every result of this machine."""
    for command in (["nvidia-smi"], ["nvcc", "--version"], ["gcc", "--version"]):
        print(f"$ {' '.join(command)}", flush=True)
        if shutil.which(command[0]):
            subprocess.run(command, check=False, timeout=60)
    import torch

    from wfnet.benchmarking.provenance import provenance
    from wfnet.services.files import write_json

    found = provenance(device, sys.argv) | {"cpus": os.cpu_count()}
    if device == "cuda":
        found["properties"] = str(torch.cuda.get_device_properties(0))
        x = torch.randn(256, 256, device="cuda")
        assert (x @ x).isfinite().all().item()
    write_json(Path(output), found)
    print(json.dumps(found, indent=1))


def build(device: str, output: str) -> None:
    """Compiles the kernels for this device where they are missing; on the CPU, their emulation."""
    command = [sys.executable, str(ROOT / "csrc/build.py")]
    if device == "cpu":
        command.append("--emulated")
    else:
        from wfnet.backends import cuda_launch

        missing = cuda_launch.library().missing
        if missing is None:
            print("wfnet._C is usable as it is")
            return
        print(missing)
    sys.exit(subprocess.run(command, check=False).returncode)


# -- processes -------------------------------------------------------------------------------------


def execute(command: list[str], environment: dict[str, str], log: Path, limit: float) -> dict:
    """Runs a process in a group of its own, its output in a log.

    Returns:
        Its status ``passed``, ``failed`` or ``out of time``, its seconds and exit code.
    """
    start = time.monotonic()
    with open(log, "wb") as file:
        kept = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        try:
            child = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=_alone, **kept)
        except OSError as error:
            file.write(f"not started: {error}\n".encode())
            return {"status": "failed", "seconds": 0.0, "exit_code": None}
    try:
        status = "passed" if child.wait(max(limit, 0)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "out of time"
        _stop(child)
    except BaseException:
        _stop(child)
        raise
    finally:
        _kill_group(child)  # what is left of it
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": seconds, "exit_code": child.returncode}


def _alone() -> None:
    """In the child: a group of its own, no core file, and an end when the runner ends."""
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _stop(child: subprocess.Popen) -> None:
    """Asks for the stack of a hanging Python process, then ends it and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGABRT)  # PYTHONFAULTHANDLER prints the stack
    for _ in range(2):  # one that waits for its driver may stay; the run goes on
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
        _kill_group(child)


def _kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


# -- the run ---------------------------------------------------------------------------------------


class Runner:
    """Runs stages; keeps summary and archive up to date.

    Args:
        kept: records of an earlier run that are not repeated.
    """

    def __init__(self, options: argparse.Namespace, kept: list[dict]):
        self.output: Path = options.output
        self.end = time.monotonic() + options.budget
        self.records = kept
        self.summary = {
            "command": " ".join(["python", "benchmarks/device_run.py", *sys.argv[1:]]),
            "rehearsal": options.rehearse,
            "sources": sources_digest(),
            "stages": self.records,
        }
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self.environment["PYTHONPATH"] = str(self.output / "site")
        # What `auto` decides comes back with the results.
        self.environment["XDG_CACHE_HOME"] = str(self.output / "results" / "cache")
        if options.commit:
            self.environment["WFNET_COMMIT"] = options.commit

    def run(self, stages: list[Stage]) -> bool:
        """Returns whether every stage passed."""
        there = {record["name"] for record in self.records}
        for stage in stages:
            if stage.name in there:
                continue
            record = {"name": stage.name, "status": "running"}
            self.records.append(record)
            self.write()
            try:
                self.run_stage(stage, record)
            except BaseException:
                record["status"] = "interrupted"
                raise
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
        make_importable(self.output / "site")
        results, log = str(self.output / "results"), self.output / "logs" / f"{stage.name}.log"
        command = [word.replace("{results}", results) for word in stage.command]
        record["command"] = " ".join(command)
        environment = {**self.environment, **stage.environment}
        record |= execute(command, environment, log, min(stage.limit, left))
        if record["status"] != "passed":
            lines = log.read_bytes()[-20000:].decode(errors="replace").splitlines()
            record["tail"] = lines[-_TAIL:]
        if (record["exit_code"] or 0) < 0:
            record["note"] = signal.Signals(-record["exit_code"]).name

    def write(self) -> None:
        """Writes the summary, and the archive of all files."""
        path = self.output / "summary.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.summary, indent=1) + "\n")
        part.replace(path)
        part = self.output / "archive.part"
        with tarfile.open(part, "w:gz", compresslevel=3) as tar:
            folders = (self.output / "logs", self.output / "results")
            for file in [path, *(file for folder in folders for file in sorted(folder.rglob("*")))]:
                with contextlib.suppress(FileNotFoundError):  # a temporary file that is gone
                    if file.is_file() and file.stat().st_size <= _LARGEST_ARCHIVED:
                        tar.add(file, file.relative_to(self.output))
        part.replace(self.output / "device.tar.gz")


def make_importable(folder: Path) -> None:
    """Makes ``folder`` the package as it would be installed, of links into the checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "wfnet"
    package.mkdir(parents=True)
    for path in (ROOT / "wfnet").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")


def sources_digest() -> str:
    """Returns a hash of everything that a stage runs: whether an earlier result still counts."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SUFFIXES and "results" not in path.relative_to(ROOT).parts:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def kept_records(output: Path) -> list[dict]:
    """Returns records of stages that passed in an earlier run there, of the same sources.

    Raises:
        SystemExit: if it is of other sources.
    """
    path = output / "summary.json"
    if not path.exists():
        return []
    summary = json.loads(path.read_text())
    if summary["sources"] != sources_digest():
        raise SystemExit(f"{output} holds a run of other sources; choose another --output")
    return [one for one in summary["stages"] if one["status"] == "passed"]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/device"))
    add("--budget", type=float, default=540, metavar="SECONDS", help="of the run")
    add("--stages", nargs="+", metavar="STAGE", help="these alone, in this order")
    add("-b", "--batch-size", type=int, default=256, help="images n of a whole step")
    add("--commit", help="of this checkout, where its repository is not there")
    add("--rehearse", action="store_true", help="at tiny size on the CPU")
    add("--list", action="store_true", help="print the stages and end")
    add("--inner", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    names = [stage.name for stage in (rehearsal() if options.rehearse else plan())]
    unknown = [name for name in options.stages or () if name not in names]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; choose among {', '.join(names)}")
    if options.budget <= 0:
        parser.error(f"--budget must be positive, not {options.budget:g}")
    options.output = options.output.absolute()
    return options


def main(argv: list[str] | None = None, stages: list[Stage] | None = None) -> int:
    options = parse(argv)
    if options.inner:
        name, device, output = options.inner
        {"facts": facts, "build": build}[name](device, output)
        return 0
    stages = stages or (rehearsal() if options.rehearse else plan(options.batch_size))
    if options.stages:
        by_name = {stage.name: stage for stage in stages}
        wanted = dict.fromkeys([*FIRST, *options.stages])
        stages = [by_name[name] for name in wanted if name in by_name]
    if options.list:
        print("\n".join(f"{one.name:24}at most {one.limit:4.0f} s" for one in stages))
        return 0
    kept = kept_records(options.output)
    for folder in ("results", "logs"):
        (options.output / folder).mkdir(parents=True, exist_ok=True)

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return 0 if Runner(options, kept).run(stages) else 1
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())

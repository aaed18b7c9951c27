"""What a device machine is, and the compiled kernels on it.

    python benchmarks/device_setup.py facts --output runs/environment.json
    python benchmarks/device_setup.py build

`facts` makes this checkout importable where `import wfnet` finds none (by pip, offline, without
dependencies and without compiling; where pip cannot, by two files among the installed packages),
prints what the driver and the compilers say of themselves, and writes device, versions and commit.
`build` compiles wfnet._C for this device alone, unless there is a usable one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import site
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In a process of its own, elsewhere: this folder's files must not be what is found.
_PLACE = "import wfnet, wfnet.kernels; print(wfnet.__file__)"


def installed() -> bool:
    """Whether `import wfnet` finds this checkout."""
    found = subprocess.run(
        [sys.executable, "-c", _PLACE], cwd="/", capture_output=True, text=True, check=False
    )
    return found.returncode == 0 and Path(found.stdout.strip()).resolve().is_relative_to(ROOT)


# Where pip cannot install (setuptools before 77, say): what an editable installation comes to.
_FINDER = """import importlib.util
import sys

PLACES = {{"wfnet": {package!r}, "wfnet.kernels": {kernels!r}}}


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        place = PLACES.get(name)
        if place is None:
            return None
        return importlib.util.spec_from_file_location(
            name, place + "/__init__.py", submodule_search_locations=[place]
        )


sys.meta_path.insert(0, Finder)
"""


def place(folder: Path, root: Path = ROOT) -> None:
    """Writes to a folder of installed packages what makes the checkout at ``root`` importable."""
    text = _FINDER.format(package=str(root / "wfnet"), kernels=str(root / "kernels"))
    (folder / "_wfnet_checkout.py").write_text(text)
    (folder / "_wfnet_checkout.pth").write_text("import _wfnet_checkout\n")


def install() -> None:
    """Makes this checkout importable.

    Raises:
        SystemExit: with what pip said if nothing helped.
    """
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps",
               "--no-index", "-e", str(ROOT)]  # fmt: skip
    environment = {**os.environ, "WFNET_BUILD_CUDA": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0 and installed():
        return
    said = f"{done.stdout}{done.stderr}"
    print(f"pip could not install this checkout:\n{said}", flush=True)
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            place(Path(folder))
        except OSError as error:
            print(f"{folder}: {error}", flush=True)
            continue
        if installed():
            print(f"it is importable by {folder}/_wfnet_checkout.py", flush=True)
            return
    sys.exit(f"wfnet could not be installed:\n{said}")


def tell(*command: str) -> None:
    """Prints what a tool says of itself, or that it is not there."""
    print(f"$ {' '.join(command)}", flush=True)
    if shutil.which(command[0]) is None:
        print("not there")
        return
    subprocess.run(command, check=False, timeout=60)


def facts(output: Path, device: str) -> int:
    """Writes what belongs beside every result of this machine."""
    tell("nvidia-smi")
    tell("nvcc", "--version")
    tell("compute-sanitizer", "--version")
    tell("gcc", "--version")  # Triton compiles its launchers with it
    import torch

    from wfnet.backends import cuda_launch
    from wfnet.benchmarking.timing import about
    from wfnet.services.files import write_json

    found = about(device, sys.argv)
    found |= {"cpus": os.cpu_count(), "compiled_kernels": cuda_launch.library().missing or "usable"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }
        x = torch.randn(256, 256, device="cuda")
        torch.cuda.synchronize()
        found["first_product_is_finite"] = bool((x @ x).isfinite().all())
    write_json(output, found)
    print(json.dumps(found, indent=1))
    return 0


def build(device: str) -> int:
    """Compiles the kernels where they are missing; on the CPU, their emulation."""
    start = time.perf_counter()
    command, environment = [sys.executable, str(ROOT / "csrc/build.py")], dict(os.environ)
    if device == "cpu":
        command.append("--emulated")
    else:
        import torch

        from wfnet import backends

        x = torch.zeros(1, 64, 4, 4, device=device, dtype=torch.bfloat16)
        weight = torch.zeros(64, 64, 1, 1, device=device, dtype=torch.bfloat16)
        refusal = backends.get("cuda").refuse_conv2d(x, weight, backends.ConvGeometry())
        if refusal is None:
            print("wfnet._C is usable as it is")
            return 0
        print(refusal)
        major, minor = torch.cuda.get_device_capability()
        hopper = "a" if (major, minor) == (9, 0) else ""
        environment.setdefault("WFNET_CUDA_ARCHS", f"{major}.{minor}{hopper}")
        print(f"building for {environment['WFNET_CUDA_ARCHS']}", flush=True)
    done = subprocess.run(command, env=environment, check=False)
    print(f"built in {time.perf_counter() - start:.0f} s, status {done.returncode}")
    return done.returncode


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("facts", "build"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, help="JSON file of the facts")
    arguments = parser.parse_args(argv)
    if arguments.what == "facts" and arguments.output is None:
        parser.error("facts are written to --output FILE")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if not installed():
        install()
        # The installation is seen by processes that start after it.
        os.execv(sys.executable, [sys.executable, *sys.argv])
    if arguments.what == "facts":
        return facts(arguments.output, arguments.device)
    return build(arguments.device)


if __name__ == "__main__":
    sys.exit(main())

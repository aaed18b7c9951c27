"""Maps the top-level kernels/ to wfnet.kernels and builds wfnet._C; the rest is in pyproject.toml.

WFNET_BUILD_CUDA=0 leaves the extension out, 1 makes it an error if it cannot be built; by default
it is built where nvcc is, and left out in one line where it is not. No GPU is needed to build or to
import it.
"""

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "wfnet/version.py").read_text()).group(1)

spec = importlib.util.spec_from_file_location("wfnet_csrc_build", here / "csrc/build.py")
csrc = importlib.util.module_from_spec(spec)
spec.loader.exec_module(csrc)

wish = os.environ.get("WFNET_BUILD_CUDA", "auto")
if wish not in ("0", "1", "auto"):
    sys.exit(f"WFNET_BUILD_CUDA={wish!r} must be 0 (leave out), 1 (require) or auto")


class BuildKernels(build_ext):
    """Compiles csrc/ with nvcc; setuptools only copies the result."""

    def build_extension(self, ext: Extension) -> None:
        try:
            library = csrc.build_extension(Path(self.build_temp).resolve())
        except csrc.BuildError as error:
            if wish == "1":
                raise CompileError(str(error)) from None
            print(f"wfnet: without the CUDA extension: {error}", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


def extensions() -> list[Extension]:
    """``wfnet._C``; nothing where it is not wanted or there is no nvcc."""
    if wish == "0":
        return []
    try:
        csrc.nvcc()
    except csrc.BuildError as error:
        if wish == "1":
            sys.exit(f"WFNET_BUILD_CUDA=1, but {error}")
        print(f"wfnet: without the CUDA extension: {error}", file=sys.stderr)
        return []
    sources = [str(path.relative_to(csrc.HERE.parent)) for path in csrc.kernel_sources()]
    return [Extension("wfnet._C", sources, optional=wish == "auto")]


setup(
    version=version,
    packages=find_packages(include=["wfnet*"])
    + ["wfnet." + name for name in find_packages(include=["kernels*"])],
    package_dir={"wfnet.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
)

"""Maps the top-level kernels/ to wfnet.kernels; everything static is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (here / "wfnet/version.py").read_text()).group(1)

setup(
    version=version,
    packages=find_packages(include=["wfnet*"])
    + ["wfnet." + name for name in find_packages(include=["kernels*"])],
    package_dir={"wfnet.kernels": "kernels"},
)

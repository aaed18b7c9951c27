"""Backends: who computes a masked convolution or linear map.

Every backend implements :class:`wfnet.backends.contract.Backend` in one file and stands in the
table below by its name. A backend that is asked for by name runs or raises.
"""

import importlib
import os

from wfnet.backends.contract import Backend

# Name -> module that defines `backend`, loaded on first use. `reference` has no Backend object: it
# is plain PyTorch in wfnet/reference.py and shares no code with what it is the truth for.
_MODULES = {
    "eager": "wfnet.backends.eager",
    "triton": "wfnet.backends.triton",
    "cuda": "wfnet.backends.cuda",
}
_loaded: dict[str, Backend] = {}

KERNELS = tuple(_MODULES)
NAMES = ("auto", "reference", *KERNELS)


def get(name: str) -> Backend:
    """Returns the backend called ``name``.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in _loaded:
        if name not in _MODULES:
            raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(NAMES)}")
        _loaded[name] = importlib.import_module(_MODULES[name]).backend
    return _loaded[name]


def requested(name: str) -> str:
    """Returns ``name``, or what WFNET_BACKEND says where ``name`` is ``auto``.

    Raises:
        ValueError: if there is no backend of that name.
    """
    if name == "auto":
        name = os.environ.get("WFNET_BACKEND") or "auto"
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(NAMES)}")
    return name


def resolve(name: str) -> str:
    """Returns the name of who runs a call for which ``name`` was asked: ``auto`` is ``eager``.

    Raises:
        ValueError: if there is no backend of that name.
    """
    name = requested(name)
    return "eager" if name == "auto" else name

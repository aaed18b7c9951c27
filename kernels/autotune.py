"""Searched configs: measured on a device only when asked for, stored for that device and versions.

``WFNET_AUTOTUNE=1`` searches shapes that have no stored result, ``quick`` among the nearest few
configs (about five compilations a kernel instead of sixty); unset, stored results are used and
nothing is searched; ``0`` ignores the store, so that the defaults of ``config.py`` run. Results lie
in ``$XDG_CACHE_HOME/wfnet/autotune/`` (default ``~/.cache``), one JSON file per device, compute
capability and versions of torch and triton. This is the one place that reads these variables.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import triton
from wfnet.kernels.config import Choice, Device, GemmConfig
from wfnet.kernels.launch import Launch

_log = logging.getLogger(__name__)
_decided: dict[tuple, Choice] = {}


def mode() -> str:
    """``search``, ``quick``, ``stored`` or ``defaults``, from WFNET_AUTOTUNE.

    Raises:
        ValueError: if the variable is neither unset, ``0``, ``1`` nor ``quick``.
    """
    value = os.environ.get("WFNET_AUTOTUNE", "")
    try:
        return {"": "stored", "0": "defaults", "1": "search", "quick": "quick"}[value]
    except KeyError:
        raise ValueError(
            f"WFNET_AUTOTUNE is {value!r}; set it to 1 (search), quick (search the nearest few), "
            "0 (defaults) or leave it unset"
        ) from None


def store_path(device: Device) -> Path:
    """The file that holds the results of ``device`` under the installed versions."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{device.name}-sm{device.arch}-torch{torch.__version__}-triton{triton.__version__}"
    return cache / "wfnet" / "autotune" / (re.sub(r"[^A-Za-z0-9.+-]+", "_", name) + ".json")


@functools.cache
def _load(path: Path) -> dict[str, dict]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("ignoring unreadable search results in %s: %s", path, error)
        return {}


def _save(path: Path, key: str, entry: dict) -> None:
    _load.cache_clear()  # another process may have stored results since
    stored = {**_load(path), key: entry}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(stored, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
        _load.cache_clear()
    except OSError as error:
        _log.warning("cannot store search results in %s: %s", path, error)


def _parse(entry: dict) -> GemmConfig:
    fields = dict(entry["config"])
    fields["box"] = tuple(fields["box"]) if fields["box"] else None
    return GemmConfig(**fields)


def choose(
    op: str,
    key: str,
    dtype: torch.dtype,
    device: Device,
    default: Choice,
    plan: Callable[[GemmConfig], Launch] | None,
) -> Choice:
    """The config to run: a stored result, a search if one is asked for, or ``default``.

    Args:
        plan: builds the launch of a config; None where nothing may be launched.
    """
    identity = (op, key, dtype, device, default.config, mode(), plan is None)
    if identity not in _decided:
        _decided[identity] = _choose(op, key, dtype, device, default, plan)
    return _decided[identity]


def _choose(op, key, dtype, device, default, plan) -> Choice:
    wanted = mode()
    if wanted == "defaults":
        return default
    path = store_path(device)
    name = f"{op} {key} {str(dtype).removeprefix('torch.')} default {default.config}"
    entry = _load(path).get(name)
    if entry is not None:
        return Choice(_parse(entry), f"searched on {device.name}: {entry['ms']:.4f} ms")
    if wanted in ("search", "quick") and plan is not None and _can_measure():
        configs = (candidates if wanted == "search" else neighbours)(default.config)
        config, ms = search(plan, configs, device, dtype.itemsize)
        if config is not None:
            _save(path, name, {"config": asdict(config), "ms": ms})
            return Choice(config, f"searched on {device.name}: {ms:.4f} ms")
    return default


def _can_measure() -> bool:
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def candidates(default: GemmConfig) -> list[GemmConfig]:
    """The default and its neighbours: tile sizes, warps, stages; boxes keep the default's shape."""
    found = {default: None}
    for block_m in (64, 128, 256):
        for block_n in (64, 128, 256):
            if block_m * block_n > 128 * 256 or block_n > default.block_n * 2:
                continue
            for block_k in {default.block_k, max(16, default.block_k // 2)}:
                for warps in (4, 8):
                    if block_m * block_n > 64 * 128 * warps // 2:
                        continue
                    for stages in (2, 3, 4, 5):
                        box = _resize(default.box, block_m) if default.box else None
                        if default.box and box is None:
                            continue
                        found[
                            replace(
                                default,
                                block_m=block_m,
                                block_n=block_n,
                                block_k=block_k,
                                warps=warps,
                                stages=stages,
                                box=box,
                            )
                        ] = None
    return list(found)


def neighbours(default: GemmConfig) -> list[GemmConfig]:
    """The default; half and twice its columns; one stage less and one more.

    Columns decide how many tiles a multiprocessor holds, and how often an operand is read.
    """
    found = [default]
    for block_n in (default.block_n // 2, default.block_n * 2):
        if 32 <= block_n <= 256 and default.block_m * block_n <= 128 * 256:
            warps = 4 if default.block_m * block_n <= 64 * 128 else 8
            found.append(replace(default, block_n=block_n, warps=warps))
    found += [
        replace(default, stages=stages)
        for stages in (default.stages - 1, default.stages + 1)
        if stages > 1
    ]
    return found


def _resize(box: tuple[int, int, int], pixels: int) -> tuple[int, int, int] | None:
    samples, rows, cols = box
    while samples * rows * cols < pixels:
        rows, cols = (rows * 2, cols) if rows <= cols else (rows, cols * 2)
    while samples * rows * cols > pixels:
        if rows == cols == 1:
            return None
        rows, cols = (rows // 2, cols) if rows >= cols else (rows, cols // 2)
    return samples, rows, cols


def search(
    plan: Callable[[GemmConfig], Launch],
    configs: list[GemmConfig],
    device: Device,
    itemsize: int,
) -> tuple[GemmConfig | None, float]:
    """Times every config that fits on the current CUDA device; the fastest and its milliseconds."""
    best, best_ms = None, float("inf")
    for config in configs:
        if config.operand_memory(itemsize) > device.shared_memory:
            continue
        try:
            launch = plan(config)
            ms = triton.testing.do_bench(launch.run, warmup=5, rep=20, return_mode="median")
        except (triton.CompilationError, triton.OutOfResources, ValueError) as error:
            _log.info("config %s does not run: %s", config, error)
            continue
        if ms < best_ms:
            best, best_ms = config, ms
    return best, best_ms

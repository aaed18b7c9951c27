"""Files written whole or not at all: JSON and safetensors, atomically; fingerprints of weights."""

import ast
import contextlib
import hashlib
import inspect
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

FilePath = str | os.PathLike  # of a file or folder
_TEMPORARY = ".wfnet-tmp"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def write_atomically(path: FilePath, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary path beside ``path`` and moves the result into place.

    An interruption or a full disk at any moment leaves the old file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_TEMPORARY}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def clear_temporary_files(folder: FilePath) -> None:
    """Removes what :func:`write_atomically` has left in a folder where its process was killed.

    For who holds the folder (:func:`wfnet.services.locks.folder_lock`): files that another process
    is writing look the same.
    """
    for path in Path(folder).glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            path.unlink()


def write_text(path: FilePath, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically; what UTF-8 cannot hold is written as ``\\udce9``."""
    data = text.encode(errors="backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def readable(name: str) -> str:
    """Returns a name of the file system as text: bytes that are not UTF-8 become ``\\xe9``."""
    return os.fsencode(name).decode(errors="backslashreplace")


def cache_folder() -> Path:
    """Returns `$XDG_CACHE_HOME/wfnet`, or `~/.cache/wfnet`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "wfnet")


def write_json(path: FilePath, content: object) -> None:
    """Writes ``content`` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(
    path: FilePath, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes ``tensors`` as safetensors, atomically; equal contents give equal bytes.

    Tensors that share memory, as those of modules used twice, are written once for each name.
    """
    found, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    data = _with_sorted_header(save(found, metadata))
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _with_sorted_header(data: bytes) -> bytes:
    """Returns a safetensors file with the metadata in the order of names.

    The library writes them in the order of a hash table, which is another one in every process.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def read_tensors(path: FilePath) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        FileNotFoundError, ValueError: if it is missing, truncated or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); restore it from a copy or "
            "write it again"
        ) from error


def read_metadata(path: FilePath) -> dict[str, str]:
    """Reads the metadata of a safetensors file; SafetensorError if it is damaged."""
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def sha256(*parts: bytes | str) -> str:
    """SHA-256 over bytes and texts, one after the other."""
    joined = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(joined).hexdigest()


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over ``text`` and names, dtypes, shapes, bytes of ``tensors``, in order of names."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the base weights and floating buffers of ``model``.

    Filters and their statistics (``alpha_*``, ``row_*``) are left out. The names are those of the
    network itself: ``torch.compile`` and ``DataParallel`` put ``_orig_mod`` and ``module`` before
    them.
    """
    state = {name.replace("_orig_mod.", ""): t for name, t in model.state_dict().items()}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return digest(
        {
            name: tensor
            for name, tensor in state.items()
            if isinstance(tensor, Tensor)
            and tensor.is_floating_point()
            and not name.rpartition(".")[2].startswith(("alpha_", "row_"))
        }
    )


def code_digest(modules: Iterable[str]) -> str:
    """SHA-256 over the code of imported modules, by name: without comments and docstrings.

    What is kept in files is bound to it, so that values of an older formula are not reused.
    """
    texts = []
    for name in sorted(set(modules)):
        tree = ast.parse(inspect.getsource(sys.modules[name]))
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        texts.append(ast.unparse(tree))
    return sha256("\n".join(texts))

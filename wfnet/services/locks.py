"""One writer at a time: a lock on a folder that says who holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without POSIX locks: writers are not kept apart there
    fcntl = None

LOCK_NAME = ".wfnet.lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
# Folders that this process holds, with the thread that holds them.
_held: dict[tuple[int, Path], int] = {}


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps everybody else from writing into a folder until the block ends, or the process does.

    The thread that holds a folder may enter again. Where the file system has no locks, nobody is
    kept out.

    Raises:
        FileExistsError: if somebody else holds the folder; says who.
    """
    folder = Path(folder).resolve()
    key, thread = (os.getpid(), folder), threading.get_ident()
    if _held.get(key) == thread:
        yield
        return
    if key in _held:
        raise FileExistsError(_sentence(folder, "another thread of this process"))
    folder.mkdir(parents=True, exist_ok=True)
    handle = _acquire(folder)
    _held[key] = thread
    try:
        yield
    finally:
        del _held[key]
        if handle is not None:
            with contextlib.suppress(FileNotFoundError):
                (folder / LOCK_NAME).unlink()
            os.close(handle)


def _acquire(folder: Path) -> int | None:
    """Returns the handle of the locked file; None where there are no locks."""
    path = folder / LOCK_NAME
    while fcntl is not None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 1000).decode(errors="replace").strip()
            os.close(handle)
            if error.errno in _HELD_BY_ANOTHER:
                message = _sentence(folder, holder or "another process")
                raise FileExistsError(message) from error
            return None
        # The one before may have removed the file between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                who = f"process {os.getpid()} on {socket.gethostname()}, since {since}"
                os.ftruncate(handle, 0)
                os.write(handle, who.encode())
                return handle
        os.close(handle)
    return None


def _sentence(folder: Path, holder: str) -> str:
    return (
        f"{folder} is being written by {holder}; wait until it has ended, or choose another folder"
    )

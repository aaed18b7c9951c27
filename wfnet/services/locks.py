"""One writer at a time: a lock on a folder that says who holds it."""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from wfnet.services.files import FilePath

try:
    import fcntl
except ImportError:  # a system without POSIX locks: writers are not kept apart there
    fcntl = None

LOCK_NAME = ".wfnet.lock"
_held: set[tuple[int, Path]] = set()  # by this process


@contextlib.contextmanager
def folder_lock(folder: FilePath) -> Iterator[None]:
    """Keeps other processes from writing into a folder until the block ends, or this process does.

    The process that holds a folder may enter again. Where the file system has no locks, nobody is
    kept out.

    Raises:
        FileExistsError: if another process holds the folder; says which.
    """
    folder = Path(folder).resolve()
    key = os.getpid(), folder
    if key in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / LOCK_NAME) if fcntl else contextlib.nullcontext():
        _held.add(key)
        try:
            yield
        finally:
            _held.remove(key)
            (folder / LOCK_NAME).unlink(missing_ok=True)


def _locked(path: Path) -> IO[str]:
    """Returns the open file, locked where the file system can."""
    file = open(path, "a+")  # noqa: SIM115, the caller closes it
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file
        with file:
            file.seek(0)
            holder = file.read(1000) or "another process"
        raise FileExistsError(
            f"{path.parent} is being written by {holder}; wait until it has ended, or choose "
            "another folder"
        ) from error
    # The one before may have removed the file between the two calls.
    if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
        file.close()
        return _locked(path)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {since}")
    file.flush()
    return file

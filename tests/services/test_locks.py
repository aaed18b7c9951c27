"""A folder has one writer at a time; what killed writers left behind is cleared."""

import os
import socket

from wfnet.services.files import clear_temporary_files, write_atomically
from wfnet.services.locks import LOCK_NAME, folder_lock


def in_a_child(work) -> int:
    """Exit status of a process that does ``work``; 3 for a FileExistsError with the right text."""
    child = os.fork()
    if child:
        return os.WEXITSTATUS(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except FileExistsError as error:
        holder = f"process {os.getppid()} on {socket.gethostname()}, since "
        os._exit(3 if holder in str(error) else 4)
    finally:
        os._exit(5)


def enter(folder):
    with folder_lock(folder):
        pass


def test_another_process_is_kept_out_and_told_who_holds_the_folder(tmp_path):
    with folder_lock(tmp_path / "run"):
        assert in_a_child(lambda: enter(tmp_path / "run")) == 3
        assert in_a_child(lambda: enter(tmp_path / "other")) == 0
        enter(tmp_path / "run")  # the process that holds it
        assert in_a_child(lambda: enter(tmp_path / "run")) == 3
    assert in_a_child(lambda: enter(tmp_path / "run")) == 0
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_ends_with_its_process_and_half_written_files_are_cleared(tmp_path):
    def killed(path):
        path.write_text("half")
        os.kill(os.getpid(), 9)

    def writes():
        with folder_lock(tmp_path):
            write_atomically(tmp_path / "filters", killed)

    in_a_child(writes)
    assert (tmp_path / LOCK_NAME).exists()
    (tmp_path / ".other.abc").write_text("of somebody else")
    assert in_a_child(lambda: enter(tmp_path)) == 0
    clear_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".other.abc"]

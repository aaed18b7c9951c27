"""The command line: `wfnet COMMAND`, one file per command.

A command is a module with ``add_parser(commands)`` and ``run(options)``. Heavy packages (timm,
torchvision, matplotlib) are imported by ``run`` alone.
"""

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from wfnet.cli import (
    bake,
    baseline,
    bench,
    demo,
    evaluate,
    explore,
    report,
    shadows,
    table,
    train,
    trust,
    untrain,
)
from wfnet.cli.inputs import choose_device
from wfnet.cli.option_files import fill_from_files
from wfnet.cli.options import Parser, make_parser
from wfnet.services.log import logger
from wfnet.services.ranks import launched, launched_rank
from wfnet.services.threads import choose_threads

COMMANDS = (
    demo,
    train,
    untrain,
    evaluate,
    baseline,
    trust,
    shadows,
    table,
    bake,
    report,
    explore,
    bench,
)
_PACKAGE = Path(__file__).resolve().parent.parent


def build_parser() -> Parser:
    """The parser of all commands."""
    return make_parser(COMMANDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    0: done; 2: something the user can mend, in one sentence on stderr; 128 + signal: stopped by
    SIGINT (130) or SIGTERM (143); 1: an error in the program itself, with its traceback.
    """
    options, threads = argparse.Namespace(command=None, debug=False), torch.get_num_threads()
    with contextlib.suppress(AttributeError):  # names of files may hold what stdout cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        options = fill_from_files(build_parser(), given)
        on_cpu = getattr(options, "device", None) in ("auto", "cpu")
        if options.threads or (on_cpu and choose_device(options.device).type == "cpu"):
            choose_threads(options.threads)
        _log_to_stderr(options.debug, options.quiet)
        options.run(options)
        return 0
    except KeyboardInterrupt as stop:
        saved = getattr(options, "saved", "nothing was saved")
        if launched_rank() == 0:
            text = saved if isinstance(saved, str) else saved(options)
            print(f"\ninterrupted; {text}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except BrokenPipeError:  # the reader of our output (a pager, head) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None or options.debug:
            traceback.print_exc()
            return 1 if sentence is None else 2
        rank = f"rank {launched_rank()}:" if launched() else None
        name = " ".join(filter(None, (rank, "wfnet", options.command)))
        print(f"{name}: error: {sentence}", file=sys.stderr)
        return 2
    finally:  # `main` may be called in a process that goes on
        torch.set_num_threads(threads)
        for handler in [h for h in logger.handlers if isinstance(h, _AboveBars)]:
            logger.removeHandler(handler)


def _sentence(error: Exception) -> str | None:
    """What to tell the user of an error; None for one that nobody foresaw."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the device has too little memory: lower -b/--batch-size or -M/--label-expansion, or "
            "use --amp"
        )
    text = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error}): free some space; no file was left half written"
    if isinstance(error, OSError):
        return text
    expected = ValueError, TypeError, RuntimeError, ImportError, IndexError, ArithmeticError
    return text if isinstance(error, expected) and _raised_here(error) else None


def _raised_here(error: Exception) -> bool:
    """Whether this package raised the error: its messages are written for users."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _PACKAGE in Path(frames[-1].filename).resolve().parents


class _AboveBars(logging.StreamHandler):
    """Writes lines above a tqdm bar, not into it, with their level only where that is news."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        known = record.levelno == logging.INFO
        return text if known else f"{record.levelname.lower()}: {text}"

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream.isatty():
            tqdm.write(self.format(record), file=self.stream)
        else:
            super().emit(record)


def _log_to_stderr(debug: bool, quiet: bool) -> None:
    handler = _AboveBars(sys.stderr)
    rank = launched_rank()
    handler.setFormatter(logging.Formatter(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    logger.addHandler(handler)
    quiet = quiet or rank > 0
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)

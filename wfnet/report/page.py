"""One self-contained page about a run: tables, figures, definitions, trust, configuration.

:func:`write_report` reads the folder of a run, decides what is shown (:mod:`wfnet.report.view`) and
fills the template ``page.html.jinja`` beside this file. A section whose files are missing says
which command makes them. The page loads nothing and escapes every name that comes from data.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from wfnet.report.contents import Contents, read_contents
from wfnet.report.verdicts import MARGIN, MARGIN_TAUGHT
from wfnet.report.view import make_view
from wfnet.services.files import write_text

logger = logging.getLogger("wfnet")

REPORT = "report.html"


def write_report(folder: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Writes ``report.html`` of a run, atomically.

    Args:
        folder: of the run.
        path: file to write; ``report.html`` in the folder by default.

    Returns:
        The path that was written.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in it that a report could show.
        ValueError: for a damaged file.
    """
    contents = read_contents(folder)
    for remark in contents.remarks:
        logger.warning("%s", remark)
    text = render(contents)
    path = Path(folder) / REPORT if path is None else Path(path)
    write_text(path, text)
    return path


def render(contents: Contents) -> str:
    """Returns the page as a string."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["marked"] = _marked
    template = templates.get_template("page.html.jinja")
    text = template.render(view=make_view(contents), margin=MARGIN, margin_taught=MARGIN_TAUGHT)
    return text.lstrip()


def _marked(text: str) -> Markup:
    """Returns plain text as HTML in which what stands in backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))

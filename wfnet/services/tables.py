"""Tables as text: aligned for a terminal, Markdown, LaTeX."""

from collections.abc import Sequence


def aligned(parts: Sequence[list[str] | str]) -> str:
    """Lists of cells as columns; a text stands in a line of its own, "-" is a rule."""
    rows = [part for part in parts if isinstance(part, list)]
    widths = _widths(rows)
    lines = []
    for part in parts:
        if part == "-":
            part = "-" * (sum(widths) + 2 * (len(widths) - 1))
        elif isinstance(part, list):
            part = "  ".join(_padded(part, widths)).rstrip()
        lines.append(part)
    return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table as Markdown."""
    return _lines([head, ["---"] * len(head), *rows])


def wide_markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As :func:`markdown_table`, with columns of equal width and numbers to the right."""
    widths = _widths([head, *rows])
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    first, *others = (_padded(cells, widths) for cells in (head, *rows))
    return _lines([first, rule, *others])


def latex_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as LaTeX, for the package booktabs."""
    first, *others = (" & ".join(map(_escaped, row)) + r" \\" for row in (head, *rows))
    begin = rf"\begin{{table}}\caption{{{_escaped(title)}}}"
    columns = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    body = [r"\toprule", first, r"\midrule", *others, r"\bottomrule"]
    return "\n".join([begin, columns, *body, r"\end{tabular}\end{table}", ""])


def _lines(rows: Sequence[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in rows)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _padded(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """The first cell to the left, others to the right."""
    first, *others = zip(cells, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]


def _escaped(text: str) -> str:
    for sign in "_%&#":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("±", r"$\pm$")

"""The page around a report: style, script and escaping. One HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { --ink: #1d2430; --soft: #5b6675; --line: #d8dde4; --ground: #f6f7f9; --blue: #0072b2;
  --orange: #b64f00; --green: #007a58; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 0 1.25rem 4rem; }
header { background: var(--ground); border-bottom: 1px solid var(--line); }
header div { max-width: 1320px; margin: 0 auto; padding: 1.6rem 1.25rem 1.1rem; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .6rem; font-size: 1.3rem; border-bottom: 1px solid var(--line);
  padding-bottom: .3rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1.05rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
nav { margin-top: .8rem; }
nav a { margin-right: 1.1rem; color: var(--blue); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.3rem 0; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .7rem .95rem; min-width: 11rem;
  flex: 1; }
.card b { display: block; white-space: nowrap; font-size: 1.25rem; line-height: 1.25; }
.card span { color: var(--soft); font-size: .86rem; }
.scroll { overflow: auto; max-height: 36rem; border: 1px solid var(--line); border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
.scroll table { width: 100%; }
caption { text-align: left; color: var(--soft); padding: .3rem 0; }
th, td { padding: .28rem .5rem; text-align: right; border-bottom: 1px solid #eceff2;
  vertical-align: top; }
th { background: var(--ground); font-weight: 600; }
td.text, th.text { text-align: left; overflow-wrap: break-word; min-width: 9rem;
  max-width: 28rem; }
tbody th { background: none; font-weight: 400; text-align: left; }
.scroll thead th { position: sticky; top: 0; z-index: 1; box-shadow: inset 0 -1px var(--line); }
th button { all: unset; cursor: pointer; white-space: nowrap; }
th button:focus-visible, input:focus-visible { outline: 2px solid var(--blue);
  outline-offset: 2px; }
th button::after { content: " \\2195"; color: #a5aeb9; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--blue); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--blue); }
.search { display: flex; gap: .8rem; align-items: center; margin: .6rem 0; flex-wrap: wrap; }
input { font: inherit; padding: .3rem .6rem; border: 1px solid #aeb7c2; border-radius: 5px;
  width: 18rem; max-width: 100%; }
figure { margin: 1.4rem 0; }
figure img { max-width: 100%; height: auto; display: block; border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .35rem; max-width: 52rem; }
.verdict { border-left: 4px solid var(--orange); background: #fdf6f0; padding: .5rem 1rem;
  margin: .9rem 0; }
.verdict.good { border-color: var(--green); background: #f0f8f5; }
.verdict h3 { margin: .2rem 0; }
.verdict ul { margin: .3rem 0; padding-left: 1.2rem; }
.verdict li { max-width: 58rem; margin: .3rem 0; }
code, pre { font-family: ui-monospace, monospace; font-size: .85em; }
pre { background: var(--ground); padding: .7rem .9rem; overflow: auto; max-height: 26rem;
  border-radius: 6px; }
@media print { .scroll { max-height: none; } .search, nav { display: none; } }
"""

SCRIPT = """
'use strict';
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector('button');
    if (!button) return;
    button.addEventListener('click', () => {
      const text = head.classList.contains('text');
      const before = head.getAttribute('aria-sort');
      const up = before ? before === 'descending' : text || head.dataset.first === 'up';
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = row => row.cells[column].dataset.value ?? '';
      const order = [...body.rows].map((row, i) => [key(row), i, row]);
      order.sort(([a, i], [b, j]) => {
        if ((a === '') !== (b === '')) return a === '' ? 1 : -1;
        const by = text ? a.localeCompare(b, undefined, {numeric: true}) : a - b;
        return (up ? by : -by) || i - j;
      });
      body.append(...order.map(entry => entry[2]));
    });
  });
  const input = document.querySelector(`input[data-table="${table.id}"]`);
  const count = document.querySelector(`[data-count="${table.id}"]`);
  if (!input) continue;
  const search = () => {
    const wanted = input.value.trim().toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = wanted !== '' && !row.dataset.search.includes(wanted);
      shown += !row.hidden;
    }
    count.textContent = `${shown.toLocaleString('en')} of ${body.rows.length.toLocaleString('en')}`;
  };
  input.addEventListener('input', search);
  search();
}
"""

# The page may not load or send anything, whatever a class is called.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "form-action 'none'; base-uri 'none'"
)


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """One HTML document.

    Args:
        title, subtitle: plain text.
        sections: (id, heading as plain text, content as HTML) each.
    """
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections)
    parts = "".join(
        f'<section id="{name}"><h2>{escape(heading)}</h2>\n{content}\n</section>\n'
        for name, heading, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><div><h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n'
        f"<nav>{links}</nav></div></header>\n<main>\n{parts}</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def cell(value: object, shown: str | None = None, text: bool = False) -> str:
    """A table cell; ``data-value`` holds the exact value for sorting. None is an empty cell."""
    if value is None:
        return "<td></td>"
    kind = ' class="text"' if text else ""
    exact = escape(str(value), quote=True)
    return f'<td{kind} data-value="{exact}">{escape(str(value) if shown is None else shown)}</td>'


def percent(value: float | None) -> str:
    """A cell with a fraction in %."""
    return cell(value, None if value is None else f"{100 * value:.2f}")


def number(value: float | None, digits: int = 3) -> str:
    """A cell with a number."""
    return cell(value, None if value is None else f"{value:.{digits}f}")


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    text_columns: Sequence[int] = (0,),
    caption: str = "",
) -> str:
    """A plain table of cells made by :func:`cell`; ``header`` is plain text."""
    heads = "".join(
        f'<th scope="col"{" class=text" if i in text_columns else ""}>{escape(h)}</th>'
        for i, h in enumerate(header)
    )
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide"><table>{title}<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def sortable_table(
    name: str,
    header: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, str, Sequence[str]]],
    label: str,
    text_columns: Sequence[int] = (1,),
) -> str:
    """A table that sorts by a click on a column's head and is searched by class name.

    Args:
        name: id of the table.
        header: (heading, what it means) of each column, plain text.
        rows: (id of the row, text that the search looks in, cells) each.
        label: of the search field, plain text.
        text_columns: columns that sort as text.
    """
    heads = "".join(
        f'<th scope="col" title="{escape(meaning, quote=True)}"'
        f"{' class=text' if i in text_columns else ''}{' data-first=up' if i == 0 else ''}>"
        f'<button type="button">{escape(text)}</button></th>'
        for i, (text, meaning) in enumerate(header)
    )
    body = "".join(
        f'<tr id="{row}" data-search="{escape(found.lower(), quote=True)}">{"".join(cells)}</tr>\n'
        for row, found, cells in rows
    )
    return (
        f'<div class="search"><label for="{name}-search">{escape(label)}</label>'
        f'<input id="{name}-search" type="search" data-table="{name}" autocomplete="off">'
        f'<span class="soft" data-count="{name}"></span></div>\n'
        f'<div class="scroll" tabindex="0"><table id="{name}" class="sortable"><thead><tr>{heads}'
        f"</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )

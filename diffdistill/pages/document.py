"""The parts of a page: the document with its style, tables, pictures, and what is folded away."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: shown.
        note: small, below the text.
        best: whether it is set in bold.
        value: the number behind the text at full precision, for whoever reads the page by program; empty for none.
    """

    text: str
    note: str = ""
    best: bool = False
    value: str = ""


def document(title: str, body: Sequence[str]) -> str:
    """A whole page, in light and in dark as the reader's system asks, that loads nothing.

    Args:
        title: plain text.
        body: HTML, from the parts below.
    """
    style = files("diffdistill.pages").joinpath("style.css").read_text()
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>"
    )
    content = "\n".join(body)
    shell = '<!doctype html>\n<html lang="en">\n<head>\n{}\n</head>\n<body>\n<main>\n{}\n</main>\n</body>\n</html>\n'
    return shell.format(head, content)


def heading(text: str, level: int) -> str:
    """A heading of plain text."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; kind: a class of the style, such as lead or note."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def section(title: str, body: Sequence[str]) -> str:
    """Parts under a heading of the second level."""
    return "\n".join(["<section>", heading(title, 2), *body, "</section>"])


def table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell], str]]) -> str:
    """A table that scrolls in a box of its own where the screen is narrow.

    Args:
        caption: what the table shows, plain text; below the box, so that it stays where it is when the table scrolls.
        columns: titles; the first is that of the rows' names.
        rows: (name, cells, kind): one cell for each further column, or a single one, which then spans them all. kind:
            a class of the style, such as teacher or failed.
    """
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in columns)
    lines = []
    for name, cells, kind in rows:
        span = f' colspan="{len(columns) - 1}"' if len(cells) == 1 and len(columns) > 2 else ""
        shown = "".join(f"<td{span}{_value(cell)}>{_cell(cell)}</td>" for cell in cells)
        lines.append(f'<tr class="{escape(kind)}"><th scope="row">{escape(name)}</th>{shown}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n"
        f'<p class="note" aria-hidden="true">{escape(caption)}</p>'
    )


def _value(cell: Cell) -> str:
    return f' data-value="{escape(cell.value)}"' if cell.value else ""


def _cell(cell: Cell) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text)
    return text + (f"<small>{escape(cell.note)}</small>" if cell.note else "")


def picture(png: bytes, *, alt: str, caption: str) -> str:
    """A PNG inside the page, enlarged without smoothing, with a caption below."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure class="picture"><img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def folded(summary: str, text: str) -> str:
    """Preformatted text that opens on a click."""
    return f'<details><summary>{escape(summary)}</summary><pre tabindex="0">{escape(text)}</pre></details>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, as a list of terms."""
    return "<dl>" + "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in pairs) + "</dl>"


def side_by_side(parts: Sequence[str], *, wide: bool = False) -> str:
    """Parts beside each other where the screen is wide enough: three, or two that are wide."""
    return f'<div class="beside{" wide" if wide else ""}">\n' + "\n".join(parts) + "\n</div>"

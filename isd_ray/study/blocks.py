"""Parts of a report, written once and rendered twice: as HTML for a browser, as Markdown for a paper's appendix."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from isd_ray.page import picture

LONG = 40  # characters of a cell past which its lines may break
BEST = "*"  # a cell that begins with it is the best of its column


@dataclass(frozen=True)
class Heading:
    """A title; level 2 or 3."""

    text: str
    level: int = 2

    def html(self) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"

    def markdown(self) -> str:
        return f"{'#' * self.level} {_plain(self.text)}"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def html(self) -> str:
        return f"<p>{html.escape(self.text)}</p>"

    def markdown(self) -> str:
        return _plain(self.text)


@dataclass(frozen=True)
class Bullets:
    """Sentences, one below the other."""

    items: Sequence[str]

    def html(self) -> str:
        return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in self.items) + "</ul>"

    def markdown(self) -> str:
        return "\n".join(f"- {_plain(item)}" for item in self.items)


@dataclass(frozen=True)
class Table:
    """Rows of text below a header. The first `texts` columns are words, the others numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    texts: int = 1
    rules: frozenset[int] = field(default_factory=frozenset)  # rows with a line above them
    folded: bool = False  # in HTML: only the title until it is clicked

    def html(self) -> str:
        head = "".join(self._cell("th", i, cell) for i, cell in enumerate(self.header))
        rows = []
        for r, row in enumerate(self.rows):
            kind = ' class="rule"' if r in self.rules else ""
            cells = "".join(self._cell("td", i, cell) for i, cell in enumerate(row))
            rows.append(f"<tr{kind}>{cells}</tr>")
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        title, body = f"<h3>{html.escape(self.title)}</h3>", f'<div class="scroll">{table}</div>{note}'
        return f"<details><summary>{title}</summary>{body}</details>" if self.folded else title + body

    def _cell(self, tag: str, column: int, text: str) -> str:
        kind = ' class="text"' if column < self.texts else ""
        if kind and len(text) > LONG:
            kind = ' class="text wrap"'
        inner = f"<b>{html.escape(text[1:])}</b>" if text.startswith(BEST) else html.escape(text)
        return f"<{tag}{kind}>{inner}</{tag}>"

    def markdown(self) -> str:
        ruler = ["---" if i < self.texts else "---:" for i in range(len(self.header))]
        rows = [[_bold(cell) for cell in row] for row in (self.header, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ruler, *rows[1:])]
        parts = [f"**{_plain(self.title)}**", "\n".join(lines), *([_plain(self.note)] if self.note else [])]
        return "\n\n".join(parts)


@dataclass(frozen=True)
class Picture:
    """A figure: the name of its PNG file, which is also in the page."""

    file: str
    title: str
    caption: str
    image: bytes

    def html(self) -> str:
        return picture(self.title, self.image, self.caption, level=3)

    def markdown(self) -> str:
        return f"**{_plain(self.title)}**\n\n![{_plain(self.title)}]({self.file})\n\n{_plain(self.caption)}"


Block = Heading | Text | Bullets | Table | Picture


def _bold(cell: str) -> str:
    return f"**{_plain(cell[1:])}**" if cell.startswith(BEST) else _plain(cell)


def _plain(text: str) -> str:
    """Markdown must not read signs of its own into a name."""
    for sign in "\\|*_<`[]":
        text = text.replace(sign, f"\\{sign}")
    return text

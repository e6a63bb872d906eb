"""Parts of a report, written once and rendered twice: as HTML for a browser, as Markdown for a paper's appendix."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from isd_ray.markup import as_markdown, in_html, in_markdown
from isd_ray.page import picture

LONG = 40  # characters of a cell past which its lines may break
BEST = "*"  # a cell that begins with it is the best of its column


@dataclass(frozen=True)
class Heading:
    """A title; level 1, 2 or 3."""

    text: str
    level: int = 2

    def html(self) -> str:
        return f"<h{self.level}>{in_html(self.text)}</h{self.level}>"

    def markdown(self) -> str:
        return f"{'#' * self.level} {in_markdown(self.text)}"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def html(self) -> str:
        return f"<p>{in_html(' '.join(self.text.split()))}</p>"

    def markdown(self) -> str:
        return as_markdown(self.text)


@dataclass(frozen=True)
class Bullets:
    """Sentences, one below the other."""

    items: Sequence[str]

    def html(self) -> str:
        return "<ul>" + "".join(f"<li>{in_html(item)}</li>" for item in self.items) + "</ul>"

    def markdown(self) -> str:
        return "\n".join(f"- {as_markdown(item)}" for item in self.items)


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
        note = f'<p class="note">{in_html(self.note)}</p>' if self.note else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        title, body = f"<h3>{in_html(self.title)}</h3>", f'<div class="scroll">{table}</div>{note}'
        return f"<details><summary>{title}</summary>{body}</details>" if self.folded else title + body

    def _cell(self, tag: str, column: int, text: str) -> str:
        kind = ' class="text"' if column < self.texts else ""
        if kind and len(text) > LONG:
            kind = ' class="text wrap"'
        inner = f"<b>{in_html(text[1:])}</b>" if text.startswith(BEST) else in_html(text)
        return f"<{tag}{kind}>{inner}</{tag}>"

    def markdown(self) -> str:
        ruler = ["---" if i < self.texts else "---:" for i in range(len(self.header))]
        rows = [[_bold(cell) for cell in row] for row in (self.header, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in (rows[0], ruler, *rows[1:])]
        parts = [
            f"**{in_markdown(self.title)}**",
            "\n".join(lines),
            *([as_markdown(self.note)] if self.note else []),
        ]
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
        title = in_markdown(self.title)
        return f"**{title}**\n\n![{title}]({self.file})\n\n{as_markdown(self.caption)}"


Block = Heading | Text | Bullets | Table | Picture


def _bold(cell: str) -> str:
    return f"**{in_markdown(cell[1:])}**" if cell.startswith(BEST) else in_markdown(cell)

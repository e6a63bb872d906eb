"""Text that a person or a file gave, as part of a page, a report in Markdown, or a figure.

It is shown as it was written and never read as HTML, Markdown or TeX; the unprintable is escaped.
"""

import html
import re

from isd_ray.errors import harmless, printable

SIGNS = re.compile(r"([\\`*_\[\]<|~$&])")  # what Markdown reads anywhere in a line
BEGINNINGS = re.compile(r"^(?=[#>+=-])|^\d+(?=[.)])")  # and at its beginning
LONGEST_NAME = 40  # characters of a class in a figure or a table


def in_html(text: str) -> str:
    """Return `text` as HTML."""
    return html.escape(printable(text))


def in_markdown(text: str) -> str:
    """Return `text` within a line of Markdown, as in a cell of a table."""
    return SIGNS.sub(r"\\\1", printable(" ".join(text.split())))


def as_markdown(text: str) -> str:
    """Return `text` as a line of Markdown of its own."""
    return BEGINNINGS.sub(lambda found: f"{found[0]}\\", in_markdown(text))


def in_figure(text: str) -> str:
    """Return the name of a class for matplotlib, which reads $TeX$ and hides what begins with _."""
    text = harmless(text, LONGEST_NAME).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text

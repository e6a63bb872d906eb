"""What people and files write is shown, and never read as HTML, Markdown, TeX or orders."""

import html
import io
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from isd_ray.evaluate.table import markdown, print_table
from isd_ray.markup import LONGEST_NAME, as_markdown, in_figure, in_html, in_markdown
from isd_ray.page import page, picture

HOSTILE = [
    "<script>alert(1)</script>", "\x1b[31mred", "a\nerror: all is fine", "[/bold]", "[red]x",
    "$\\frac{", "_hidden", "a|b", "`x`", "**x**", "\u202egnp.exe", "\udcff", "x" * 500, "&lt;b&gt;",
    "![x](http://y)",
]  # fmt: skip
MARKS = {
    "strong",
    "em",
    "a",
    "img",
    "code",
    "table",
    "h1",
    "h2",
    "ul",
    "ol",
    "blockquote",
    "hr",
    "script",
    "del",
}


class Tags(HTMLParser):
    """Gathers tags and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.text = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags |= {tag, *(f"{name}=" for name, _ in attrs)}

    def handle_data(self, data):
        self.text += data


@given(st.text() | st.sampled_from(HOSTILE))
def test_html_shows_the_text_and_nothing_else(text):
    found = Tags(f"<p>{in_html(text)}</p>")
    assert found.tags == {"p"}
    assert found.text.isprintable()
    if text.isprintable():
        assert found.text == text


@given(st.text() | st.sampled_from(HOSTILE))
def test_markdown_is_one_line_without_marks_of_its_own(text):
    for written in (in_markdown(text), as_markdown(text)):
        assert written.isprintable()
        bare = html.unescape(written)
        for sign in "`*_[]<|~$&":
            assert all(before == "\\" for before, c in pairwise(" " + bare) if c == sign)
    assert not as_markdown(text).lstrip().startswith(("#", ">", "-", "+", "="))


@pytest.mark.parametrize(
    ("text", "line"), [("# x", "\\# x"), ("1. x", "1\\. x"), ("-1.5", "\\-1.5"), ("a-b", "a-b")]
)
def test_a_line_of_markdown_begins_nothing(text, line):
    assert as_markdown(text) == line


@given(st.text() | st.sampled_from(HOSTILE))
def test_a_figure_takes_any_name(text):
    name = in_figure(text)
    assert name.isprintable()
    assert len(name) <= 2 * LONGEST_NAME + 1
    assert not name.startswith("_")


def test_a_figure_draws_hostile_names():
    figure = Figure()
    axes = figure.add_subplot()
    for name in HOSTILE:
        axes.plot([0], [0], label=in_figure(name))
        axes.set_title(in_figure(name))
        figure.savefig(io.BytesIO(), dpi=20)
    axes.legend()
    figure.savefig(io.BytesIO(), dpi=20)
    assert len(axes.get_legend().get_texts()) == len(HOSTILE)


def test_a_page_holds_hostile_titles():
    for name in HOSTILE:
        text = page(name, [picture(name, b"", name)]).decode()
        assert Tags(text).tags <= {
            "html", "head", "meta", "link", "title", "style", "body", "h2", "figure", "figcaption",
            "div", "img", "lang=", "charset=", "name=", "content=", "rel=", "href=", "class=", "alt=",
            "src=",
        }  # fmt: skip


def result_of(names: list[str]) -> dict:
    classes = len(names)
    return {
        "metrics": {"student": {"knn20": 50.0}},
        "groups": {"student": {"knn20": {"[/few]": 1.0}}},
        "std": {"student": {"knn20": 1.0}},
        "per_class": {"student": {"knn20": [1.0] * classes}},
        "protocol": {
            "groups": {"classes": {"[/few]": [0]}},
            "bank": {"name": "\x1b[2Jbank", "images": 1, "smallest_class": 1, "largest_class": 1},
            "knn20": {},
        },
    }


def test_the_table_of_a_result_shows_hostile_class_names():
    out = io.StringIO()
    print_table(result_of(HOSTILE), out, class_names=HOSTILE)
    text = out.getvalue()
    assert all(line.isprintable() for line in text.splitlines())
    assert not any(line.startswith("error") for line in text.splitlines())
    assert "[/few]" in text
    assert "\\x1b[31mred 1.0" in text
    assert "x" * LONGEST_NAME not in text
    whole = markdown(result_of(HOSTILE), class_names=HOSTILE)
    assert all(line.isprintable() for line in whole.splitlines())
    assert "a\\|b 1.0" in whole
    rows = [line.replace("\\|", "") for line in whole.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1

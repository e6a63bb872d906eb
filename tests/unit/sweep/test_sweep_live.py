"""The board of a sweep shows reasons and values as they are, whatever stands in them."""

import io

from rich.console import Console

from isd_ray.sweep.live import Board
from isd_ray.sweep.search import Job, _Values
from isd_ray.sweep.space import Space

REASON = "OSError: [/tmp/x] \x1b[31mred\nerror: all is fine"


def board(out: io.StringIO) -> Board:
    return Board(Space(space={}), out)


def test_a_failure_is_one_printable_line_of_a_log():
    out, job = io.StringIO(), Job(1, _Values({"method.views": ["[/weak]", "\x1b[2J"]}), (0,))
    shown = board(out)
    shown("started", job, {})
    shown("ended", job, {"failure": REASON})
    first, second = out.getvalue().splitlines()
    assert "[/weak]" in first
    assert "failed: OSError: [/tmp/x] \\x1b[31mred\\nerror" in second
    assert first.isprintable()
    assert second.isprintable()


def test_a_failure_is_text_in_the_table():
    out, job = io.StringIO(), Job(1, _Values({"method.views": ["[/weak]"]}), (0,))
    shown = board(out)
    for event in ("started", "ended"):
        shown(event, job, {"failure": REASON})
    page = io.StringIO()
    Console(file=page, width=200).print(shown.table())
    assert "[/weak]" in page.getvalue()
    assert "failed: OSError: [/tmp/x] \\x1b[31mred\\nerror" in page.getvalue()
    assert "\x1b" not in page.getvalue()

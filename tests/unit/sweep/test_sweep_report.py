"""The report holds everything it shows, and its importances know which option mattered."""

import base64
import re
from pathlib import Path

import pytest
from test_sweep_search import play, search_in

from isd_ray.sweep import plots, report
from isd_ray.sweep.results import Outcome, Trial, collect
from isd_ray.sweep.space import parse_dimension


def page(search, outcome) -> str:
    report.write(search.plan, search.folder, "a <sweep>", outcome)
    return Path(search.folder.path, "report.html").read_text()


def pictures(text: str) -> list[str]:
    """Titles of the pictures, each of which must be a whole PNG."""
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text):
        content = base64.b64decode(data)
        assert content.startswith(b"\x89PNG")
        assert content.endswith(b"IEND\xaeB`\x82")
    return re.findall(r'<img alt="([^"]+)"', text)


def test_one_goal(tmp_path):
    search = search_in(tmp_path)
    play(search)
    outcome = collect(search)
    text = page(search, outcome)
    assert pictures(text) == [
        "History", "Learning curves", "Which options mattered", "One option at a time",
        "Temperature, momentum and queue size", "Parallel coordinates",
    ]  # fmt: skip
    assert not re.search(r'(src|href)="(?!data:)', text), "the page needs something from outside"
    assert "a &lt;sweep&gt;" in text
    assert f"Best: trial {outcome.winner.number}" in text
    assert text.count("<tr") == 1 + len(outcome.trials)


def test_two_goals_and_a_failed_trial(tmp_path):
    change = {"goals": ["student.knn20", "student.knn20.few"], "scheduler": {"name": "none"}}
    search = search_in(tmp_path, **change)
    play(search, fails=4)
    text = page(search, collect(search))
    assert pictures(text)[0] == "Pareto front"
    assert "ValueError: it always fails" in text


@pytest.mark.parametrize("trials", [1, 2])
def test_few_trials_make_a_page_that_says_so(tmp_path, trials):
    search = search_in(tmp_path, budget={"trials": trials, "epochs": 8}, confirm={"seeds": 0})
    play(search)
    text = page(search, collect(search))
    assert "Too few trials to say" in text
    assert "One seed each" in text or "No trial was better" in text


def test_importances_find_the_option_that_matters():
    dimensions = [parse_dimension(name, {"uniform": [0.0, 1.0]}) for name in ("a.idle", "b.strong", "c.weak")]
    points = []
    for i in range(40):
        a, b, c = ((i * step % 41) / 41 for step in (7, 11, 17))
        values = {"a.idle": a, "b.strong": b, "c.weak": c}
        points.append((Trial(i, "finished", values, {}, {}, None, None, ""), 10 * b + 2 * c))
    shares = plots.importances(dimensions, points)
    assert next(iter(shares)) == "b.strong"
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["b.strong"] > 0.7 > 0.15 > shares["a.idle"]
    assert plots.importances(dimensions, points[:4]) == {}
    assert plots.importances(dimensions, [(t, 1.0) for t, _ in points]) == {}


def test_the_verdict_says_what_the_seeds_can_tell():
    def trial(number: int, *runs: float) -> Trial:
        return Trial(number, "finished", {}, {i: [run] for i, run in enumerate(runs)}, {}, None, None, "")

    def verdict(default: Trial, winner: Trial) -> str:
        return report._verdict(Outcome([default, winner], [default, winner], winner, []))

    assert "more than twice its standard error" in verdict(trial(0, 50.0, 51.0), trial(1, 60.0, 61.0))
    assert "less than twice its standard error" in verdict(trial(0, 50.0, 56.0), trial(1, 52.0, 57.0))
    assert "cannot be said" in verdict(trial(0, 50.0), trial(1, 60.0))

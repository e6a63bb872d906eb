"""The report: every figure is there, whole and as a file, the page needs nothing else, and Markdown has the same."""

import base64
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_up import BALANCED, EXP25, accuracy, made_up, write_study

from isd_ray.study import plots, report, tables
from isd_ray.study.blocks import Table, Text
from isd_ray.study.results import collect
from isd_ray.study.work import cell_folder
from isd_ray.train.folder import RunFolder

TITLES = [
    "embedded_lt-exp25: accuracy over class frequency", "embedded_lt-exp25: groups of classes",
    "embedded_lt-exp25: learning curves", "embedded_lt-exp25: nearest neighbours of rare classes",
    "embedded_lt-exp25: map of the embeddings", "embedded_lt-exp25: the teacher's top anchors",
    "embedded_lt-exp25-balanced: groups of classes", "embedded_lt-exp25-balanced: learning curves",
    "Accuracy over cost",
]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    plan = made_up()
    folder = write_study(plan, tmp_path_factory.mktemp("study"))
    outcome = collect(plan, folder)
    report.write(outcome, folder, "made_up")
    return outcome, Path(folder.path, "report")


def test_the_page_holds_every_figure_and_needs_nothing_else(written):
    _, folder = written
    text = (folder / "index.html").read_text()
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', text)
    assert [title.replace("&#x27;", "'") for title, _ in pictures] == TITLES
    files = [path.read_bytes() for path in folder.glob("*.png")]
    for _, data in pictures:
        content = base64.b64decode(data)
        assert content.startswith(b"\x89PNG")
        assert content.endswith(b"IEND\xaeB`\x82")
        assert content in files
    assert len(files) == len(TITLES)
    assert not re.search(r'(src|href)="(?!data:)', text), "the page needs something from outside"
    assert "Made &lt;up&gt;" in text


def test_classes_of_any_name_are_drawn(written):
    outcome, folder = written
    odd = ["$\\frac{", "_hidden", "\x1b[31mred", "a\nb", "x" * 500, "\udcff"]
    subset = next(run.cell.subset for run in outcome.runs if run.cell.setting == EXP25)
    facts = {**outcome.plan.facts, subset: replace(outcome.plan.facts[subset], names=odd)}
    changed = replace(outcome, plan=replace(outcome.plan, facts=facts))
    drawn = list(report._sheets(changed, EXP25, RunFolder(str(folder.parent))))
    assert [picture.image[:4] for picture in drawn] == [b"\x89PNG"] * 3


def test_a_name_is_text_in_both(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "content", lambda outcome, folder: [Text("a\n\x1b[31m# b\n<i>")])
    report.write(None, RunFolder(str(tmp_path)), "<b>*x*</b>")
    page, text = ((tmp_path / "report" / name).read_text() for name in ("index.html", "report.md"))
    assert "<h1>&lt;b&gt;*x*&lt;/b&gt;</h1>" in page
    assert "<p>a \\x1b[31m# b &lt;i&gt;</p>" in page
    assert text == "# \\<b>\\*x\\*\\</b>\n\na \\\\x1b\\[31m# b \\<i>\n"


def test_markdown_has_the_same_tables_and_figures(written):
    _, folder = written
    text = (folder / "report.md").read_text()
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert sorted(shown) == sorted(path.name for path in folder.glob("*.png"))
    tables_there = len(re.findall(r"^\| ---", text, flags=re.M))
    assert tables_there == (folder / "index.html").read_text().count("<table>") > 10
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M):
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block
    assert "Made \\<up> \\| nothing was run" in text


def test_the_table_of_means(written):
    outcome, _ = written
    table = tables.means(outcome, EXP25, "student.knn20")
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.header == ["", "All", "Many", "Medium", "Few", "Std", "runs"]
    few = [sum(accuracy(run.cell)[4:]) / 2 for run in outcome.of(EXP25, "isd")]
    assert rows["isd"][3] == f"*{sum(few) / 3:.1f} ± 3.2"  # seeds move it by 3.25: 33.5, 36.75, 40
    assert rows["moco_v2"][0] == "40.5 ± 3.0"
    assert rows["untrained backbone"][0] == "25.5 ± 3.0"
    assert rows["raw pixels"][-1] == "3"


def test_the_paper_s_form_has_all_groups_together_and_differences(written):
    outcome, _ = written
    table = tables.by_split(outcome, EXP25, "student.knn20")
    assert table.header == ["classes", "method", "seed 0", "seed 1", "seed 2", "mean"]
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert {group for group, _ in rows} == {"All", "Many", "Medium", "Few"}
    assert rows["Few", "Diff isd - moco_v2"] == ["+8.0", "+8.2", "+8.5", "+8.25"]
    assert rows["Many", "moco_v2"] == ["47.5", "50.5", "53.5", "50.50"]


def test_the_table_of_tests_says_what_n_allows(written):
    outcome, _ = written
    table = tables.tests(outcome, EXP25, "student.knn20")
    row = next(row for row in table.rows if row[:2] == ["Few", "isd"])
    assert row[2:4] == ["3", "+8.25"]
    assert row[-2:] == ["0.2500", "0.2500"]  # sign-flip at its least


def test_what_the_imbalance_costs(written):
    outcome, _ = written
    table = tables.control(outcome, EXP25, "student.knn20")
    rows = {(row[0], row[1]): row[2:] for row in table.rows}
    assert rows["isd", "All"][:3] == ["44.75", "46.75", "+2.00"]
    assert tables.control(outcome, BALANCED, "student.knn20") is None


def test_what_differs_says_who_set_it(written):
    outcome, folder = written
    assert "0.3 †" in (folder / "report.md").read_text()  # method.temperature of isd, from the file
    order = outcome.methods
    assert order[0] == "moco_v2"


def test_classes_of_many_sizes_are_averaged(written):
    outcome, _ = written
    runs = outcome.of(EXP25, "moco_v2")
    assert list(plots.by_frequency(outcome, runs, "student.knn20")) == [4, 10, 20, 40, 80, 100]
    first = plots.by_frequency(outcome, runs, "student.knn20")
    assert first[100] == pytest.approx(53.0)  # 50, 53, 56


def test_a_part_of_a_study_is_reported_too(tmp_path):
    plan = made_up()
    folder = write_study(plan, tmp_path, pictures=False)
    for cell in plan.cells:
        if cell.method == "isd" or cell.setting.control:
            cell_folder(folder, cell).remove("result.json")
    report.write(collect(plan, folder), folder, "part")
    text = Path(folder.path, "report/report.md").read_text()
    assert "isd and moco\\_v2 have no finished pair" in text
    assert "12 of 18 cells have no result" in text


def test_a_table_escapes_what_it_shows():
    table = Table("a <b>", ["x|y", "n"], [["<script>", "*1.0"]], "note")
    assert "<script>" not in table.html()
    assert "<b>1.0</b>" in table.html()
    assert "| x\\|y | n |" in table.markdown()
    assert "**1.0**" in table.markdown()

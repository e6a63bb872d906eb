"""What is read from the cells: groups, pairs, the tidy table."""

import itertools
import json
from pathlib import Path

import made_up as made_up_module
import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up import BALANCED, BETTER, COUNTS, EXP25, NAMES, accuracy, made_up, write_cell, write_study

from isd_ray.study import results, tables
from isd_ray.study.results import collect
from isd_ray.study.verdict import judge, limits, verdict
from isd_ray.study.work import cell_folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    plan = made_up()
    folder = write_study(plan, tmp_path_factory.mktemp("study"), pictures=False)
    return plan, folder, collect(plan, folder)


def test_groups_of_the_control_are_those_of_the_unbalanced_set(study):
    _, _, outcome = study
    for setting in (EXP25, BALANCED):
        run = outcome.of(setting, "isd")[0]
        scores, per_class = run.scores("student.knn20"), accuracy(run.cell)
        assert list(scores) == ["all", "class_mean", "many", "medium", "few", "std"]
        assert scores["many"] == pytest.approx(np.mean(per_class[:2]))
        assert scores["few"] == pytest.approx(np.mean(per_class[4:]))
        groups = [scores[g] for g in ("many", "medium", "few")]
        assert scores["std"] == pytest.approx(
            np.std(groups)
        )  # of the population, as the long-tail papers have it


def test_a_class_without_test_images_takes_no_part(study):
    plan, folder, _ = study
    cell = plan.cells[0]
    path = Path(cell_folder(folder, cell).path, "result.json")
    text = path.read_text()
    result = json.loads(text)
    result["per_class"]["student"]["knn20"][4:] = [None, 33.0]
    path.write_text(json.dumps(result))
    try:
        scores = collect(plan, folder).runs[0].scores("student.knn20")
        assert scores["few"] == 33.0
        result["per_class"]["student"]["knn20"][4:] = [None, None]
        path.write_text(json.dumps(result))
        scores = collect(plan, folder).runs[0].scores("student.knn20")
        assert "few" not in scores
        assert "std" not in scores
    finally:
        path.write_text(text)


def test_metrics_without_classes_of_the_set_have_no_groups(study):
    plan, folder, _ = study
    path = Path(cell_folder(folder, plan.cells[0]).path, "result.json")
    text = path.read_text()
    result = json.loads(text)
    others = {"nmi": 31.5, "transfer/dtd": 44.0, "knn200_weighted": None}
    for part, network in itertools.product(
        ("metrics", "class_mean", "std", "groups", "per_class"), result["metrics"]
    ):
        result[part][network] |= (
            others if part == "metrics" and network == "student" else dict.fromkeys(others)
        )
    result["per_class"]["student"]["transfer/dtd"] = [50.0, 38.0]
    result["protocol"] |= {name: {"name": name} for name in others}
    path.write_text(json.dumps(result))
    run = collect(plan, folder).runs[0]
    path.write_text(text)
    assert run.scores("student.nmi") == {"all": 31.5}
    assert run.scores("student.transfer/dtd") == {"all": 44.0}  # its classes are another set's
    assert run.scores("student.knn200_weighted") == run.scores("teacher.knn20") == {}


def test_pairs_are_seeds_of_one_split(study):
    _, _, outcome = study
    assert outcome.units(EXP25) == "seed"
    assert outcome.differences(EXP25, "isd", "student.knn20", "few") == pytest.approx([8.0, 8.25, 8.5])
    assert outcome.differences(EXP25, "isd", "student.knn20", "many") == pytest.approx([2.0, 2.25, 2.5])
    assert outcome.differences(EXP25, "isd", "teacher.knn20", "many") == []


def test_pairs_are_splits_where_there_are_several(tmp_path):
    plan = made_up(imbalances={"exp25": {"scheme": "exponential", "splits": [0, 1, 2, 3]}})
    outcome = collect(plan, write_study(plan, tmp_path, pictures=False))
    assert outcome.units(EXP25) == "split"
    # Seeds of a split are averaged first: 12 runs are 4 pairs.
    assert outcome.differences(EXP25, "isd", "student.knn20", "all") == pytest.approx([4.25, 4.5, 4.75, 5.0])
    judged = {j.group: j for j in judge(outcome, EXP25, "student.knn20") if j.method == "isd"}
    assert judged["few"].test.n == 4


def test_only_pairs_with_the_same_seed_count(tmp_path):
    plan = made_up()
    folder = write_study(plan, tmp_path, pictures=False)
    lost = next(c for c in plan.cells if (c.method, c.seed, c.setting) == ("moco_v2", 1, EXP25))
    cell_folder(folder, lost).remove("result.json")
    cell_folder(folder, lost).write_json("failure.json", {"reason": "ValueError: it broke"})
    outcome = collect(plan, folder)
    assert outcome.differences(EXP25, "isd", "student.knn20", "few") == pytest.approx([8.0, 8.5])
    assert [run.failure for run in outcome.failed] == ["ValueError: it broke"]
    assert any("1 of 18 cells have no result" in line for line in limits(outcome))


def test_the_tidy_table_has_a_row_for_everything(study):
    plan, folder, outcome = study
    results.write(outcome, folder)
    rows = pq.read_table(Path(folder.path, "results.parquet")).to_pylist()
    groups, classes, metrics = 6, len(NAMES), 2
    networks = sum(3 if plan.config(cell).evaluate.baselines else 1 for cell in plan.cells)
    others = 2 + len(outcome.runs[0].cost())
    assert len(rows) == (groups + classes) * metrics * networks + others * len(plan.cells)
    cell = next(c for c in plan.cells if (c.method, c.seed, c.setting) == ("isd", 2, BALANCED))
    own = [
        r for r in rows if r["cell"] == cell.name and r["network"] == "student" and r["metric"] == "linear"
    ]
    by_class = {r["group"]: r for r in own if r["level"] == "class"}
    assert [by_class[n]["value"] for n in NAMES] == pytest.approx(accuracy(cell, "linear"))
    assert [by_class[n]["images_when_unbalanced"] for n in NAMES] == COUNTS[False]
    assert [by_class[n]["pretraining_images"] for n in NAMES] == COUNTS[True]
    few = next(r for r in own if r["group"] == "few")
    assert (few["level"], few["pretraining_images"], few["images_when_unbalanced"]) == ("group", 84, 14)
    assert {r["unit"] for r in own} == {"%"}
    assert {(r["control"], r["split"], r["seed"]) for r in own} == {(True, "0", 2)}


def test_cost_comes_from_the_log_over_all_restarts(study):
    _, _, outcome = study
    cost = outcome.runs[0].cost()
    batch = outcome.runs[0].config["train.batch_size"]
    assert cost["images"] == 40 * batch
    assert cost["cpu_hours"] == pytest.approx(40 * batch / 640 / 3600)
    assert cost["passes"] == 3 * 40 * batch


def test_the_verdict_names_gains_losses_and_what_chance_may_explain(study):
    _, _, outcome = study
    said = next(s for s in verdict(outcome) if s.startswith("embedded_lt-exp25, "))
    assert "isd against moco_v2 (3 seeds)" in said
    assert "wins on" in said
    assert "Few (+8.2 [" in said
    judged = {(j.method, j.group): j.says for j in judge(outcome, EXP25, "student.knn20")}
    assert judged["isd", "few"] == 1
    assert judged["simclr", "few"] == 0  # -1, -0.75, -0.5: three pairs, adjusted for twelve tests
    assert any("cannot give less than p = 0.25" in line for line in limits(outcome))
    assert any("one and the same choice of images" in line for line in limits(outcome))


def test_whether_imbalance_harms_a_method_less_is_judged(tmp_path, monkeypatch):
    """It costs the baseline 2 points and ISD 3, 3.1 and 3.2 points less."""
    real = made_up_module.accuracy
    eased = lambda cell: (3 + cell.seed / 10) * (cell.method == "isd" and not cell.setting.control)  # noqa: E731
    monkeypatch.setattr(
        made_up_module, "accuracy", lambda cell, *metric: [a + eased(cell) for a in real(cell, *metric)]
    )
    plan = made_up()
    outcome = collect(plan, write_study(plan, tmp_path, pictures=False))
    said = [s for s in verdict(outcome) if "imbalance harms" in s]
    assert len(said) == 1
    assert said[0].startswith(
        "embedded_lt-exp25: imbalance harms isd less than moco_v2; its cost to moco_v2 less"
    )
    assert "All (+3.1 [+2.9, +3.3], p 0.00" in said[0]
    rows = {row[:2]: row for row in map(tuple, tables.control(outcome, EXP25, "student.knn20").rows)}
    assert rows["isd", "All"][4] == "-1.10"
    assert rows["isd", "All"][6:8] == ("+3.10", "+2.85 … +3.35")
    assert rows["moco_v2", "All"][6:9] == ("-", "-", "-")


def test_costs_of_imbalance_compare_the_same_seeds(tmp_path):
    """Two splits of two seeds, one balanced run missing: seeds and splits move all runs, and no cost by that."""
    plan = made_up(
        imbalances={"exp25": {"scheme": "exponential", "control": True, "splits": [0, 1]}}, seeds=[0, 1]
    )
    folder = write_study(plan, tmp_path, pictures=False)
    gone = next(c for c in plan.cells if (c.setting, c.method, c.seed) == (BALANCED, "moco_v2", 1))
    Path(cell_folder(folder, gone).path, "result.json").unlink()
    outcome = collect(plan, folder)
    costs = tables.imbalance_costs(outcome, EXP25, "moco_v2", "student.knn20", "all")
    assert len(costs) == 3
    assert list(costs.values()) == pytest.approx([2.0] * 3)
    assert tables.savings(outcome, EXP25, "isd", "student.knn20", "all") == pytest.approx([0.0, 0.0])


def test_a_gain_that_others_pay_for_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(BETTER, "isd", -3.0)
    plan = made_up(imbalances={"exp25": {"scheme": "exponential"}}, seeds=[0, 1, 2, 3, 4, 5])
    outcome = collect(plan, write_study(plan, tmp_path, pictures=False))
    assert any("What Few gain, Many, Medium pay for." in line for line in verdict(outcome))
    assert not any("cannot give less" in line for line in limits(outcome))  # six pairs can


def test_two_pairs_are_never_a_gain(tmp_path):
    plan = made_up(seeds=[0, 1])
    outcome = collect(plan, write_study(plan, tmp_path, pictures=False))
    assert {j.says for j in judge(outcome, EXP25, "student.knn20")} == {0}
    assert any("2 pairs of a seed each: too few" in line for line in limits(outcome))


def test_methods_below_the_floor_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(BETTER, "simclr", -30.0)
    plan = made_up()
    folder = write_study(plan, tmp_path, pictures=False)
    write_cell(plan, folder, plan.cells[0])
    below = next(line for line in limits(collect(plan, folder)) if line.startswith("Not above"))
    assert "simclr on embedded_lt-exp25" in below
    assert "isd" not in below

"""All that is wrong with a study's file is said at once; what the cells run follows from the file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from isd_ray.config import read_yaml
from isd_ray.errors import UserError
from isd_ray.study import check as checking
from isd_ray.study.check import check
from isd_ray.study.spec import Cell, Setting, Study, Subset, cells

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "jobs/recipes").glob("study_*.yaml"))


@pytest.fixture(autouse=True)
def without_data(monkeypatch):
    """tests/e2e/test_study.py has the faults that only the images show."""
    monkeypatch.setattr(checking, "look_at", lambda study, configs, faults: {})


def content(**change: Any) -> dict[str, Any]:
    return {
        "methods": {"moco_v2": {}, "isd": {}},
        "data": {"embedded_lt": {}},
        "imbalances": {"exp20": {"scheme": "exponential", "ratio": 20}},
        "baseline": "moco_v2",
    } | change


def fault(**change: Any) -> str:
    with pytest.raises(UserError) as error:
        check(content(**change))
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"basline": "isd"}, "unknown entry 'basline'. Did you mean 'baseline'?"),
        (
            {"imbalances": {"a": {"scheme": "step", "ratoi": 3}}},
            "'imbalances.a.ratoi'. Did you mean 'ratio'?",
        ),
        ({"resources": {"cpu": 2}}, "unknown entry 'resources.cpu'. Did you mean 'cpus'?"),
        ({"baseline": "moco"}, "baseline: there is no method 'moco'. Did you mean 'moco_v2'?"),
        (
            {"metrics": ["student.kn20"]},
            "metrics: student.kn20: unknown protocol 'kn20'. Did you mean 'knn20'?",
        ),
        ({"metrics": ["studnt.knn20"]}, "'studnt.knn20' is not network.metric"),
        ({"metrics": ["student.knn1", "student.knn1"]}, "'student.knn1' stands there twice"),
        (
            {"metrics": ["student.linear"], "config": {"evaluate.protocols": ["knn20"]}},
            "is none of evaluate.protocols",
        ),
        ({"methods": {"moco_v2": {}, "smclr": {}}}, "Did you mean 'simclr'?"),
        ({"methods": {"moco_v2": {"method.temperatur": 1}}}, "Did you mean 'method.temperature'?"),
        ({"methods": {"moco_v2": {}, "simclr": {"method.momentum": 0.9}}}, "'simclr' has no such option"),
        ({"methods": {"moco_v2": {"data.image_size": 24}}}, "all methods see the same data"),
        (
            {"config": {"train.epoch": 3}},
            "config: unknown option 'train.epoch'. Did you mean 'train.epochs'?",
        ),
        ({"config": {"train.seed": 3}}, "config: train.seed: the study sets it; use seeds"),
        ({"config": {"data.ratio": 3}}, "config: data.ratio: the study sets it; use imbalances"),
        ({"data": {"embeded_lt": {}}}, "Did you mean 'embedded_lt'?"),
        ({"data": {"a b": {"data.dataset": "embedded_lt"}}}, "data: 'a b': it becomes a folder's name"),
        ({"imbalances": {"a": {"scheme": "exponentail"}}}, "unknown scheme 'exponentail'. Did you mean"),
        ({"imbalances": {"a": {"scheme": "list", "control": True}}}, "'list' has no balanced control"),
        ({"seeds": [1, 1]}, "two cells would be called 'embedded_lt-exp20-0-moco_v2-seed1'"),
        ({"seeds": []}, "seeds: "),
        ({"fairness": "flops"}, "fairness: Input should be 'epochs' or 'passes'"),
        ({"fairness": "passes", "methods": {"moco_v2": {"train.epochs": 3}}}, "fairness: passes sets it"),
        ({"methods": {}}, "methods: nothing stands there"),
        ({"methods": {"../x": {}}}, "methods: '../x': it becomes a folder's name"),
        ({"methods": {"_x": {"method.name": "isd"}}}, "methods: '_x': a letter or digit begins it"),
        ({"imbalances": {"a": {"scheme": "list", "splits": ["a/b"]}}}, "splits: 'a/b': it becomes"),
        ({"imbalances": {"a" * 90: {"scheme": "step"}}}, "at most 100 are taken; choose shorter"),
        ({"seeds": [*range(1000)], "data": {f"d{i}": {} for i in range(10)}}, "at most 10,000 are"),
        ({"seeds": [2**32]}, "seeds.0: Input should be less than or equal to 4294967295"),
        ({"config": {"model.backbone": "resnet19"}}, "unknown backbone 'resnet19'"),
        ({"config": {"method.views": ["weak"]}}, "takes two views"),
        ({"data": {"x": {"data": 5}}}, "data.x: unknown option 'data'"),
        ({"config": {"train.lr": 1, "train": {"lr": 2}}}, "config: option 'train.lr' stands there"),
        ({"resources": {"gpus": 1.5}}, "resources.gpus 1.5: give a share from 0.001 to 1, or a whole number"),
    ],
)
def test_a_fault_is_named_with_its_remedy(change, words):
    text = fault(**change)
    assert words in text
    assert "\n" not in text or text.startswith("the study has ")


def test_all_faults_come_at_once():
    text = fault(
        baseline="moco",
        metrics=["student.kn20"],
        resources={"cpu": 2},
        methods={"moco_v2": {"method.temperatur": 1}, "isd": {}},
        imbalances={"a": {"scheme": "exponentail"}, "b": {"scheme": "step", "ratoi": 3}},
    )
    assert text.startswith("the study has 6 faults:\n")
    lines = text.splitlines()[1:]
    assert len(lines) == 6
    for word in ("'moco'", "student.kn20", "resources.cpu", "method.temperatur", "exponentail", "ratoi"):
        assert sum(word in line for line in lines) == 1, word


def test_a_missing_part_is_said_beside_the_misspelt_one():
    whole = content()
    whole["baselin"] = whole.pop("baseline")
    with pytest.raises(UserError) as error:
        check(whole)
    assert "baseline: Field required" in str(error.value)
    assert "Did you mean 'baseline'?" in str(error.value)


def test_the_command_line_wins_over_the_file_and_not_over_a_method():
    plan = check(content(config={"train.epochs": 3}), {"train.epochs": 5})
    assert {plan.config(cell).train.epochs for cell in plan.cells} == {5}
    with pytest.raises(UserError, match=r"--method\.temperature: methods\.isd sets it too"):
        check(
            content(methods={"moco_v2": {}, "isd": {"method.temperature": 0.2}}), {"method.temperature": 0.1}
        )


def test_what_is_written_beside_the_results_is_the_same_study():
    file = content(config={"train.epochs": 3}, data={"embedded_lt": {"train.lr": 0.5}})
    plan = check(file, {"train.epochs": 5, "train.lr": 0.25})
    again = check(yaml.safe_load(yaml.safe_dump(plan.written(), sort_keys=False)))
    assert [again.config(c) for c in again.cells] == [plan.config(c) for c in plan.cells]
    assert (again.config(again.cells[0]).train.epochs, again.config(again.cells[0]).train.lr) == (5, 0.25)


def test_protocols_that_are_asked_for_are_measured():
    plan = check(content(metrics=["student.fewshot5", "student.nmi"]))
    evaluate = plan.config(plan.cells[0]).evaluate
    assert evaluate.protocols == ["knn1", "knn20", "knn200_weighted", "linear", "fewshot5", "nmi"]
    assert not evaluate.keep_features


def test_what_any_method_has_to_beat_is_measured_once():
    """The untrained backbone of a seed and raw pixels are the same whichever method's run looks at them."""
    whole = content(seeds=[0, 1])
    measured = lambda plan: {(c.method, c.seed) for c in plan.cells if plan.config(c).evaluate.baselines}  # noqa: E731
    assert measured(check(whole)) == {("moco_v2", 0), ("moco_v2", 1)}
    assert measured(check(whole, {"evaluate.baselines": False})) == set()
    assert len(measured(check(whole, {"evaluate.baselines": True}))) == 4


def test_cells_are_every_combination_the_first_seeds_first():
    study = Study(**content(seeds=[4, 7], imbalances={
        "exp20": {"scheme": "exponential", "ratio": 20, "control": True},
        "d": {"scheme": "isd_8_30", "splits": ["D1", "D2"]},
    }))  # fmt: skip
    found = cells(study)
    assert len(found) == 2 * (1 + 1 + 2) * 2
    assert [c.seed for c in found] == [4] * 8 + [7] * 8
    assert found[0].name == "embedded_lt-exp20-0-moco_v2-seed4"
    assert {c.name for c in found} >= {"embedded_lt-exp20-balanced-0-isd-seed7", "embedded_lt-d-D2-isd-seed4"}


def test_a_cell_is_an_ordinary_run():
    plan = check(content(imbalances={
        "exp20": {"scheme": "exponential", "ratio": 20, "control": True, "splits": [3], "options": {"n_max": 90}},
        "d": {"scheme": "isd_8_30", "splits": ["D2"]},
        "l": {"scheme": "list", "options": {"files": "lists/{split}.txt"}, "splits": ["D2"]},
        "own": {"scheme": "step", "splits": "seeds"},
    }, seeds=[1, 2]))  # fmt: skip
    by_name = {cell.name: plan.config(cell) for cell in plan.cells}
    exp = by_name["embedded_lt-exp20-3-isd-seed1"]
    assert (exp.data.scheme, exp.data.ratio, exp.data.subset_seed, exp.train.seed) == (
        "exponential",
        20,
        3,
        1,
    )
    assert exp.data.scheme_options == {"n_max": 90}
    control = by_name["embedded_lt-exp20-balanced-3-isd-seed1"].data
    assert (control.scheme, control.scheme_options) == ("balanced", {"of": "exponential", "n_max": 90})
    assert by_name["embedded_lt-d-D2-isd-seed1"].data.scheme_options == {"split": "D2"}
    assert by_name["embedded_lt-l-D2-isd-seed1"].data.scheme_options == {"files": "lists/D2.txt"}
    assert {by_name[f"embedded_lt-own-{s}-isd-seed{s}"].data.subset_seed for s in (1, 2)} == {1, 2}
    assert (exp.train.workers, exp.train.threads, exp.train.device) == (0, 1, "cpu")
    assert plan.config(plan.cells[0], gpus=0.25).train.gpus_per_worker == 0.25


def test_equal_passes_scale_the_epochs():
    """SimCLR looks twice and learns from both looks; MoCo's student and teacher look once each, one learns."""
    plan = check(
        content(methods={"moco_v2": {}, "simclr": {}}, fairness="passes", config={"train.epochs": 8})
    )
    assert plan.passes == {"moco_v2": 3.0, "simclr": 4.0}
    assert plan.epochs == {"moco_v2": 8, "simclr": 6}
    cell = Cell(Subset(Setting("embedded_lt", "exp20"), 0), "simclr", 0)
    assert plan.config(cell).train.epochs == 6


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_study_files_of_the_project_are_right(recipe):
    plan = check(read_yaml(recipe))
    kinds = {cell.method: plan.config(cell).method.name for cell in plan.cells}
    assert kinds == {method: method for method in plan.study.methods}
    written = yaml.safe_dump(plan.written(), sort_keys=False)
    assert check(yaml.safe_load(written)).cells == plan.cells

"""A space is checked whole before anything starts; what is drawn from it can be turned back and forth."""

import math
from datetime import date
from pathlib import Path

import optuna
import pytest

from isd_ray.config import flatten, option_names
from isd_ray.errors import UserError
from isd_ray.evaluate.names import ALONG, examples, parse
from isd_ray.sweep.check import check
from isd_ray.sweep.constraints import parse_constraint
from isd_ray.sweep.space import Space, parse_dimension, read_space

SPACES = sorted(Path(__file__).parents[3].glob("tune_spaces/*.yaml"))
GOOD = {"space": {"method.temperature": {"loguniform": [0.05, 0.3]}}, "budget": {"epochs": 16}}


def faults(**content) -> str:
    with pytest.raises(UserError) as error:
        check(Space(**({"space": {}} | content)))
    return str(error.value)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_shipped_spaces_are_good_and_hold_their_default(path):
    plan = check(read_space(path))
    config = flatten(plan.space.config_of(plan.base, {}).model_dump())
    assert plan.default == {d.name: config[d.name] for d in plan.active(plan.default)}
    assert plan.space.description


def test_all_faults_at_once_each_with_its_remedy():
    text = faults(
        config={"data.datset": "embedded_lt", "train.epochs": 3},
        space={
            "method.temprature": {"uniform": [0.1, 0.2]},
            "train.lr": {"loguniform": [-0.1, 0.1]},
            "method.momentum": {"uniform": [0.9, 1.5]},
            "queue.size": {"uniform": [64, 128]},
            "train.workers": {"int": [1, 2]},
            "train.weight_decay": {"logunifrom": [1e-5, 1e-3]},
        },
        constraints=["queue.sise < 5", "__import__('os').system('true') == 0", "train.lr"],
        goals=["student.kn20"],
        budget={"epochs": 4},
        scheduler={"grace": 4},
        validation={"every": 8},
    )
    for words in (
        "config: unknown option 'data.datset'. Did you mean 'data.dataset'?",
        "config: train.epochs: the sweep sets it; use budget.epochs",
        "unknown option 'method.temprature'. Did you mean 'method.temperature'?",
        "lower bound -0.1 must be above 0",
        "method.momentum 1.5: Input should be less than or equal to 1",
        "queue.size 103.5",
        "train.workers does not change what is learned",
        "Did you mean 'loguniform'?",
        "unknown option 'queue.sise'. Did you mean 'queue.size'?",
        "is neither an option, a number nor",
        "constraint 'train.lr': no comparison",
        "unknown goal 'student.kn20'. Did you mean 'student.knn20'?",
        "scheduler.grace 4: a trial has 4 epochs",
        "validation.every 8: a trial has 4 epochs",
    ):
        assert words in text, words
    assert "\n" not in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"space": {}}, "nothing is varied"),
        ({"space": {"method.weight": {"uniform": [0.0, 1.0]}}}, "has no such option; these have it: pirl"),
        (
            {"space": {"method.temperature": {"uniform": [0.2, 0.3]}}},
            "the default: method.temperature 0.1 lies",
        ),
        ({"constraints": ["method.temperature > 1"]}, "the default: it breaks the constraint"),
        ({"start": [{"method.temperature": 0.5}]}, "method.temperature 0.5 lies outside"),
        ({"start": [{"train.lr": 0.5}]}, "'train.lr' is not varied"),
        ({"goals": ["student.knn20", "student.knn20.few"]}, "scheduler.name: none"),
        ({"goals": ["student.knn20", "student.knn20"], "scheduler": {"name": "none"}}, "twice"),
        ({"goals": ["student.linear"]}, "unknown goal 'student.linear'"),  # it takes too long
        ({"goals": ["teacher.nmi.few"]}, "unknown goal 'teacher.nmi.few'. Did you mean 'teacher.nmi'?"),
        ({"goals": ["student.knn20.fwe"]}, "unknown goal 'student.knn20.fwe'"),
        ({"goals": ["pixels.knn20"]}, "unknown goal 'pixels.knn20'"),
        ({"goals": ["student"]}, "unknown goal 'student'"),
        ({"config": {"evaluate.along": ["nmi"]}}, "evaluate.along: the sweep sets it; use goals"),
        ({"sampler": {"name": "nsga2"}}, "with one, use tpe"),
        ({"scheduler": {"grace": 6}}, "multiple of validation.every (4)"),
        (
            {"space": {"train.lr": {"uniform": [0.01, 0.1], "when": {"train.optimiser": "sgd"}}}},
            "Did you mean 'train.optimizer'?",
        ),
        (
            {
                "space": {
                    "train.optimizer": {"choice": ["sgd", "lars"]},
                    "train.lr": {"uniform": [0.01, 0.1], "when": {"train.optimizer": "adam"}},
                }
            },
            "train.optimizer is never 'adam'",
        ),
        ({"space": {"train.lr": {"uniform": [0.01, 0.1], "when": {"train.lr": 0.1}}}}, "wait for each other"),
        ({"space": {"queue.size": {"int": [64, 450], "step": 64}}}, "no whole number of steps"),
        ({"space": {"method.momentum": {"loguniform_below_one": [0.9, 1.0]}}}, "must be below 1"),
        ({"space": {"train.optimizer": {"choice": ["sgd", "adam"]}}}, "train.optimizer 'adam'"),
        ({"config": {"method.name": "isdplus"}}, "isd_plus"),
        ({"space": {"train.lr": {"loguniform": [0.01, math.inf]}}}, "expected numbers up to 9.0072e+15"),
        ({"space": {"queue.size": {"int": [64, 10**400]}}}, "expected numbers up to 9.0072e+15"),
        ({"space": {"train.lr": {"uniform": [0.1, 1.0], "step": math.nan}}}, "expected numbers up to"),
        ({"space": {"train.lr": {"uniform": [0.1, 1.0], "step": 1e-320}}}, "more than 1,000,000 values"),
        ({"space": {"train.optimizer": {"choice": ["sgd", date(2020, 1, 1)]}}}, "found datetime.date"),
        ({"constraints": ["'a' * 99999999999 != queue.size"]}, "only numbers can be"),
        ({"constraints": ["method.name * 99999999999 != queue.size"]}, "only numbers can be"),
        ({"constraints": [f"1{'0' * 400} / 3.5 > queue.size"]}, "too large"),
        ({"constraints": [f"1{'+1' * 1000} < queue.size"]}, "2,014 characters"),
        ({"resources": {"gpus": 1.5}}, "resources.gpus 1.5"),
        ({"resources": {"gpus": 1e-9}}, "resources.gpus 1e-09"),
    ],
)
def test_a_fault_is_named(change, words):
    text = faults(**(GOOD | change))
    assert words in text
    assert "\n" not in text


def test_unknown_entries_of_the_file_are_named(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("space: {}\nconstrain: []\nbudget: {trial: 3, epochs: none}\n")
    with pytest.raises(UserError) as error:
        read_space(path)
    text = str(error.value)
    assert "'constrain'. Did you mean 'constraints'?" in text
    assert "'budget.trial'. Did you mean 'trials'?" in text
    assert "budget.epochs: Input should be a valid integer" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"1: 2\n", "unknown entry '1'"),
        (b"- a\n", "found list"),
        (b"", "space: Field"),
    ],
)
def test_a_file_that_is_no_space_is_said(tmp_path, content, words):
    path = tmp_path / "space.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_space(path)


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ({"uniform": [0.1, 0.5]}, 0.37),
        ({"loguniform": [1e-5, 1e-1]}, 1e-3),
        ({"loguniform_below_one": [0.9, 0.999]}, 0.97),
        ({"loguniform_below_one": [0.9, 0.999]}, 0.999),
        ({"int": [64, 512], "step": 64}, 448),
        ({"logint": [2, 4096]}, 100),
        ({"choice": [["strong", "weak"], ["weak", "weak"]]}, ["weak", "weak"]),
        ({"choice": [None, True, 0.5]}, None),
    ],
)
def test_a_known_value_is_drawn_as_it_was_given(spec, value):
    dimension = parse_dimension("x", spec)
    study = optuna.create_study()
    study.enqueue_trial({"x": dimension.encode(value)})
    assert dimension.holds(value)
    drawn = dimension.suggest(study.ask())
    assert drawn == value
    assert type(drawn) is type(value)


@pytest.mark.parametrize("spec", [{"uniform": [0.1, 0.5], "step": 0.1}, {"int": [3, 9], "step": 3}])
def test_everything_that_is_drawn_lies_in_the_space(spec):
    dimension = parse_dimension("x", spec)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = {dimension.suggest(study.ask()) for _ in range(50)}
    assert all(dimension.holds(value) for value in drawn)
    assert len(drawn) == round((dimension.high - dimension.low) / dimension.step) + 1


def test_config_says_where_a_varied_option_starts():
    plan = check(Space(**GOOD, config={"method.temperature": 0.2}))
    assert plan.default == {"method.temperature": 0.2}
    assert plan.space.config_of(plan.base, {"method.temperature": 0.3}).method.temperature == 0.3


@pytest.mark.parametrize("metric", examples(cheap=True))
def test_every_cheap_protocol_can_be_a_goal_and_is_measured_on_the_way(metric):
    grouped = parse(metric).protocol.by_class
    for goal in [f"student.{metric}", *([f"teacher.{metric}.few"] if grouped else [])]:
        plan = check(Space(**GOOD, goals=[goal]))
        along = plan.space.config_of(plan.base, {}).evaluate.along
        assert along == list(dict.fromkeys([*ALONG, metric]))


def test_conditional_dimensions_are_active_only_where_their_condition_holds():
    lr = {"loguniform": [0.01, 1.0], "when": {"train.optimizer": ["lars", "adamw"]}}
    plan = check(Space(space={"train.lr": lr, "train.optimizer": {"choice": ["sgd", "lars", "adamw"]}}))
    assert [d.name for d in plan.dimensions] == ["train.optimizer", "train.lr"]
    assert plan.default == {"train.optimizer": "sgd"}
    assert [d.name for d in plan.active({"train.optimizer": "lars"})] == ["train.optimizer", "train.lr"]


def test_constraints_compare_with_other_options_and_the_number_of_images():
    plan = check(
        Space(**GOOD, constraints=["queue.size <= data.size / 4", "method.temperature < 2 * queue.size"])
    )
    assert plan.broken({"method.temperature": 0.1}, 4 * 448) is None
    assert plan.broken({"method.temperature": 0.1}, 4 * 448 - 1) == "queue.size <= data.size / 4"
    chain = parse_constraint("1 < a.b - 2 * c <= 4 + 1")
    assert chain.names == ("a.b", "c")
    assert [chain.holds({"a.b": x, "c": 1}) for x in (3, 3.5, 7, 8)] == [False, True, True, False]
    assert chain.holds({"a.b": None, "c": 1})  # an option that the method does not have


def test_every_option_is_searchable_or_refused_by_name():
    """No option falls through: a choice of no sense is refused wherever it stands."""
    for name in option_names():
        assert faults(space={name: {"choice": ["no such value", "nor this"]}}), name


def test_a_memory_limit_that_nobody_would_watch_is_refused(monkeypatch):
    limited = GOOD | {"resources": {"memory": 2.0}}
    assert check(Space(**limited)).space.resources.memory == 2.0
    assert "train.workers to 0" in faults(**limited, config={"train.workers": 2})
    monkeypatch.setattr("isd_ray.sweep.check.STATM", Path("/nowhere/statm"))
    assert "no /nowhere/statm here" in faults(**limited)


def test_more_trials_than_anybody_runs_are_refused_also_from_the_command_line():
    space = Space(**GOOD)
    space.budget.trials = 10**9  # as --trials does
    with pytest.raises(UserError, match=r"budget\.trials: .* less than or equal to 100000"):
        check(space)


def test_what_only_training_would_find_is_found_in_every_choice():
    text = faults(space={"model.backbone": {"choice": ["resnet8", "resnet19"]}})
    assert "space: --model.backbone resnet19" in text
    assert "unknown backbone 'resnet19'" in text
    assert "config: --model.backbone" in faults(**GOOD, config={"model.backbone": "resnet19"})


@pytest.mark.parametrize(
    "text", ["-" * 499 + "1", "(" * 250 + "1" + ")" * 249, "'\\d' == 'd'", "1 < 2 is 3", "a\0b"]
)
def test_odd_constraints_are_refused_or_read_without_a_word_of_python(text, recwarn):
    said = ""
    try:
        parse_constraint(text)
    except UserError as error:
        said = str(error)
    assert said.isprintable()
    assert not recwarn.list

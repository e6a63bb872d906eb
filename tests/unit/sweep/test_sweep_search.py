"""The search is a function of its journal: cut anywhere, it goes on to the same trials, values and rungs."""

import json
import math
from pathlib import Path

import pytest
from optuna.trial import TrialState

from isd_ray.errors import UserError
from isd_ray.sweep.check import check
from isd_ray.sweep.journal import FILE
from isd_ray.sweep.results import collect, pareto, trial_rows, write
from isd_ray.sweep.search import DONE, Job, Search
from isd_ray.sweep.space import Space
from isd_ray.train.folder import RunFolder

SPACE = {
    "config": {"method.name": "isd_plus"},
    "space": {
        "method.temperature": {"loguniform": [0.02, 0.5]},
        "method.momentum": {"loguniform_below_one": [0.9, 0.999]},
        "queue.size": {"int": [64, 1024], "step": 64},
        "train.optimizer": {"choice": ["sgd", "lars"]},
        "train.warmup_epochs": {"uniform": [0.0, 4.0], "when": {"train.optimizer": "lars"}},
    },
    "constraints": ["queue.size <= data.size / 4"],
    "goals": ["student.knn20"],
    "budget": {"trials": 14, "epochs": 8},
    "validation": {"every": 2},
    "scheduler": {"grace": 2, "factor": 2},
    "sampler": {"startup": 5},
    "confirm": {"best": 2, "seeds": 1},
}
GOALS = SPACE["goals"]
IMAGES = 2400  # queue.size may be 576 at most


def accuracy(values: dict, epoch: int, seed: int) -> float:
    """A made-up learning curve with a best temperature and momentum, and noise that depends on the seed alone."""
    off = math.log(values["method.temperature"] / 0.15) ** 2 + (values["method.momentum"] - 0.97) ** 2 * 100
    return 60 - 5 * off - 20 / epoch + 0.1 * seed + (0.5 if values["train.optimizer"] == "lars" else 0)


def rows_of(job: Job, goals: list[str]) -> list[dict]:
    """The rows that a run of this job would write."""
    first = [accuracy(job.values, epoch, job.seeds[0]) for epoch in (2, 4, 6, 8)]
    second = [100 - 10 * job.values["method.temperature"] - 1 / epoch for epoch in (2, 4, 6, 8)]
    both = zip((2, 4, 6, 8), zip(first, second, strict=True), strict=True)
    return [
        {"step": e, "epoch": e, "seed": job.seeds[0]} | dict(zip(goals, v, strict=False)) for e, v in both
    ]


def play(search: Search, jobs: int | None = None, fails: int = -1) -> list[Job]:
    """Run jobs one after another, all or so many; returns those that ran."""
    ran: list[Job] = []
    while (job := search.next()) != DONE and (jobs is None or len(ran) < jobs):
        ran.append(job)
        if job.number == fails:
            search.ended(job, "ValueError: it always fails")
            continue
        lines: list[str] = []
        for row in rows_of(job, search.goals):
            lines.append(json.dumps(row) + "\n")
            search.run_folder(job.number, job.seeds[0]).write("validation.jsonl", "".join(lines).encode())
            if search.heard(job, row):
                break
        search.ended(job, None)
    return ran


def search_in(folder: Path, images: int = IMAGES, **change) -> Search:
    return Search(check(Space(**SPACE | change)), RunFolder(str(folder)), images)


def state_of(search: Search) -> list[tuple]:
    """All that the study knows of its trials."""
    return [
        (t.number, t.state, t.params, t.values, t.intermediate_values, t.user_attrs, t.system_attrs)
        for t in search.study.get_trials(deepcopy=False)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Search, list[Job]]:
    search = search_in(tmp_path_factory.mktemp("whole"))
    return search, play(search)


def test_the_default_comes_first_and_is_never_stopped(whole):
    search, ran = whole
    assert ran[0].number == 0
    assert dict(ran[0].values) == search.plan.default
    assert search.trials()[0].state == TrialState.COMPLETE


def test_the_budget_counts_trials_that_ran(whole):
    search, ran = whole
    assert len(search.trials()) == 14
    assert len({job.number for job in ran}) == 14
    assert all(job.values["queue.size"] <= IMAGES / 4 for job in ran)
    refused = [t for t in search.study.trials if "refused" in t.user_attrs]
    assert refused, "no draw broke the constraint: the test says nothing"
    assert {t.user_attrs["refused"] for t in refused} == {"queue.size <= data.size / 4"}


def test_asha_stops_bad_trials_at_evaluated_epochs_and_keeps_good_ones(whole):
    search, _ = whole
    stopped = [t for t in search.trials() if t.state == TrialState.PRUNED]
    assert 4 <= len(stopped) <= 12
    for t in stopped:
        assert t.last_step == t.user_attrs["stopped"] in (2, 4)  # the rungs before the last epoch
        same = [
            o.intermediate_values[t.last_step]
            for o in search.trials()
            if t.last_step in o.intermediate_values
        ]
        assert t.intermediate_values[t.last_step] < max(same)
    best = max(search.trials(), key=lambda t: accuracy(t.user_attrs["values"], 8, 0))
    assert best.state == TrialState.COMPLETE


def test_conditional_options_are_set_only_where_they_are_active(whole):
    _, ran = whole
    assert {"train.warmup_epochs" in job.values for job in ran} == {True, False}
    for job in ran:
        assert ("train.warmup_epochs" in job.values) == (job.values["train.optimizer"] == "lars")


def test_cut_anywhere_the_search_goes_on_to_the_same_end(whole, tmp_path):
    search, _ = whole
    lines = Path(search.folder.path, FILE).read_text().splitlines(keepends=True)
    for cut in range(1, len(lines), 3):
        (tmp_path / str(cut)).mkdir()
        torn = lines[cut][: len(lines[cut]) // 2]
        (tmp_path / str(cut) / FILE).write_text("".join(lines[:cut]) + torn)
        again = search_in(tmp_path / str(cut))
        before = {t.number for t in again.trials() if t.state.is_finished()}
        for t in again.finished():  # what had finished before the kill has its runs in the folder
            rows = rows_of(Job(t.number, t.user_attrs["values"], (0,)), GOALS)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            again.run_folder(t.number, 0).write("validation.jsonl", text.encode())
        ran = play(again)
        assert not before & {job.number for job in ran if not job.confirms}, "a finished trial ran again"
        assert state_of(again) == state_of(search), cut


def test_a_finished_search_has_nothing_left_and_more_trials_go_further(whole, tmp_path):
    search, _ = whole
    again = Search(search.plan, search.folder, IMAGES)
    assert again.next() == DONE
    assert state_of(again) == state_of(search)
    one = search_in(tmp_path, budget={"trials": 3, "epochs": 8})
    play(one)
    further = search_in(tmp_path, budget={"trials": 5, "epochs": 8})
    assert [job.number for job in play(further) if not job.confirms] == [
        t.number for t in further.trials()[3:]
    ]


def test_the_best_and_the_default_run_again_with_another_seed(whole):
    search, ran = whole
    again = [job for job in ran if job.confirms]
    best = [t.number for t in search.finished()[:2]]
    assert [job.number for job in again] == list(dict.fromkeys([*best, 0]))
    assert {job.seeds for job in again} == {(1,)}
    assert ran[-len(again) :] == again, "a confirmation ran before the search was over"


def test_the_winner_is_at_least_as_good_as_the_default_on_the_same_seeds(whole, tmp_path):
    search, _ = whole
    outcome = collect(search)
    assert set(outcome.winner.runs) == set(outcome.default.runs) == {0, 1}
    assert outcome.winner.mean[0] >= outcome.default.mean[0]
    assert outcome.winner.mean[0] == max(t.mean[0] for t in outcome.compared)
    rows = trial_rows(search.plan, outcome)
    assert [row["state"] for row in rows].count("stopped") == 14 - len(search.finished())
    assert sum(row["winner"] for row in rows) == sum(row["default"] for row in rows) == 1


def test_a_failed_trial_is_recorded_and_does_not_end_the_search(tmp_path):
    search, number = search_in(tmp_path), 4
    play(search, fails=number)
    outcome = collect(search)
    failed = [(t.number, t.state, t.reason) for t in outcome.trials if t.reason]
    assert failed == [(number, "failed", "ValueError: it always fails")]
    assert len(outcome.trials) == 14


def test_no_trial_that_finished_is_an_error_with_the_reasons(tmp_path):
    search = search_in(tmp_path, budget={"trials": 1, "epochs": 8})
    play(search, fails=0)
    with pytest.raises(UserError, match="it always fails"):
        collect(search)


def test_two_goals_give_a_front_and_all_trials_run_to_their_end(tmp_path):
    goals = {"goals": ["student.knn20", "student.knn20.few"], "scheduler": {"name": "none"}}
    for sampler in ("tpe", "nsga2"):
        search = search_in(
            tmp_path / sampler, sampler={"name": sampler, "startup": 4, "population": 4}, **goals
        )
        play(search)
        outcome = collect(search)
        assert all(t.state == "finished" for t in outcome.trials)
        assert outcome.front == pareto(outcome.trials)
        assert outcome.winner in outcome.front
        for t in outcome.trials:
            beaten = any((o.mean >= t.mean).all() and (o.mean > t.mean).any() for o in outcome.trials)
            assert beaten != (t in outcome.front)


def test_median_stops_what_lies_below_the_median_of_whole_trials(tmp_path):
    search = search_in(tmp_path, scheduler={"name": "median", "grace": 4, "startup": 3})
    play(search)
    stopped = [t for t in search.trials() if t.state == TrialState.PRUNED]
    assert stopped
    assert all(t.last_step >= 4 for t in stopped)


def test_a_small_space_is_used_up_and_never_tried_twice(tmp_path):
    space = {"train.optimizer": {"choice": ["sgd", "lars"]}, "method.momentum": {"choice": [0.97, 0.99]}}
    plan = check(Space(**SPACE | {"space": space, "constraints": []}))
    search, tried = Search(plan, RunFolder(str(tmp_path))), []
    while (job := search.next()) != DONE:
        tried.append(dict(job.values))
        search.ended(job, "not run")
    assert len(tried) == 4
    assert all(tried.count(values) == 1 for values in tried)


def test_a_constraint_that_nothing_keeps_is_said(tmp_path):
    """Beside the default nothing would be tried: the search must not end in silence."""
    search = search_in(tmp_path, constraints=["method.temperature == 0.1"])
    with pytest.raises(UserError, match=r"200 draws in a row break 'method.temperature == 0.1'"):
        play(search)


def test_what_is_found_is_written(whole, tmp_path):
    import pyarrow.parquet as pq

    from isd_ray.config import parse

    search, _ = whole
    write(search.plan, search, outcome := collect(search))
    table = pq.read_table(Path(search.folder.path, "trials.parquet")).to_pylist()
    assert [row["trial"] for row in table] == [t.number for t in outcome.trials]
    curves = pq.read_table(Path(search.folder.path, "curves.parquet")).to_pylist()
    assert len(curves) == sum(len(c) for t in outcome.trials for c in t.curves.values())
    best = parse(["--config", f"{search.folder.path}/best.yaml"])
    assert best.method.temperature == outcome.winner.values["method.temperature"]
    assert best.train.epochs == 8
    assert best.data.validation is None, "the winner trains on all images"
    assert best.evaluate.enabled
    assert best.train.workers == 1


def test_a_damaged_journal_is_named(tmp_path):
    (tmp_path / FILE).write_text('[{"op_code": 0}]\nnot JSON\n[]\n')
    with pytest.raises(UserError, match=r"journal.jsonl: line 2 is damaged"):
        search_in(tmp_path)

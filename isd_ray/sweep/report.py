"""One page that says what a sweep found; it holds its pictures and needs no network."""

from collections.abc import Iterator

from matplotlib.figure import Figure

from isd_ray.markup import in_html
from isd_ray.page import page, picture, png
from isd_ray.sweep import plots
from isd_ray.sweep.check import Plan
from isd_ray.sweep.live import short
from isd_ray.sweep.results import Outcome, Trial, describe
from isd_ray.train.folder import RunFolder

STYLE = """
tr.winner { background: #fdf0d5 } tr.default td:first-child { font-weight: bold } tr.stopped { color: #888 }
td:last-child, th:last-child { text-align: left }
"""


def write(plan: Plan, folder: RunFolder, name: str, outcome: Outcome) -> None:
    """Write report.html into the sweep's folder."""
    body = [*_head(plan, folder, name, outcome), *_figures(plan, outcome), *_tail(plan, outcome)]
    folder.write("report.html", page(name, body, STYLE))


def _head(plan: Plan, folder: RunFolder, name: str, outcome: Outcome) -> Iterator[str]:
    goals, winner, default = plan.space.goals, outcome.winner, outcome.default
    description = " ".join(plan.space.description.split())
    yield f"<h1>{in_html(name)}</h1><p>{in_html(description)}</p>"
    yield f"<p><b>Best: trial {winner.number}</b>, {describe(winner, goals)}.<br>"
    against = (
        "it is the best" if winner is default else describe(default, goals) if default.runs else "failed"
    )
    yield f"Default (trial 0): {against}.</p>"
    yield f"<p>{_verdict(outcome)}</p>"
    command = in_html(f"python jobs/pretrain.py --config {folder.place('best.yaml')}")
    yield f"<p>Run it on all training images: <code>{command}</code></p>"
    if outcome.front:
        yield f"<p>Pareto front: {', '.join(f'trial {t.number}' for t in outcome.front)}.</p>"
    yield _table(plan, outcome)


def _verdict(outcome: Outcome) -> str:
    """Say whether the difference is more than chance, as far as the seeds can tell."""
    winner, default = outcome.winner, outcome.default
    if winner is default:
        return "No trial was better than the default on the same seeds."
    if min(len(winner.runs), len(default.runs)) < 2:
        return (
            "One seed each: whether the difference is more than chance cannot be said (raise confirm.seeds)."
        )
    gain = winner.mean[0] - default.mean[0]
    error = (
        winner.deviation[0] ** 2 / len(winner.runs) + default.deviation[0] ** 2 / len(default.runs)
    ) ** 0.5
    words = "more than twice" if gain > 2 * error else "less than twice"
    return (
        f"The gain of {gain:.1f} points is {words} its standard error over seeds ({error:.1f}). The winner is the best "
        "of several, so its figure is a little optimistic; the test set has not been looked at."
    )


def _table(plan: Plan, outcome: Outcome) -> str:
    """All trials, best first."""
    names = [d.name for d in plan.dimensions]
    head = ["trial", "state", "epoch", "seeds", *(f"{g} [%]" for g in plan.space.goals), *names, "reason"]
    rows = [
        _row(plan, outcome, t) for t in sorted(outcome.trials, key=lambda t: -(plots.last_value(t) or -1.0))
    ]
    cells = "".join(f"<th>{in_html(h)}</th>" for h in head)
    return f'<div class="scroll"><table><tr>{cells}</tr>{"".join(rows)}</table></div>'


def _row(plan: Plan, outcome: Outcome, trial: Trial) -> str:
    reached = max((curve[-1][0] for curve in trial.curves.values() if curve), default=0)
    name = f"{trial.number}{' (default)' if trial is outcome.default else ''}"
    goals = [_goal(trial, i) for i in range(len(plan.space.goals))]
    values = [short(trial.values.get(d.name)) for d in plan.dimensions]
    cells = [name, trial.state, str(reached), str(len(trial.runs)), *goals, *values, trial.reason or ""]
    kind = "winner" if trial is outcome.winner else trial.state
    return f'<tr class="{kind}">' + "".join(f"<td>{in_html(c)}</td>" for c in cells) + "</tr>"


def _goal(trial: Trial, goal: int) -> str:
    value = plots.last_value(trial, goal)
    if value is None:
        return "-"
    return f"{value:.1f} ± {trial.deviation[goal]:.1f}" if len(trial.runs) > 1 else f"{value:.1f}"


def _figures(plan: Plan, outcome: Outcome) -> Iterator[str]:
    note = "Orange: the winner; black: the default; hollow: stopped early, at the value it had reached."
    if outcome.front:
        yield _picture("Pareto front", plots.front(plan, outcome), note)
    yield _picture("History", plots.history(plan, outcome), f"{note} Line: best finished trial so far.")
    yield _picture("Learning curves", plots.curves(plan, outcome), "Crosses: stopped. Pale: further seeds.")
    if (found := plots.importance(plan, outcome)) is not None:
        caption = f"fANOVA on {found[1]}. With few trials these shares are rough."
        yield _picture("Which options mattered", found[0], caption)
    else:
        yield "<h2>Which options mattered</h2><p>Too few trials to say.</p>"
    yield _picture("One option at a time", plots.slices(plan, outcome), note)
    if (surface := plots.contour(plan, outcome)) is not None:
        caption = f"After epoch {plots.reached_by_all(plan)}, which all trials reach; interpolated. {note}"
        yield _picture("Temperature, momentum and queue size", surface, caption)
    yield _picture("Parallel coordinates", plots.parallel(plan, outcome), "Orange: the winner.")


def _picture(title: str, figure: Figure, caption: str) -> str:
    return picture(title, png(figure), caption)


def _tail(plan: Plan, outcome: Outcome) -> Iterator[str]:
    space = plan.space
    yield "<h2>How it was measured</h2><p>"
    yield f"Up to {space.validation.per_class} labelled training images of a class are held out of pretraining and of "
    yield f"the bank; goals are measured on them every {space.validation.every} epochs, {space.budget.epochs} in all. "
    yield f"Scheduler {space.scheduler.name}, sampler {space.sampler.name} (seed {space.sampler.seed}). The best "
    yield f"{space.confirm.best} and the default ran again, {space.confirm.seeds} times each with another seed. "
    yield "trials.parquet and curves.parquet hold the numbers, space.yaml the space, trials/ every run.</p>"

"""What a study leaves for readers: one page that needs no network, its figures, and the same as Markdown."""

from collections.abc import Iterator
from dataclasses import replace

from matplotlib.figure import Figure

from isd_ray.markup import in_figure
from isd_ray.page import page, png
from isd_ray.study import conditions, plots, sheets, tables
from isd_ray.study.blocks import Block, Bullets, Heading, Picture, Table, Text
from isd_ray.study.pictures import Arrays, read_pictures
from isd_ray.study.results import Outcome
from isd_ray.study.spec import Setting
from isd_ray.study.verdict import limits, verdict
from isd_ray.study.work import cell_folder, shown
from isd_ray.train.folder import RunFolder

STYLE = """
tr.rule td { border-top: 1px solid #ccc } tbody tr:hover { background: #f7f7f2 } td.wrap { white-space: normal }
summary { cursor: pointer } summary h3 { display: inline }
"""
FOLDER = "report"


def write(outcome: Outcome, folder: RunFolder, name: str) -> None:
    """Write report/index.html, report/report.md and the figures as report/*.png into the study's folder."""
    blocks = [Heading(name, 1), *content(outcome, folder)]
    for block in blocks:
        if isinstance(block, Picture):
            folder.write(f"{FOLDER}/{block.file}", block.image)
    text = "\n\n".join(block.markdown() for block in blocks) + "\n"
    folder.write(f"{FOLDER}/report.md", text.encode())
    folder.write(f"{FOLDER}/index.html", page(name, (block.html() for block in blocks), STYLE))


def content(outcome: Outcome, folder: RunFolder) -> Iterator[Block]:
    """Yield the whole report."""
    study = outcome.plan.study
    if study.description:
        yield Text(study.description)
    yield Text(_size(outcome))
    yield Heading("What the numbers say")
    yield Bullets(list(verdict(outcome)))
    yield Heading("What they cannot say", 3)
    yield Bullets(list(limits(outcome)))
    if (failed := conditions.failures(outcome)) is not None:
        yield failed
    for setting in outcome.plan.settings:
        if outcome.of(setting):
            yield from _setting(outcome, setting, folder)
    if outcome.finished:
        yield from _cost(outcome)
    yield from _conditions(outcome)


def _size(outcome: Outcome) -> str:
    study, finished = outcome.plan.study, len(outcome.finished)
    hours = sum(
        cost.get("gpu_hours", cost.get("cpu_hours", 0.0)) for r in outcome.finished if (cost := r.cost())
    )
    fair = {
        "epochs": "Fairness: equal epochs for all methods, so a method with more passes an image got more compute.",
        "passes": f"Fairness: equal forward and backward passes; epochs are scaled to those of {study.baseline}.",
    }[study.fairness]
    return (
        f"{finished} of {len(outcome.runs)} cells are finished ({len(study.methods)} methods, seeds "
        f"{', '.join(map(str, study.seeds))}); {hours:.2f} device hours of training. {fair}"
    )


def _setting(outcome: Outcome, setting: Setting, folder: RunFolder) -> Iterator[Block]:
    """Yield the tables and figures of one setting."""
    study, name = outcome.plan.study, setting.name
    yield Heading(f"{setting.data}, {setting.imbalance}{', balanced control' if setting.control else ''}")
    yield Text(_images(outcome, setting))
    lead = study.metrics[0]
    for metric in study.metrics:
        found = [tables.by_split(outcome, setting, metric), tables.tests(outcome, setting, metric)]
        yield tables.means(outcome, setting, metric)
        for table in [*found, tables.control(outcome, setting, metric)]:
            if table is not None:
                yield replace(table, folded=metric != lead)
    if not setting.control and any(run.per_class(lead) for run in outcome.of(setting)):
        caption = f"{tables.metric_title(lead)}, mean over runs; where there are many classes also over those alike."
        yield _figure(f"{name}-frequency", f"{name}: accuracy over class frequency", caption,
                      plots.frequency(outcome, setting, lead))  # fmt: skip
    caption = f"{tables.metric_title(lead)}, mean and standard deviation over runs."
    yield _figure(f"{name}-groups", f"{name}: groups of classes", caption, plots.bars(outcome, setting, lead))
    curves, caption = plots.curves(outcome, setting, lead)
    yield _figure(f"{name}-curves", f"{name}: learning curves", caption, curves)
    yield from _sheets(outcome, setting, folder)


def _images(outcome: Outcome, setting: Setting) -> str:
    """Say how large the pretraining sets are, and who is in which group."""
    subset = next(run.cell.subset for run in outcome.runs if run.cell.setting == setting)
    facts, plan = outcome.plan.facts[subset], outcome.plan
    usual = plan.frequencies(subset)
    present = [n for n in facts.counts if n]
    groups = [
        f"{group} {len(members)} classes of {min(usual[c] for c in members):,} to {max(usual[c] for c in members):,}"
        for group, members in plan.grouping(subset).items()
    ]
    which = f" (split {subset.split})" if outcome.units(setting) == "split" else ""
    return (
        f"{facts.images:,} pretraining images{which}, {min(present):,} to {max(present):,} a class. Groups by images "
        f"of the unbalanced set: {'; '.join(groups) or 'none, all classes are equally frequent'}."
    )


def _sheets(outcome: Outcome, setting: Setting, folder: RunFolder) -> Iterator[Block]:
    """Yield the pictures of images, from what was drawn beside the cells."""
    drawn: dict[str, Arrays] = {}
    for method in outcome.methods:
        for cell in shown(outcome.plan):
            if (cell.setting, cell.method) == (setting, method):
                classes = len(outcome.plan.facts[cell.subset].names)
                arrays = read_pictures(cell_folder(folder, cell), outcome.plan.study.pictures, classes)
                drawn |= {} if arrays is None else {method: arrays}
                subset = cell.subset
    if not drawn:
        return
    name, counts = setting.name, outcome.plan.frequencies(subset)
    names = list(map(in_figure, outcome.plan.facts[subset].names))
    of = f"First seed{f', split {subset.split}' if outcome.units(setting) == 'split' else ''}."
    wanted = outcome.plan.study.pictures
    yield _figure(
        f"{name}-neighbours", f"{name}: nearest neighbours of rare classes",
        f"Left: test images of the rarest classes (pretraining images in brackets). Right: the nearest by the "
        f"student's backbone among at most {wanted.bank:,} labelled images; green: of the same class. {of}",
        sheets.neighbour_sheet(drawn, names, counts),
    )  # fmt: skip
    yield _figure(
        f"{name}-map", f"{name}: map of the embeddings",
        f"At most {wanted.sample:,} test images by the student's backbone, {wanted.map}. Above: classes (pretraining "
        f"images in brackets); below: how frequent the class is in pretraining. {of}",
        sheets.map_sheet(drawn, names, counts),
    )  # fmt: skip
    if (anchors := sheets.anchor_sheet(drawn, names, counts)) is not None:
        yield _figure(
            f"{name}-anchors", f"{name}: the teacher's top anchors",
            "Left: the same queries. Right: the anchors in the queue that the teacher finds most alike, with their "
            f"probability at its temperature t; green: of the same class, which no method was told. {of}",
            anchors,
        )  # fmt: skip


def _cost(outcome: Outcome) -> Iterator[Block]:
    yield Heading("Cost")
    yield conditions.costs(outcome)
    lead = outcome.plan.study.metrics[0]
    if (figure := plots.cost(outcome, lead)) is not None:
        caption = f"{tables.metric_title(lead)} over what training took, mean over runs."
        yield _figure("cost", "Accuracy over cost", caption, figure)


def _conditions(outcome: Outcome) -> Iterator[Block]:
    yield Heading("How it was compared")
    yield from conditions.option_tables(outcome)
    if outcome.finished:
        yield _protocol(outcome)
    yield Text(
        "results.parquet holds every number, a row a cell, network, metric and group; cells/ holds every run, whose "
        "config.yaml repeats it with jobs/pretrain.py --config; study.yaml is the study."
    )


def _protocol(outcome: Outcome) -> Table:
    """How the metrics are measured, as each result has it."""
    protocol = (outcome.finished[0].result or {})["protocol"]
    names = dict.fromkeys(metric.split(".")[1] for metric in outcome.plan.study.metrics)
    rows = [
        [name, ", ".join(f"{k} {v}" for k, v in protocol[name].items())]
        for name in [*names, "bank", "test", "features"]
        if name in protocol
    ]
    note = "Last epoch. Of the first cell; the seed of ties is that of the run."
    return Table("Protocol", ["what", "how"], rows, note, texts=2)


def _figure(file: str, title: str, caption: str, figure: Figure) -> Picture:
    return Picture(f"{file}.png", title, caption, png(figure))

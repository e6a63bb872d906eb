"""All that is wrong with a study, also with its data, said at once and before anything runs."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from isd_ray.config import Config, flatten, merge, option_names, resolve
from isd_ray.data.imbalance import SCHEMES
from isd_ray.errors import LONGEST, UserError, harmless, nearest, shown
from isd_ray.evaluate.names import examples, name_faults
from isd_ray.evaluate.names import parse as parse_name
from isd_ray.names import name_fault
from isd_ray.room import share_fault
from isd_ray.sections import RETIRED
from isd_ray.study.faults import Faults, parse
from isd_ray.study.spec import (
    Cell,
    Setting,
    Study,
    Subset,
    cells,
    data_layers,
    data_options,
    method_options,
    settings,
)
from isd_ray.study.subsets import Facts, look_at
from isd_ray.train.cost import cost
from isd_ray.train.learnable import check_learnable

OWN = {  # options that the study itself sets, and where the file says it
    "name": "--name", "output": "--output", "train.seed": "seeds", "data.dataset": "data", "data.scheme": "imbalances",
    "data.ratio": "imbalances", "data.class_order": "imbalances", "data.subset_seed": "imbalances: splits",
    "data.scheme_options": "imbalances: options", "train.threads": "resources.cpus",
    "train.gpus_per_worker": "resources.gpus", "method.name": "methods", "evaluate.enabled": "metrics",
}  # fmt: skip
NETWORKS = ("student", "teacher")
MOST_CELLS = 10_000
UNCONTROLLED = ("natural", "none", "list", "balanced")  # schemes without a balanced set of the same size
PASSES = ("student_forward", "teacher_forward", "backward")


@dataclass(frozen=True)
class Plan:
    """A study that was found good. facts: of every subset; epochs: of every method; given: the command line's options.

    passes: forward and backward passes an image of every method, where `fairness` asks for equal ones.
    """

    study: Study
    given: dict[str, Any]
    facts: dict[Subset, Facts]
    epochs: dict[str, int]
    passes: dict[str, float] = field(default_factory=dict)

    @property
    def cells(self) -> list[Cell]:
        """All cells, those of the first seeds first."""
        return cells(self.study)

    @property
    def settings(self) -> list[Setting]:
        """All settings in the order of the file."""
        return settings(self.study)

    def config(self, cell: Cell, output: str = "runs", gpus: float = 0.0) -> Config:
        """Return the resolved configuration of a cell's run; `jobs/pretrain.py --config` repeats it.

        gpus: of a cell, or of each of its workers; 0: on CPU.
        """
        own: dict[str, Any] = {
            "name": cell.name,
            "output": output,
            "train.threads": self.study.resources.cpus,
            "train.device": "cuda" if gpus else "cpu",
        }
        if gpus:
            own["train.gpus_per_worker"] = gpus
        if cell.method in self.epochs:
            own["train.epochs"] = self.epochs[cell.method]
        return resolve(merge(cell_options(self.study, cell, self.given), own))

    def written(self) -> dict[str, Any]:
        """Return the study's file with the command line's options in it, as it is kept beside the results."""
        common = flatten(self.given)
        data = {
            name: flatten(merge(options)) | {k: v for k, v in common.items() if k in flatten(merge(options))}
            for name, options in self.study.data.items()
        }
        return self.study.model_dump() | {
            "config": flatten(merge(self.study.config, self.given)),
            "data": data,
        }

    def grouping(self, subset: Subset) -> dict[str, list[int]]:
        """Return the groups of classes, by name; those of a balanced control are its unbalanced set's."""
        return self.facts[_unbalanced(subset)].groups

    def frequencies(self, subset: Subset) -> list[int]:
        """Return the pretraining images of each class in the unbalanced set of the setting: [C]."""
        return self.facts[_unbalanced(subset)].counts


def cell_options(study: Study, cell: Cell, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a cell's run but for those that depend on where it runs."""
    floors = {"evaluate.baselines": cell.method == next(iter(study.methods))}  # alike for all: measured once
    layers = data_layers(study, cell.setting, given)
    own = {"train.seed": cell.seed}
    return merge(floors, layers, data_options(study, cell.subset), method_options(study, cell.method), own)


def check(content: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> Plan:
    """Return the plan of a study; `given` are options from the command line, which win over the file's.

    Opens the data sets' index tables (it makes their shards where they are not there yet). Raises UserError that lists
    every fault.
    """
    faults, given = Faults(), merge(given or {})
    study = parse(content, faults)
    if fault := _size_fault(study):
        faults.add(fault)
        faults.raise_if_any()
    for of in (_name_faults, _metric_faults, _imbalance_faults):
        for text in of(study):
            faults.add(text)
    for text in _option_faults(study, given):
        faults.add(text)
    if share := share_fault(study.resources.gpus):
        faults.add(share)
    configs = _configs(study, given, faults)
    facts = look_at(study, configs, faults)
    faults.raise_if_any()
    epochs, passes = _fair_epochs(study, configs)
    return Plan(study, given, facts, epochs, passes)


def _unbalanced(subset: Subset) -> Subset:
    setting = subset.setting
    return Subset(Setting(setting.data, setting.imbalance), subset.split)


def _size_fault(study: Study) -> str | None:
    """Say that there are too many cells even to look at."""
    runs = len(study.methods) * len(study.seeds)
    splits = [1 if i.splits == "seeds" else len(i.splits) for i in study.imbalances.values()]
    found = 2 * runs * len(study.data) * sum(splits)
    return f"up to {found:,} cells; at most {MOST_CELLS:,} are taken" if found > MOST_CELLS else None


def _name_faults(study: Study) -> Iterator[str]:
    splits = {f"imbalances.{name}: splits": i.splits for name, i in study.imbalances.items()}
    for part in ("methods", "data", "imbalances"):
        names = getattr(study, part)
        if not names:
            yield f"{part}: nothing stands there; name at least one"
        yield from _part_faults(part, names)
    for place, named in splits.items():
        if named != "seeds":
            yield from _part_faults(place, [split for split in named if isinstance(split, str)])
    folders = Counter(cell.name for cell in cells(study))
    for name, cases in folders.items():
        if cases > 1:
            remedy = "give seeds and splits once, and names that differ"
            yield f"two cells would be called {shown(name)}: {remedy}"
        elif fault := name_fault(name) if len(name) > LONGEST else None:
            yield f"cell {shown(name)}: {fault}; choose shorter names"
    if study.baseline not in study.methods:
        hint = nearest(study.baseline, study.methods)
        yield f"baseline: there is no method {shown(study.baseline)}.{hint}"


def _part_faults(place: str, names: Iterable[str]) -> Iterator[str]:
    """Say which of these cannot be parts of the names of folders, and of lines in a plot."""
    for name in names:
        if fault := name_fault(name):
            yield f"{harmless(place)}: {shown(name)}: {fault}"
        elif not name[0].isalnum():
            yield f"{place}: {shown(name)}: a letter or digit begins it"


def _option_faults(study: Study, given: Mapping[str, Any]) -> Iterator[str]:
    """Misspelt options, those that the study sets itself, and those that would make the comparison unfair."""
    names = option_names()
    places = {"config": study.config, "command line": given}
    places |= {f"data.{name}": options for name, options in study.data.items()}
    places |= {f"methods.{name}": options for name, options in study.methods.items()}
    common = flatten(merge(given))
    for whole, options in places.items():
        part, place = whole.split(".")[0], harmless(whole)
        for name in _names_of(place, options):
            if name not in (*names, *RETIRED):
                yield f"{place}: unknown option {shown(name)}.{nearest(name, names)}"
            elif name in OWN and (part, name) not in (("data", "data.dataset"), ("methods", "method.name")):
                yield f"{place}: {name}: the study sets it; use {OWN[name]}"
            elif part == "methods" and name.startswith(("data.", "evaluate.")):
                yield f"{place}: {name}: all methods see the same data and are measured alike; set it under config"
            elif part == "methods" and name in common:
                yield f"command line: --{name}: {place} sets it too; change the file"
            elif part == "methods" and name == "train.epochs" and study.fairness == "passes":
                yield f"{place}: {name}: fairness: passes sets it from the method's cost; leave it out"


def _names_of(place: str, options: Mapping[str, Any]) -> list[str]:
    """Return the options of a part by name; raises UserError where it cannot be read at all."""
    try:
        return list(flatten(merge(options)))
    except UserError as error:
        raise UserError(f"study: {place}: {error}") from None


def _metric_faults(study: Study) -> Iterator[str]:
    known = [f"{network}.{metric}" for network in NETWORKS for metric in examples()]
    for metric in study.metrics:
        network, _, name = metric.partition(".")
        if network not in NETWORKS:
            hint = nearest(metric, known)
            wanted = f"network.metric with network one of {', '.join(NETWORKS)}"
            yield f"metrics: {shown(metric)} is not {wanted}.{hint}"
            continue
        try:
            parse_name(name)
        except UserError as error:
            yield f"metrics: {harmless(metric)}: {error}"
        if study.metrics.count(metric) > 1:
            yield f"metrics: {shown(metric)} stands there twice"


def _imbalance_faults(study: Study) -> Iterator[str]:
    for name, imbalance in study.imbalances.items():
        place = f"imbalances.{harmless(name)}"
        if imbalance.scheme not in (*SCHEMES, "none"):
            hint = nearest(imbalance.scheme, SCHEMES)
            yield f"{place}: unknown scheme {shown(imbalance.scheme)}.{hint}"
        elif imbalance.control and imbalance.scheme in UNCONTROLLED:
            yield f"{place}: control: '{imbalance.scheme}' has no balanced control; leave it out"
        if not imbalance.splits:
            yield f"{place}: splits: none is left; leave it out for one"


def _configs(study: Study, given: dict[str, Any], faults: Faults) -> dict[Cell, Config]:
    """Resolve one run of every method on every subset; what cannot be resolved is noted."""
    configs, seen = {}, set()
    for cell in cells(study):
        if (cell.subset, cell.method) in seen:
            continue
        seen.add((cell.subset, cell.method))
        try:
            config = resolve(cell_options(study, cell, given))
            check_learnable(config)
            configs[cell] = config
        except UserError as error:
            place = f"methods.{harmless(cell.method)}"
            if not any(f"{place}: " in text for text in faults.lines()):  # else it is named already
                faults.add(str(error), place)
    for config in configs.values():
        for metric in study.metrics:
            name = metric.partition(".")[2]
            if not name_faults([name]) and name not in config.evaluate.protocols:
                chosen = ", ".join(config.evaluate.protocols)
                faults.add(f"metrics: '{metric}' is none of evaluate.protocols ({chosen})")
    return configs


def _fair_epochs(study: Study, configs: Mapping[Cell, Config]) -> tuple[dict[str, int], dict[str, float]]:
    """Return the epochs of every method for equal passes, and passes an image; nothing for equal epochs."""
    if study.fairness == "epochs":
        return {}, {}
    first: dict[str, Config] = {}
    for cell, config in configs.items():
        first.setdefault(cell.method, config)
    passes = {method: sum(cost(first[method])[p] for p in PASSES) for method in study.methods}
    whole = first[study.baseline].train.epochs * passes[study.baseline]
    return {method: max(1, round(whole / passes[method])) for method in passes}, passes

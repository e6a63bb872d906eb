"""A study as people write it: one YAML file that says what is compared, on what, how often, and how fairly.

    methods: {isd: {}, moco_v2: {}, isd_hot: {method.name: isd, method.temperature: 0.2}}
    data: {cifar10: {data.root: DATA}}                        # or --data.root on the command line
    imbalances:
      exp100: {scheme: exponential, ratio: 100, control: true}     # also balanced, with as many images in all
      d: {scheme: isd_8_30, splits: [D1, D2]}
    seeds: [0, 1, 2]
    baseline: moco_v2
    metrics: [student.knn20, student.linear]
    fairness: epochs
    config: {train.epochs: 40}                                # any option, of every run

`isd_ray.study.check` says all that is wrong with one; docs/design.md (Studies) has the whole of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from isd_ray.evaluate.names import DEFAULT, name_faults
from isd_ray.layers import flatten, merge
from isd_ray.sections import IMAGES, PROCESSES, SEED, THREADS, Section

SPLIT = "{split}"  # in an option's text: the name of the split


class Thresholds(Section):
    """many: more than `many` pretraining images; few: fewer than `few`; medium between."""

    many: int = Field(100, ge=1, le=IMAGES)
    few: int = Field(20, ge=1, le=IMAGES)


class Imbalance(Section):
    """One way to choose the pretraining images."""

    scheme: str = Field(description="natural, exponential, step, pareto, large_small, isd_8_30, list, ...")
    ratio: float | None = Field(None, gt=0, description="Largest class over smallest")
    class_order: Literal["label", "random"] | None = Field(None, description="Which classes are large")
    options: dict[str, Any] = Field(
        {}, description="Further arguments of the scheme; {split} in a text stands for the split's name"
    )
    splits: list[int | str] | Literal["seeds"] = Field(
        [0],
        description="Seeds of the choice of images, or names of published splits; seeds: each run draws its own",
    )
    control: bool = Field(False, description="Also a balanced set of as many images in all")
    groups: Literal["auto", "thirds", "large_small"] | Thresholds = Field(
        "auto",
        description="Of classes. auto: large_small for schemes of two sizes, else the data set's own rule",
    )


class Resources(Section):
    """What a cell takes. With train.workers > 0 they are those of each worker."""

    cpus: int = Field(1, ge=1, le=THREADS, description="CPUs, and torch threads")
    gpus: float | None = Field(
        None,
        ge=0,
        le=THREADS,
        description="GPUs, also a fraction; none: 1 where the cluster has any",
    )
    concurrent: int | None = Field(
        None,
        ge=1,
        le=PROCESSES,
        description="Cells at once; none: as many as fit",
    )
    retries: int = Field(
        0,
        ge=0,
        le=1000,
        description="New starts, from its checkpoint, of a cell whose process died",
    )


class Pictures(Section):
    """What is shown of the first seed and split of every method: neighbours, a map, the teacher's anchors."""

    enabled: bool = True
    queries: int = Field(5, ge=1, le=100, description="Test images, of the rarest classes")
    neighbours: int = Field(8, ge=1, le=100, description="Nearest labelled images of each")
    anchors: int = Field(8, ge=1, le=100, description="The teacher's likeliest anchors of each")
    bank: int = Field(
        5000,
        ge=1,
        le=10**6,
        description="Labelled images that neighbours are looked for in",
    )
    sample: int = Field(1000, ge=5, le=10**5, description="Test images on the map")
    map: Literal["tsne", "pca"] = "tsne"


class Study(Section):
    """One comparison; see the module's docstring."""

    description: str = ""
    config: dict[str, Any] = Field({}, description="Options of every run")
    methods: dict[str, dict[str, Any]] = Field(
        description="What is compared: a name and its options; {} for the method of that name"
    )
    data: dict[str, dict[str, Any]] = Field(description="A name and its options; {} for the set of that name")
    imbalances: dict[str, Imbalance]
    seeds: list[Annotated[int, Field(ge=0, le=SEED)]] = Field(
        [0], min_length=1, description="Of weights, order and views"
    )
    baseline: str = Field(description="The method that the others are tested against")
    metrics: list[str] = Field(["student.knn20"], min_length=1, description="network.metric; the first leads")
    fairness: Literal["epochs", "passes"] = Field(
        "epochs",
        description="Equal epochs, or as many forward and backward passes as the baseline has: epochs scaled",
    )
    resources: Resources = Resources()
    pictures: Pictures = Pictures()


@dataclass(frozen=True, order=True)
class Setting:
    """Where methods meet: a data set and a way to choose its images. control: balanced, of the same size."""

    data: str
    imbalance: str
    control: bool = False

    @property
    def name(self) -> str:
        return f"{self.data}-{self.imbalance}{'-balanced' if self.control else ''}"


@dataclass(frozen=True)
class Subset:
    """The images of one pretraining: a setting and a split of it."""

    setting: Setting
    split: int | str

    @property
    def name(self) -> str:
        return f"{self.setting.name}-{self.split}"


@dataclass(frozen=True)
class Cell:
    """One run: a method on a subset with a seed."""

    subset: Subset
    method: str
    seed: int

    @property
    def setting(self) -> Setting:
        return self.subset.setting

    @property
    def name(self) -> str:
        """Of the run's folder, e.g. cifar10-exp100-0-isd-seed1."""
        return f"{self.subset.name}-{self.method}-seed{self.seed}"


def settings(study: Study) -> list[Setting]:
    """Return the settings in the order of the file, a control after what it belongs to."""
    return [
        Setting(data, name, control)
        for data in study.data
        for name, imbalance in study.imbalances.items()
        for control in ((False, True) if imbalance.control else (False,))
    ]


def cells(study: Study) -> list[Cell]:
    """Return all cells; those of the first seeds come first, so that a part of a study already compares."""
    found = []
    for seed in study.seeds:
        for setting in settings(study):
            splits = study.imbalances[setting.imbalance].splits
            for split in [seed] if splits == "seeds" else splits:
                found += [Cell(Subset(setting, split), method, seed) for method in study.methods]
    return found


def data_options(study: Study, subset: Subset) -> dict[str, Any]:
    """Return the options that choose the pretraining images."""
    setting, split = subset.setting, subset.split
    imbalance = study.imbalances[setting.imbalance]
    options = {
        k: v.replace(SPLIT, str(split)) if isinstance(v, str) else v for k, v in imbalance.options.items()
    }
    placed = any(isinstance(v, str) and SPLIT in v for v in imbalance.options.values())
    if isinstance(split, str) and not placed:
        options["split"] = split
    scheme = imbalance.scheme
    if setting.control:
        scheme, options = "balanced", {"of": scheme, **options}
    return {
        "data.scheme": scheme,
        "data.ratio": imbalance.ratio,
        "data.class_order": imbalance.class_order,
        "data.subset_seed": split if isinstance(split, int) else 0,
        "data.scheme_options": options,
    }


def data_layers(study: Study, setting: Setting, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of every run on a data set: the file's, then the command line's."""
    named = {"data.dataset": setting.data} if _names_itself(study, setting) else {}
    asked = [metric.partition(".")[2] for metric in study.metrics]
    own = {
        "train.workers": 0,
        "evaluate.keep_features": False,  # of many cells they would fill a disk
        "evaluate.protocols": list(dict.fromkeys([*DEFAULT, *(n for n in asked if not name_faults([n]))])),
    }
    return merge(own, study.config, named, study.data[setting.data], given)


def method_options(study: Study, method: str) -> dict[str, Any]:
    """Return the options of a method: by its name where the file does not say another."""
    return merge({"method.name": method}, study.methods[method])


def _names_itself(study: Study, setting: Setting) -> bool:
    return "data.dataset" not in flatten(merge(study.data[setting.data]))

"""One typed configuration for every job, from layers of defaults, a YAML file and the command line.

Layers, later ones win: field defaults, the method's published defaults, the data set's defaults (its own and
those for the chosen method), the YAML file (`--config`), the command line (`--train.epochs 20`). Every unknown
name, and then every wrong value, is reported at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from isd_ray.errors import UserError, nearest

Layer = Mapping[str, Any]
MAPPINGS = ("data.scheme_options",)  # options whose value is itself a mapping
# Options that a method has only if its published defaults name them; the method's own name is none of them.
OF_METHODS = ("method.", "queue.exclude_own")


class Section(BaseModel):
    """A group of options; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class DataConfig(Section):
    """Which images, and how they reach the model."""

    dataset: str = Field("embedded_lt", description="Name of a definition in datasets/")
    root: str | None = Field(
        None, description="Folder of the raw data set (Parquet files, image folders, torchvision)"
    )
    shards: str | None = Field(
        None, description="Folder or URI of WebDataset shards made by jobs/make_shards.py"
    )
    download: bool = Field(False, description="Let torchvision download the raw data set into --data.root")
    scheme: str | None = Field(
        None, description="Imbalance: none, exponential, step, pareto, ... (default: the data set's)"
    )
    ratio: float | None = Field(None, gt=0, description="Imbalance ratio, largest class over smallest")
    subset_seed: int = Field(0, ge=0, description="Seed of the imbalanced selection")
    class_order: Literal["label", "random"] | None = Field(
        None, description="Which classes are large: label order or drawn"
    )
    scheme_options: dict[str, Any] = Field(
        {},
        description='Further arguments of the scheme: {"split": "D3"}, {"files": "list.txt"}, {"n_max": 500}',
    )
    validation: int | None = Field(
        None,
        ge=1,
        description="Labelled training images of a class (at most half of them) that are kept out of pretraining and "
        "bank; the run is then evaluated on them, and the test set stays unseen",
    )
    image_size: int = Field(32, ge=8, le=1024, description="Side of a view [pixels]")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="Mean of the channels, on a 0..1 scale")
    std: list[float] = Field([0.229, 0.224, 0.225], description="Deviation of the channels")
    cache: Literal["auto", "memory", "none"] = Field(
        "auto", description="Keep decoded images in memory, stream them, or choose by size"
    )
    max_bad: float = Field(
        0.01, ge=0, le=1, description="Largest share of broken images before the run stops"
    )

    @field_validator("scheme_options", mode="after")
    @classmethod
    def _read_values(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Read `n_max=500` from the command line as a number."""
        return {name: yaml.safe_load(v) if isinstance(v, str) else v for name, v in options.items()}


class ModelConfig(Section):
    """The backbone."""

    backbone: str = Field("resnet18", description="resnet8/14/20/32 (small), resnet18/34/50, or timm:NAME")
    stem: Literal["auto", "cifar", "imagenet", "stride2"] = Field(
        "auto",
        description="First layers: cifar or imagenet (resnet18/34/50), cifar or stride2 (resnet8/14/20/32)",
    )


class MethodConfig(Section):
    """The self-supervised method. None: the method's published value, or that it has no such option."""

    name: str = Field(
        "isd",
        description="isd, isd_r18, isd_plus, moco_v1, moco_v2, simclr, byol, byol_asym, simsiam, ressl, sce, co2, msf, "
        "debiased, nnclr, barlow_twins, vicreg, swav or dino",
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="Temperature of the (student's) similarities; not byol*, simsiam, msf, barlow_twins, vicreg",
    )
    temperature_teacher: float | None = Field(
        None, gt=0, description="Temperature of the teacher's similarities (isd*, ressl, sce, dino)"
    )
    temperature_consistency: float | None = Field(
        None, gt=0, description="Temperature of both sides of the consistency term (co2)"
    )
    weight: float | None = Field(
        None,
        ge=0,
        description="Share of the positive in the target (sce); factor of the consistency term (co2), of the terms off "
        "the diagonal (barlow_twins)",
    )
    weight_invariance: float | None = Field(None, ge=0, description="Factor of the views' distance (vicreg)")
    weight_variance: float | None = Field(None, ge=0, description="Factor of the variance term (vicreg)")
    weight_covariance: float | None = Field(None, ge=0, description="Factor of the covariance term (vicreg)")
    prototypes: int | None = Field(None, ge=2, description="Prototypes, stand-ins for clusters (swav, dino)")
    freeze: int | None = Field(
        None, ge=0, description="First steps with prototypes as they were (swav, dino)"
    )
    epsilon: float | None = Field(None, gt=0, description="Sharpness of the codes, small is sharp (swav)")
    queue_start: int | None = Field(
        None, ge=0, description="Step from which the queue takes part in the codes (swav)"
    )
    centre: float | None = Field(None, ge=0, le=1, description="Momentum of the teacher's centre (dino)")
    class_prior: float | None = Field(
        None, ge=0, lt=1, description="Chance that two images are of one class (debiased)"
    )
    neighbours: int | None = Field(
        None, ge=1, description="Nearest anchors that are pulled to, the key itself included (msf)"
    )
    symmetric: bool | None = Field(
        None, description="Also with the views swapped, at twice the cost (moco_v1, moco_v2)"
    )
    momentum: float | None = Field(
        None, ge=0, le=1, description="EMA momentum of the teacher, where there is one"
    )
    momentum_schedule: Literal["constant", "cosine"] | None = Field(
        None, description="cosine: momentum grows to 1 over the run"
    )
    views: list[str] = Field(
        ["strong", "strong"], description="View recipe of the student and of the teacher"
    )


class QueueConfig(Section):
    """The queue of anchors. Methods without one ignore it."""

    size: int = Field(4096, ge=1, description="Anchors in the queue, over all workers")
    layout: Literal["replicated", "sharded"] = Field(
        "replicated", description="Every worker holds all anchors, or its share of them"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Stored precision of anchors"
    )
    exclude_own: bool | None = Field(
        None, description="Mask anchors that come from the query's own image; not msf"
    )
    init: Literal["empty", "unit", "isd_v1"] = Field("empty", description="Anchors before the first step")


class TrainConfig(Section):
    """Optimisation and workers."""

    epochs: int = Field(200, ge=1, description="Passes over the training set")
    batch_size: int = Field(256, ge=2, description="Global batch: images a step over all workers")
    accumulate: int = Field(
        1, ge=1, description="Split a worker's batch into this many forward passes a step"
    )
    optimizer: Literal["sgd", "lars", "adamw"] = Field("sgd", description="Optimiser")
    lr: float = Field(0.05, gt=0, description="Peak learning rate at this global batch (it is not rescaled)")
    sgd_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD and LARS")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay")
    decay_norm_and_bias: bool = Field(True, description="Decay biases and norm parameters too (as ISD does)")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="Learning-rate schedule")
    milestones: list[float] = Field(
        [0.7, 0.9], description="Step schedule: drops at these fractions of the run"
    )
    gamma: float = Field(0.2, gt=0, le=1, description="Step schedule: factor of each drop")
    warmup_epochs: float = Field(0.0, ge=0, description="Epochs of linear warm-up from zero")
    workers: int = Field(1, ge=0, description="Ray Train workers; 0 trains inside this process")
    threads: int = Field(0, ge=0, description="Torch threads a CPU worker; 0: its share of all cores but one")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: CUDA where the cluster has GPUs"
    )
    gpus_per_worker: float = Field(1.0, gt=0, description="GPUs a worker takes when it runs on CUDA")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on CUDA"
    )
    compile: bool = Field(False, description="torch.compile the networks")
    sync_batch_norm: bool = Field(False, description="One BatchNorm over all workers (CUDA only)")
    seed: int = Field(0, ge=0, description="Seed of weights, order and views")
    deterministic: bool = Field(
        True, description="Deterministic algorithms: a repeated run is bit-equal on CPU"
    )
    log_every: int = Field(10, ge=1, description="Steps between two lines of metrics")
    loggers: list[Literal["wandb", "mlflow"]] = Field(
        [], description="Send metrics there too (extra: loggers)"
    )
    checkpoint_seconds: float = Field(
        60.0, ge=0, description="At least this many seconds between checkpoints"
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept")
    max_failures: int = Field(0, ge=-1, description="Restarts after a worker died; -1 for no limit")


class EvaluateConfig(Section):
    """Evaluation of the frozen features after training."""

    enabled: bool = Field(True, description="Evaluate at the end of the run")
    every: int = Field(
        0, ge=0, description="Epochs between kNN evaluations on the way, on --data.validation; 0: none"
    )
    linear: bool = Field(True, description="Also train the linear classifier")
    bank: Literal["auto", "balanced", "train"] = Field(
        "auto", description="Labelled bank of kNN: the balanced set, or the pretraining subset"
    )
    baselines: bool = Field(True, description="Also evaluate the untrained backbone and raw pixels")
    batch_size: int = Field(256, ge=1, description="Images a forward pass")


class Config(BaseSettings):
    """Everything a run needs; saved as config.yaml beside the results, and read back by --config."""

    model_config = SettingsConfigDict(extra="forbid", cli_avoid_json=True, cli_hide_none_type=True)

    name: str | None = Field(
        None, description="Name of the run (default: method, data set and a hash of the options)"
    )
    output: str = Field("runs", description="Folder or URI that holds the runs")
    address: str | None = Field(
        None, description="Address of a running Ray cluster (default: RAY_ADDRESS, else local)"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    queue: QueueConfig = QueueConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, **_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """Take values from the caller alone: stray environment variables must not change a run."""
        return (init_settings,)


class _CommandLine(Config):
    """Pretrain a backbone on unlabelled images with ISD on Ray, and evaluate it.

    Without options the embedded data set is used. Options given here win over the file of --config, that over the
    defaults of the data set (datasets/NAME.yaml), those over the method's. A run that was stopped continues when the
    same command is given again.
    """

    config: str | None = Field(None, description="YAML file to start from; the command line wins over it")


def parse(arguments: Sequence[str], program: str = "pretrain") -> Config:
    """Read the command line (and the YAML file it names) into a resolved configuration.

    Raises UserError that lists every unknown name and wrong value; `--help` prints all options and exits.
    """
    given = read_options(arguments, program)
    path = given.pop("config", None)
    return resolve(read_yaml(path) if path else {}, given)


def read_options(arguments: Sequence[str], program: str) -> dict[str, Any]:
    """Read the command line alone: what it says, with no defaults. Raises UserError as `parse` does."""
    _refuse_unknown_flags(arguments)
    try:
        source = CliSettingsSource[Any](
            _CommandLine, cli_parse_args=list(arguments), cli_prog_name=program, cli_exit_on_error=False
        )
        return dict(source())
    except SettingsError as error:
        reason = str(error).removeprefix("error parsing CLI: ")
        raise UserError(f"command line: {reason}; --help lists the options") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options, nested or with dotted names."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}; give the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict | None):
        raise UserError(f"config file {path}: expected 'name: value' lines, found {type(content).__name__}")
    return content or {}


def resolve(*layers: Layer) -> Config:
    """Merge the layers over the defaults of the method and the data set that they choose."""
    from isd_ray.data.catalog import load_definition
    from isd_ray.methods import find_method

    given = merge(*layers)
    _refuse_unknown_keys(given)
    definition = load_definition(validate(_only(given, "data.dataset")).data.dataset)
    name = validate(_only(merge(definition.defaults, given), "method.name")).method.name
    method = find_method(name).defaults
    own = {o: v for o, v in flatten(given).items() if v is not None or not _of_methods(o)}
    _refuse_options_of_others(name, own)
    images = {f"data.{name}": getattr(definition, name) for name in ("image_size", "mean", "std")}
    chosen = flatten(merge(definition.defaults, definition.methods.get(name, {})))
    dataset = {o: v for o, v in chosen.items() if o in method or not _of_methods(o)}
    return validate(merge(method, images, dataset, own))


def validate(values: Layer) -> Config:
    """Build the configuration; raises UserError that lists every wrong value."""
    try:
        return Config(**values)
    except ValidationError as error:
        lines = [f"--{'.'.join(map(str, e['loc']))} {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise UserError("; ".join(lines)) from None


def merge(*layers: Layer) -> dict[str, Any]:
    """Merge nested mappings, later ones win; dotted names are unfolded first."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in _unfold(layer).items():
            below = merged.get(name)
            merged[name] = (
                merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
            )
    return merged


def option_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return the dotted name of every option."""
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += option_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def flatten(values: Layer, prefix: str = "") -> dict[str, Any]:
    """Return the nested mapping as {dotted name: value}; an option whose value is a mapping keeps it whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        whole = not isinstance(value, Mapping) or prefix + name in MAPPINGS
        flat |= {prefix + name: value} if whole else flatten(value, f"{prefix}{name}.")
    return flat


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _unfold(layer: Layer) -> dict[str, Any]:
    """Turn {'train.lr': 1} into {'train': {'lr': 1}}, at every depth."""
    unfolded: dict[str, Any] = {}
    for name, value in layer.items():
        head, _, rest = str(name).partition(".")
        if rest:
            value = _unfold({rest: value})
        elif isinstance(value, Mapping):
            value = _unfold(value)
        below = unfolded.get(head)
        unfolded[head] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return unfolded


def _only(given: Layer, name: str) -> dict[str, Any]:
    """Keep one option, which chooses a layer of defaults."""
    flat = flatten(given)
    return _unfold({name: flat[name]}) if name in flat else {}


def _refuse_unknown_keys(given: Layer) -> None:
    names = option_names()
    wrong = [
        f"unknown option '{name}'.{nearest(name, names)}" for name in flatten(given) if name not in names
    ]
    if wrong:
        raise UserError("; ".join(wrong) + " --help lists the options")


def _of_methods(option: str) -> bool:
    return option.startswith(OF_METHODS) and option != "method.name"


def _refuse_options_of_others(name: str, given: Layer) -> None:
    """Refuse what the user set and the method does not have; say which methods do."""
    from isd_ray.methods import METHODS

    wrong = []
    for option in given:
        if _of_methods(option) and option not in METHODS[name].defaults:
            owners = ", ".join(other for other, method in METHODS.items() if option in method.defaults)
            wrong.append(f"--{option}: method '{name}' has no such option; these have it: {owners}")
    if wrong:
        raise UserError("; ".join(wrong))


def _refuse_unknown_flags(arguments: Sequence[str]) -> None:
    names = [*option_names(_CommandLine), "help"]
    flags = [a[2:].split("=")[0] for a in arguments if a.startswith("--") and len(a) > 2]
    wrong = [f"unknown option '--{flag}'.{nearest(flag, names)}" for flag in flags if flag not in names]
    if wrong:
        raise UserError("; ".join(wrong) + " --help lists the options")

"""The groups of options that every run has: names, ranges, defaults and what they mean."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from isd_ray.evaluate.names import ALONG, CHEAP, DEFAULT, FORMS, name_faults
from isd_ray.names import place_fault
from isd_ray.values import plain, read_option, refuse, refuse_odd

# Bounds beyond which no machine goes; scikit-learn takes seeds of 32 bits, torch and NumPy more.
SEED, IMAGES, STEPS, EPOCHS, PROCESSES, THREADS = 2**32 - 1, 10**9, 10**12, 10**6, 10**4, 1024

RETIRED = ("evaluate.linear",)  # options of older runs, which are still read


class Section(BaseModel):
    """A group of options; unknown names are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    _plain = field_validator("*", mode="before")(classmethod(plain))


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
    subset_seed: int = Field(0, ge=0, le=SEED, description="Seed of the imbalanced selection")
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
        le=IMAGES,
        description="Labelled training images of a class (at most half of them) that are kept out of pretraining and "
        "bank; the run is then evaluated on them, and the test set stays unseen",
    )
    image_size: int = Field(32, ge=8, le=1024, description="Side of a view [pixels]")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="Mean of the channels, on a 0..1 scale")
    std: list[float] = Field([0.229, 0.224, 0.225], description="Deviation of the channels")
    cache: Literal["auto", "memory", "object_store", "device", "none"] = Field(
        "auto",
        description="Decoded images of one size, not much larger than a view, are kept by every worker, once a node in "
        "Ray's object store, or on the training device; none streams the shards every epoch; "
        "auto: memory up to 2 GiB, else none",
    )
    augment_on: Literal["auto", "device", "tasks"] = Field(
        "auto",
        description="Where views get their colours: on the training device in batches, or in the reading tasks, on "
        "every CPU of the cluster; auto: in tasks where they are cropped there anyway (images of several sizes, "
        "or large ones) and training is on a CPU",
    )
    max_bad: float = Field(
        0.01, ge=0, le=1, description="Largest share of broken images before the run stops"
    )

    @field_validator("root", "shards", mode="after")
    @classmethod
    def _are_places(cls, place: str | None) -> str | None:
        return refuse(place, place_fault)

    @field_validator("mean", mode="after")
    @classmethod
    def _is_mean(cls, mean: list[float]) -> list[float]:
        if len(mean) != 3 or not all(0 <= x <= 1 for x in mean):
            raise ValueError("give three numbers, one a channel, on a scale of 0 to 1")
        return mean

    @field_validator("std", mode="after")
    @classmethod
    def _is_deviation(cls, std: list[float]) -> list[float]:
        if len(std) != 3 or not all(1e-3 < x <= 1 for x in std):
            raise ValueError("give three numbers, one a channel, on a scale of 0 to 1, above 0.001")
        return std

    @field_validator("scheme_options", mode="after")
    @classmethod
    def _read_values(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Read `n_max=500` from the command line as a number."""
        return refuse_odd({name: read_option(name, value) for name, value in options.items()})


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
        description="isd, isd_r18, isd_plus, npid, pirl, invprop, moco_v1, moco_v2, simclr, byol, byol_asym, simsiam, "
        "ressl, sce, co2, msf, debiased, fnc, nnclr, barlow_twins, vicreg, deepcluster_v2, swav, dino, compress_1q, "
        "compress_2q or seed",
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="Temperature of the (student's) similarities; not byol*, simsiam, msf, barlow_twins, vicreg",
    )
    temperature_teacher: float | None = Field(
        None,
        gt=0,
        description="Temperature of the teacher's similarities (isd*, ressl, sce, dino, seed, compress_*)",
    )
    temperature_consistency: float | None = Field(
        None, gt=0, description="Temperature of both sides of the consistency term (co2)"
    )
    weight: float | None = Field(
        None,
        ge=0,
        description="Share of the positive in the target (sce), of the puzzle (pirl); factor of the consistency term "
        "(co2), of the terms off the diagonal (barlow_twins), of the term over links (invprop)",
    )
    scale: float | None = Field(None, gt=0, description="Factor of the whole loss (barlow_twins)")
    weight_invariance: float | None = Field(None, ge=0, description="Factor of the views' distance (vicreg)")
    weight_variance: float | None = Field(None, ge=0, description="Factor of the variance term (vicreg)")
    weight_covariance: float | None = Field(None, ge=0, description="Factor of the covariance term (vicreg)")
    prototypes: int | None = Field(
        None,
        ge=2,
        le=10**6,
        description="Prototypes, stand-ins for clusters (deepcluster_v2, swav, dino)",
    )
    negatives: int | None = Field(
        None,
        ge=0,
        le=IMAGES,
        description="Images of the bank to contrast with; 0 for all (npid, pirl, invprop)",
    )
    positives: int | None = Field(
        None, ge=1, le=IMAGES, description="Images reached over links that are pulled to (invprop)"
    )
    bank_momentum: float | None = Field(
        None, ge=0, le=1, description="Share of the old row in the bank's new one (npid, pirl, invprop)"
    )
    weight_start: int | None = Field(
        None,
        ge=0,
        le=STEPS,
        description="Step from which the term of --method.weight counts (invprop)",
    )
    freeze: int | None = Field(
        None, ge=0, le=STEPS, description="First steps with prototypes as they were (swav, dino)"
    )
    epsilon: float | None = Field(None, gt=0, description="Sharpness of the codes, small is sharp (swav)")
    queue_start: int | None = Field(
        None, ge=0, le=STEPS, description="Step from which the queue takes part in the codes (swav)"
    )
    centre: float | None = Field(None, ge=0, le=1, description="Momentum of the teacher's centre (dino)")
    class_prior: float | None = Field(
        None, ge=0, lt=1, description="Chance that two images are of one class (debiased)"
    )
    neighbours: int | None = Field(
        None,
        ge=1,
        le=IMAGES,
        description="Nearest anchors, own key included (msf); most false negatives (fnc)",
    )
    threshold: float | None = Field(None, description="Cosine above which a negative may be false (fnc)")
    false_negatives: Literal["eliminate", "attract"] | None = Field(None, description="Their fate (fnc)")
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
        ["strong", "strong"],
        max_length=100,
        description="View recipe of the student and of the teacher",
    )
    teacher: str | None = Field(
        None,
        description="Frozen teacher (seed, compress_*): folder of a finished run, a checkpoint of a run, or a local "
        "file of weights; its images are normalised with --data.mean and --data.std",
    )
    teacher_backbone: str | None = Field(
        None, description="What the file of weights is, where it does not say: resnet18/34/50 or timm:NAME"
    )
    teacher_encoder: Literal["student", "teacher"] | None = Field(
        None, description="Which network of the run or of the published checkpoint is the teacher"
    )

    @field_validator("teacher", mode="after")
    @classmethod
    def _make_absolute(cls, teacher: str | None) -> str | None:
        """Workers and later jobs run in other folders."""
        refuse(teacher, place_fault)
        local = teacher is not None and "://" not in teacher
        return str(Path(teacher).expanduser().absolute()) if local else teacher  # type: ignore[arg-type]


class QueueConfig(Section):
    """The queue of anchors. Methods without one ignore it."""

    size: int = Field(4096, ge=1, le=IMAGES, description="Anchors in the queue, over all workers")
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

    epochs: int = Field(200, ge=1, le=EPOCHS, description="Passes over the training set")
    batch_size: int = Field(
        256,
        ge=2,
        le=2**24,
        description="Global batch: images a step over all workers",
    )
    accumulate: int = Field(
        1, ge=1, le=2**24, description="Split a worker's batch into this many forward passes a step"
    )
    optimizer: Literal["sgd", "lars", "adamw"] = Field("sgd", description="Optimiser")
    lr: float = Field(0.05, gt=0, description="Peak learning rate at this global batch (it is not rescaled)")
    sgd_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD and LARS")
    trust: float = Field(
        0.001, gt=0, description="LARS: step of a layer as a share of its weights' norm, times lr"
    )
    trust_clip: bool = Field(False, description="LARS: no layer's rate above lr")
    weight_decay: float = Field(1e-4, ge=0, description="Weight decay")
    decay_norm_and_bias: bool = Field(True, description="Decay biases and norm parameters too (as ISD does)")
    schedule: Literal["cosine", "step", "constant"] = Field("cosine", description="Learning-rate schedule")
    milestones: list[float] = Field(
        [0.7, 0.9], description="Step schedule: drops at these fractions of the run"
    )
    gamma: float = Field(0.2, gt=0, le=1, description="Step schedule: factor of each drop")
    warmup_epochs: float = Field(
        0.0,
        ge=0,
        le=EPOCHS,
        description="Epochs of linear warm-up from zero",
    )
    workers: int = Field(
        1,
        ge=0,
        le=PROCESSES,
        description="Ray Train workers; 0 trains inside this process",
    )
    threads: int = Field(
        0,
        ge=0,
        le=THREADS,
        description="Torch threads a CPU worker; 0: its share of all cores but one",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: CUDA where the cluster has GPUs"
    )
    gpus_per_worker: float = Field(
        1.0, gt=0, le=THREADS, description="GPUs a worker takes when it runs on CUDA"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 autocast on CUDA. Also worth a try on CPUs that have AMX",
    )
    compile: bool = Field(False, description="torch.compile the networks")
    batch_norm: Literal["local", "sync", "shuffle"] = Field(
        "local",
        description="Batch norm of each worker, one over all of them, or keys shuffled between them; by method",
    )
    seed: int = Field(0, ge=0, le=SEED, description="Seed of weights, order and views")
    deterministic: bool = Field(
        True, description="Deterministic algorithms: a repeated run is bit-equal on CPU"
    )
    log_every: int = Field(10, ge=1, le=STEPS, description="Steps between two lines of metrics")
    loggers: list[Literal["wandb", "mlflow"]] = Field(
        [], description="Send metrics there too; pip install wandb or mlflow"
    )
    checkpoint_seconds: float = Field(
        60.0, ge=0, description="At least this many seconds between checkpoints"
    )
    keep_checkpoints: int = Field(2, ge=1, le=STEPS, description="Checkpoints kept")
    start_seconds: float = Field(
        1800.0, ge=60, le=1e6, description="Seconds to wait until the cluster has room for the workers"
    )
    autoscale: bool = Field(
        False, description="The cluster may bring more nodes than are up now: ask for them and wait"
    )
    max_failures: int = Field(
        0,
        ge=-1,
        le=10**6,
        description="Restarts after a worker died; -1 for no limit",
    )

    @field_validator("milestones", mode="after")
    @classmethod
    def _are_milestones(cls, milestones: list[float]) -> list[float]:
        within = all(0 < m < 1 for m in milestones)
        if not within or any(a >= b for a, b in pairwise(milestones)):
            raise ValueError("give fractions of the run, between 0 and 1, in increasing order")
        return milestones


class EvaluateConfig(Section):
    """Evaluation of the frozen features after training."""

    enabled: bool = Field(True, description="Evaluate at the end of the run")
    every: int = Field(
        0,
        ge=0,
        le=EPOCHS,
        description="Epochs between evaluations on the way, on --data.validation; 0: none",
    )
    along: list[str] = Field(list(ALONG), description=f"What is measured on the way, of {CHEAP}")
    protocols: list[str] = Field(list(DEFAULT), description=f"What is measured, of {FORMS}")
    transfer_root: str | None = Field(
        None, description="Folder that holds torchvision's files of the sets to transfer to"
    )
    bank: Literal["auto", "balanced", "train"] = Field(
        "auto", description="Labelled bank of kNN: the balanced set, or the pretraining subset"
    )
    baselines: bool = Field(True, description="Also evaluate the untrained backbone and raw pixels")
    batch_size: int = Field(256, ge=1, le=2**24, description="Images a forward pass")
    workers: int = Field(
        0,
        ge=0,
        le=PROCESSES,
        description="Actors that compute features, and tasks that search the bank; 0: on CUDA as many as trained, on "
        "CPU this process",
    )
    keep_features: bool = Field(True, description="Keep the features as Parquet in the run folder")

    @field_validator("transfer_root", mode="after")
    @classmethod
    def _is_place(cls, place: str | None) -> str | None:
        return refuse(place, place_fault)

    @model_validator(mode="before")
    @classmethod
    def _read_linear(cls, values: Any) -> Any:
        """Read the `linear: false` of older runs as protocols without `linear`."""
        if not isinstance(values, dict) or not isinstance(values.get("linear"), bool):
            return values
        rest = {name: value for name, value in values.items() if name != "linear"}
        protocols = rest.get("protocols", list(DEFAULT))
        if values["linear"] or not isinstance(protocols, list):
            return rest
        return rest | {"protocols": [name for name in protocols if name != "linear"]}

    @field_validator("protocols", "along", mode="after")
    @classmethod
    def _know_protocols(cls, names: list[str], info: ValidationInfo) -> list[str]:
        """Refuse unknown and repeated names, and what takes too long on the way, all at once."""
        faults = name_faults(names, cheap=info.field_name == "along")
        if faults:
            raise ValueError("; ".join(faults))
        return names

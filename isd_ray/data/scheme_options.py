"""What may be asked of each imbalance scheme: names, types and ranges, checked beforehand.

A number that is out of range must not choose other images in silence: every option of every scheme
passes here, whether it comes from the command line, a study, a definition or a caller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from isd_ray.errors import UserError, nearest, printable, shown

LARGE, SMALL, CAP, FEW = 8, 30, 1300, 100  # the unbalanced sets of ISD (Tejankar et al., ICCV 2021)
IMAGES = 10**12  # more than any set holds


class Options(BaseModel):
    """Of every scheme. seed: of the choice of images and of classes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    seed: int = Field(0, ge=0)


class Natural(Options):
    """Every image."""


class Listed(Options):
    """The images of a list. missing: what to do about one that is not there."""

    files: str | tuple[str, ...] = Field(description="the path of a text file, or a list of file names")
    missing: Literal["error", "skip"] = "error"

    @field_validator("files", mode="before")
    @classmethod
    def _are_files(cls, files: Any) -> Any:
        if isinstance(files, str) and files.strip():
            return files
        if not isinstance(files, list | tuple) or not all(isinstance(f, str) for f in files):
            raise ValueError("give the path of a text file, or a list of file names")
        return tuple(files)


class Quota(Options):
    """Of schemes that ask for so many images a class.

    class_order: "label": class 0 is the largest; "random": by the seed. holdout: images of each
    class that are left out beforehand.
    """

    class_order: Literal["label", "random"] = "label"
    holdout: int = Field(0, ge=0, le=IMAGES)


class Ranked(Quota):
    """Of laws over the ranks. n_max: images of the largest class (default: those there are)."""

    n_max: int | None = Field(None, ge=1, le=IMAGES)


class Exponential(Ranked):
    """ratio: the largest class over the smallest."""

    ratio: float = Field(100, ge=1)


class Step(Exponential):
    """ratio: the large half of the classes over the small half."""


class Pareto(Ranked):
    """Of the shifted Pareto law, see `imbalance.pareto_counts`."""

    alpha: float = Field(6.0, ge=0.1, le=1000)
    scale: float | None = Field(None, gt=0, le=IMAGES)
    floor: int = Field(5, ge=0, le=IMAGES)
    mode: Literal["quantile", "draw"] = "quantile"


class Counts(Quota):
    """counts: images by rank, one number a class, or by class name, others left out."""

    counts: tuple[int, ...] | dict[str, int] = Field(
        description="images of each class, by rank or by class name"
    )

    @field_validator("counts", mode="before")
    @classmethod
    def _are_counts(cls, counts: Any) -> Any:
        if not isinstance(counts, list | tuple | dict) or not counts:
            raise ValueError("give the images of each class, by rank or by class name")
        if isinstance(counts, dict) and not all(isinstance(name, str) for name in counts):
            raise ValueError("write the names of classes in quotes")
        for n in counts.values() if isinstance(counts, dict) else counts:
            if type(n) is not int or not 0 <= n <= IMAGES:
                raise ValueError(f"{shown(n)} is no number of images")
        return counts if isinstance(counts, dict) else tuple(counts)


class LargeSmall(Quota):
    """`n_large` classes of `size_large` images, `n_small` (None: the rest) of `size_small`."""

    n_large: int = Field(LARGE, ge=0, le=IMAGES)
    size_large: int = Field(CAP, ge=0, le=IMAGES)
    size_small: int = Field(FEW, ge=0, le=IMAGES)
    n_small: int | None = Field(None, ge=0, le=IMAGES)


class Isd830(Quota):
    """split: D1 .. D10, the published classes by WordNet id; "": drawn by the seed."""

    split: str = ""


class Balanced(Quota):
    """per_class: images of every class."""

    per_class: int = Field(ge=1, le=IMAGES)


@dataclass(frozen=True)
class Control:
    """The balanced set of the size of another one, of which it takes seed and holdout."""

    of: Quota

    @property
    def seed(self) -> int:
        return self.of.seed

    @property
    def holdout(self) -> int:
        return self.of.holdout


QUOTAS: dict[str, type[Quota]] = {
    "exponential": Exponential,
    "step": Step,
    "pareto": Pareto,
    "counts": Counts,
    "large_small": LargeSmall,
    "isd_8_30": Isd830,
}
_OPTIONS: dict[str, type[Options]] = {"natural": Natural, **QUOTAS, "balanced": Balanced, "list": Listed}
SCHEMES = tuple(_OPTIONS)
T = TypeVar("T", bound=Options)


def read_options(scheme: str | None, options: Mapping[str, Any]) -> Options | Control:
    """Return the checked options of a scheme (None and "none": natural).

    Raises UserError that lists every unknown name, with the nearest known one, and every value of a
    wrong type or out of its range.
    """
    name = "natural" if scheme in (None, "none") else scheme
    if not isinstance(name, str) or name not in _OPTIONS:
        raise UserError(_unknown_scheme(name, SCHEMES))
    if name != "balanced":
        return _checked(_OPTIONS[name], name, options)
    of, per_class = options.get("of"), options.get("per_class")
    own = {key: value for key, value in options.items() if key not in ("of", "per_class")}
    if (of is None) == (per_class is None):
        raise UserError("scheme 'balanced' needs either per_class or of, the scheme whose size it matches")
    if of is None:
        return _checked(Balanced, name, own | {"per_class": per_class})
    if not isinstance(of, str) or of not in QUOTAS:
        raise UserError(_unknown_scheme(of, QUOTAS))
    return Control(_checked(QUOTAS[of], of, own))


def _checked(model: type[T], scheme: str, options: Mapping[str, Any]) -> T:
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        faults = [_fault(scheme, model, e) for e in error.errors()[:8]]
        raise UserError("; ".join(faults)) from None


def _fault(scheme: str, model: type[Options], error: ErrorDetails) -> str:
    name = printable(str(error["loc"][0] if error["loc"] else "?"))[:60]
    if error["type"] == "missing":
        return f"scheme '{scheme}' needs {name}: {model.model_fields[name].description}"
    if error["type"] == "extra_forbidden":
        hint, known = nearest(name, model.model_fields), ", ".join(model.model_fields)
        return f"unknown imbalance option '{name}' of scheme '{scheme}'.{hint} Known: {known}"
    reason = error["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"imbalance option {name} {shown(error['input'])} of scheme '{scheme}': {printable(reason)[:200]}"


def _unknown_scheme(name: Any, known: Sequence[str] | Mapping[str, Any]) -> str:
    hint = nearest(name[:60], known) if isinstance(name, str) else ""
    return f"unknown imbalance scheme {shown(name)}.{hint} Known: {', '.join(known)}"

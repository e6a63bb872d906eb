"""result.json: the numbers that a run leaves, and whether a file still holds such numbers.

Percentages lie by network, then by metric: `metrics.student.knn20`, and so do its groups, its mean over
classes, its deviation over groups and its accuracy in each class. docs/design.md has the whole of it.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from isd_ray.errors import UserError, harmless
from isd_ray.evaluate.names import parse
from isd_ray.train.folder import REMEDY, RunFolder
from isd_ray.values import LARGEST

FILE = "result.json"
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Amount = Annotated[float, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
ByMetric = dict[str, Number | None]


class Part(BaseModel):
    """A part of the file; what a later version writes besides is let be."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Cost(Part):
    """Of an image and step, see `isd_ray.train.cost`."""

    student_forward: Amount
    teacher_forward: Amount
    backward: Amount
    gflop: Amount


class BankProtocol(Part):
    """The labelled images that queries are compared with."""

    name: str
    images: Count
    largest_class: Count
    smallest_class: Count


class GroupsProtocol(Part):
    """Classes by group."""

    classes: dict[str, list[Count]]


class Result(Part):
    """The whole file. A run without a labelled test set has no metrics, and a note that says so."""

    folder: str
    seconds: dict[str, Amount]
    images_per_second: Amount
    cost: Cost
    time_note: str = ""
    note: str = ""
    classes: list[str] = []
    metrics: dict[str, ByMetric] = {}
    class_mean: dict[str, ByMetric] = {}
    std: dict[str, ByMetric] = {}
    groups: dict[str, dict[str, ByMetric | None]] = {}
    per_class: dict[str, dict[str, list[Number | None] | None]] = {}
    collapse: dict[str, dict[str, Number | ByMetric | None]] = {}
    protocol: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> "Result":
        """Each network and metric stands in every part."""
        if not self.metrics:
            return self
        names = list(next(iter(self.metrics.values())))
        for name in names:
            parse(name)
        for part in (self.metrics, self.class_mean, self.std, self.groups, self.per_class):
            if part.keys() != self.metrics.keys() or any(list(p) != names for p in part.values()):
                raise ValueError("its parts are of different networks or metrics")
        missing = {*names, "bank", "test", "features", "groups"} - self.protocol.keys()
        if missing:
            raise ValueError(f"protocol: {harmless(', '.join(sorted(missing)))} is missing")
        BankProtocol(**self.protocol["bank"])
        GroupsProtocol(**self.protocol["groups"])
        own = [name for name in names if not parse(name).protocol.other_set]
        lists = [network[name] for network in self.per_class.values() for name in own]
        if any(found is not None and len(found) != len(self.classes) for found in lists):
            raise ValueError("an accuracy of each class is missing")
        return self


def read_result(folder: RunFolder) -> dict[str, Any]:
    """Return what a finished run has written; raises UserError where it is damaged."""
    found = folder.read_json(FILE)
    try:
        if not isinstance(found, dict):
            raise ValueError(f"expected a mapping, found {type(found).__name__}")
        Result(**found)
    except (UserError, ValueError, TypeError) as error:
        reason = _reason(error)
        raise UserError(f"{folder.place(FILE)} is damaged ({reason}); {REMEDY[FILE]}") from None
    return found


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return harmless(str(error), 200)
    first = error.errors()[0]
    return harmless(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 200)

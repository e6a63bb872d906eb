"""What the value of an option may be, whatever the option; and what is said of one that is none."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from isd_ray.errors import UserError, harmless, nearest, shown
from isd_ray.names import place_fault, text_fault, texts
from isd_ray.yaml_files import parse_value

MOST_ENTRIES = 1000  # of a list
LARGEST = 2**53  # beyond it floats skip whole numbers
DEEPEST = 8  # lists and mappings within each other, in the options of a scheme

T = TypeVar("T")


def plain(model: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Refuse what no option can mean: empty, endless or unprintable text, true for a number."""
    if info.field_name == "description":
        return value
    parts = value if isinstance(value, list) else [value]
    if len(parts) > MOST_ENTRIES:
        raise ValueError(f"{len(parts):,} entries, at most {MOST_ENTRIES:,} are taken")
    for part in parts:
        if isinstance(part, str) and (fault := text_fault(part)):
            raise ValueError(fault)
        if isinstance(part, str) and not part.strip():
            raise ValueError("it is empty; give a value or leave it out (an unset variable?)")
    kinds = kinds_of(model.model_fields[str(info.field_name)].annotation)
    if any(isinstance(part, bool) for part in parts) and not {bool, Any} & kinds:
        raise ValueError("true and false say nothing here")
    return value


def kinds_of(annotation: Any) -> set[Any]:
    """Return the types within a type: those of `list[int] | None` are int and None."""
    inner = get_args(annotation)
    return {annotation}.union(*map(kinds_of, inner)) if inner else {annotation}


def refuse(value: T, fault_of: Callable[[Any], str | None]) -> T:
    """Return a value that is None or has no fault; raises ValueError, which pydantic reports."""
    if value is not None and (fault := fault_of(value)):
        raise ValueError(fault)
    return value


def read_option(name: str, value: Any) -> Any:
    """Return an option of a scheme, which the command line gives as text; raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        read = parse_value(value, shown(name))
    except UserError as error:
        raise ValueError(str(error)) from None
    return value if isinstance(read, dict) else read  # a text with a colon in it


def refuse_odd(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a scheme; raises ValueError for keys and what YAML cannot hold."""
    _refuse_deep(options)
    for text in texts(options):
        if fault := text_fault(text) or (place_fault(text) if "://" in text else None):
            raise ValueError(fault)
    return options


def _refuse_deep(value: Any, depth: int = 0) -> None:
    """Refuse what YAML and JSON cannot hold, and what is nested beyond any use."""
    if depth > DEEPEST:
        raise ValueError(f"more than {DEEPEST} lists and mappings within each other")
    if isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            _refuse_deep(part, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number in it is not finite")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"a number in it is beyond {LARGEST:,}")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"a {type(value).__name__} in it: give numbers, texts, lists or mappings")


def path_of(error: ErrorDetails) -> str:
    """Return the dotted name of what is wrong."""
    return harmless(".".join(map(str, error["loc"])))


def reason_of(error: ErrorDetails) -> str:
    """Return why it is wrong."""
    return harmless(error["msg"].removeprefix("Value error, "), 600)


def faults_of(model: type[BaseModel], error: ValidationError) -> list[str]:
    """Return one line for each thing that is wrong, an unknown name with the nearest known one."""
    faults = []
    for e in error.errors():
        if e["type"] == "extra_forbidden":
            known = _model_at(model, e["loc"][:-1]).model_fields
            faults.append(f"unknown entry '{path_of(e)}'.{nearest(str(e['loc'][-1]), known)}")
        else:
            faults.append(f"{path_of(e)}: {reason_of(e)}")
    return faults


def _model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """Follow the path through sections and through mappings or lists of them."""
    kind: Any = model
    for part in path:
        isa = isinstance(kind, type) and issubclass(kind, BaseModel)
        kind = kind.model_fields[part].annotation if isa else get_args(kind)[-1]
    return kind

"""Layers of options are nested mappings; names may be nested or dotted, `{"train": {"lr": 1}}` or `{"train.lr": 1}`."""

from collections.abc import Mapping
from typing import Any

from isd_ray.errors import UserError, shown

Layer = Mapping[str, Any]
MAPPINGS = ("data.scheme_options",)  # options whose value is itself a mapping
DEEPEST = 20  # mappings within each other


def merge(*layers: Layer) -> dict[str, Any]:
    """Merge nested mappings, later ones win; dotted names are unfolded first."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in unfold(layer).items():
            below = merged.get(name)
            merged[name] = (
                merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
            )
    return merged


def flatten(values: Layer, prefix: str = "") -> dict[str, Any]:
    """Return the nested mapping as {dotted name: value}; an option whose value is a mapping keeps it whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        whole = not isinstance(value, Mapping) or prefix + name in MAPPINGS
        flat |= {prefix + name: value} if whole else flatten(value, f"{prefix}{name}.")
    return flat


def unfold(layer: Layer, within: tuple[str, ...] = ()) -> dict[str, Any]:
    """Turn {'train.lr': 1} into {'train': {'lr': 1}}, at every depth.

    Raises UserError where one layer names an option twice, as in both forms: neither would win.
    """
    if len(within) > DEEPEST:
        place = ".".join(within[:2])
        raise UserError(f"option {shown(place)}: more than {DEEPEST} mappings within each other")
    unfolded: dict[str, Any] = {}
    for name, value in layer.items():
        head, _, rest = str(name).partition(".")
        if rest:
            value = unfold({rest: value}, (*within, head))
        elif isinstance(value, Mapping):
            value = unfold(value, (*within, head))
        if head in unfolded:
            value = _joined(unfolded[head], value, ".".join((*within, head)))
        unfolded[head] = value
    return unfolded


def _joined(one: Any, other: Any, name: str) -> Any:
    """Return both parts of a group of options, which have no option in common."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        raise UserError(f"option {shown(name)} stands there twice; keep one")
    both = {k: _joined(one[k], other[k], f"{name}.{k}") for k in one if k in other}
    return one | other | both


def only(given: Layer, name: str) -> dict[str, Any]:
    """Keep one option, which chooses a layer of defaults."""
    flat = flatten(given)
    return unfold({name: flat[name]}) if name in flat else {}

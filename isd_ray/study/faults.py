"""Everything that is wrong with a study, gathered and said at once."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from isd_ray.errors import UserError
from isd_ray.study.spec import Study
from isd_ray.values import faults_of

SHOWN = 3  # places named of a fault that many share
MOST = 20  # faults named


class Faults:
    """Faults and where they are: what many cells share is said once."""

    def __init__(self) -> None:
        self.places: dict[str, list[str]] = {}

    def add(self, text: str, place: str = "") -> None:
        """Note one fault; `place`: method, setting or split that has it."""
        known = self.places.setdefault(text, [])
        if place and place not in known:
            known.append(place)

    def lines(self) -> list[str]:
        """Return a line a fault."""
        return [f"{_of(places)}{text}" for text, places in self.places.items()]

    def raise_if_any(self) -> None:
        """Raise UserError that lists all of them."""
        lines = self.lines()
        if len(lines) == 1:
            raise UserError(f"study: {lines[0]}")
        if lines:
            more = [f"... and {len(lines) - MOST} more"] if len(lines) > MOST else []
            named = "\n".join(f"  - {line}" for line in [*lines[:MOST], *more])
            raise UserError(f"the study has {len(lines)} faults:\n{named}")


def _of(places: list[str]) -> str:
    if not places:
        return ""
    more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"{', '.join(places[:SHOWN])}{more}: "


def parse(content: Mapping[str, Any], faults: Faults) -> Study:
    """Read a study; wrong entries are noted and taken for absent, so that the rest can be looked at too.

    Raises UserError with the faults so far where nothing can be made of the rest.
    """
    rest = dict(content)
    while True:
        try:
            return Study(**rest)
        except ValidationError as error:
            for text in faults_of(Study, error):
                faults.add(text)
            removed = [_without(rest, e["loc"]) for e in error.errors() if e["type"] != "missing"]
            if not any(removed) or any(e["type"] == "missing" for e in error.errors()):
                faults.raise_if_any()


def _without(content: dict[str, Any], path: tuple[str | int, ...]) -> bool:
    """Remove the innermost mapping's entry that the path names; tell whether there was one."""
    for depth in range(len(path), 0, -1):
        holder: Any = content
        for part in path[: depth - 1]:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and path[depth - 1] in holder:
            del holder[path[depth - 1]]
            return True
    return False

"""Where the YAML files lie that come with the package: data sets, recipes and studies, search spaces.

In a checkout they are the folders at its top, where people edit them; a wheel carries copies beside this
file. A folder of the user's own with the same sub-folders, named in ISD_RAY_DEFINITIONS (several are
separated as in PATH), is searched first.
"""

import os
from pathlib import Path

from isd_ray.errors import UserError, nearest, shown

KINDS = {"datasets": "data set", "recipes": "recipe", "tune_spaces": "search space"}
VARIABLE = "ISD_RAY_DEFINITIONS"
_CHECKOUT = Path(__file__).parents[2]
_PLACES = {"datasets": "datasets", "recipes": "jobs/recipes", "tune_spaces": "tune_spaces"}


def folders(kind: str) -> list[Path]:
    """Return the folders that hold definitions of one of KINDS; the first that has a name counts."""
    own = [
        Path(place).expanduser() / kind for place in os.environ.get(VARIABLE, "").split(os.pathsep) if place
    ]
    in_checkout = all((_CHECKOUT / place).is_dir() for place in _PLACES.values())
    return [*own, _CHECKOUT / _PLACES[kind] if in_checkout else Path(__file__).parent / kind]


def names(kind: str) -> list[str]:
    """Return the sorted names of the definitions of one kind."""
    return sorted({path.stem for folder in folders(kind) for path in folder.glob("*.yaml")})


def find(kind: str, name: str) -> Path:
    """Return the file of a definition by its name; raises UserError with the nearest one where there is none."""
    for folder in folders(kind):
        if name in {path.stem for path in folder.glob("*.yaml")}:
            return folder / f"{name}.yaml"
    known = names(kind)
    raise UserError(
        f"unknown {KINDS[kind]} {shown(name)}.{nearest(name, known)} Known: {', '.join(known)}; "
        f"{VARIABLE} names a folder of your own"
    )


def file_or_name(kind: str, given: str) -> str:
    """Return the file that is meant by a path, a URI, or by the name of a definition."""
    if not given.strip():
        raise UserError(f"{KINDS[kind]}: an empty path; give a file or a name (an unset variable?)")
    is_name = not set(given) & set("./\\~\0") and not os.path.isfile(given)
    return str(find(kind, given)) if is_name else given

"""The images of a list, as published lists name them: by path, class folder and file, or file.

A list of files is text, a file a line. Blank lines and lines that begin with # are left out, and so
is what follows a file's name, as the label in the lists of SDCLR and ImageNet-LT
("train/n01440764/a.JPEG 0"). The lists D1..D10 of ISD begin with a heading, "class names :", the
classes, a line each, and the heading "Train Images:"; the files follow. Any other line is a file,
and one that the index lacks is refused.
"""

import posixpath
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from isd_ray.data.files import read_bytes
from isd_ray.errors import UserError, printable

CLASSES, FILES = "class names :", "Train Images:"  # headings of D1..D10


def listed(table: pa.Table, files: str | Sequence[str], missing: str = "error") -> pa.Table:
    """Return the rows named by a list, in order of the table.

    A name is looked for as a whole key, then by class folder and base name, then by base name alone
    where it or the key has no folder. files: path or URI of a text file, or the names; missing:
    "error" | "skip".

    Raises:
        UserError: a file that is not in the index or is there twice (unless "skip"), none at all, a
            list that is empty or cut in its heading, or no text.
    """
    entries = [_stem(name) for name in _names(files)]
    if not entries:
        raise UserError("the list of files is empty")
    keys = [_stem(key) for key in table["key"].to_pylist()]
    found: dict[str, int | None] = dict.fromkeys(entries)
    for depth in (None, 2, 1):
        rows = _by_suffix(keys, depth)
        for entry in [e for e, row in found.items() if row is None]:
            row = rows.get(_suffix(entry, depth))
            if row is not None and (depth != 1 or "/" not in entry or "/" not in keys[row]):
                found[entry] = row
    lost = [e for e, row in found.items() if row is None]
    if (lost and missing == "error") or len(lost) == len(found):
        raise UserError(
            f"{len(lost)} of {len(found)} listed files are not in the index (or not unique), e.g. "
            f"'{printable(lost[0])[:200]}'"
        )
    return table.take(np.unique([row for row in found.values() if row is not None]))


def _names(files: str | Sequence[str]) -> list[str]:
    """Return the listed files as they are written."""
    if not isinstance(files, str):
        return [name.strip() for name in files if name.strip()]
    try:
        text = read_bytes(files).decode()
    except UnicodeDecodeError:
        raise UserError(f"list of files '{printable(files)}': no text in UTF-8") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    return _below_headings(lines, printable(files)) if lines[:1] == [CLASSES] else lines


def _below_headings(lines: Sequence[str], place: str) -> list[str]:
    """Return the files of a list in the form of D1..D10; each class in its heading has some."""
    if FILES not in lines:
        raise UserError(f"list of files '{place}': it begins with '{CLASSES}' and has no line '{FILES}'")
    end = lines.index(FILES)
    classes, names = lines[1:end], list(lines[end + 1 :])
    if wrong := [name for name in classes if "/" in name or "." in name]:
        raise UserError(
            f"list of files '{place}': '{printable(wrong[0])[:60]}' stands among the class names, before '{FILES}'"
        )
    present = {posixpath.basename(posixpath.dirname(name)) for name in names}
    if empty := [name for name in classes if name not in present]:
        raise UserError(
            f"list of files '{place}': it has no file of class '{printable(empty[0])[:60]}', which its heading "
            "names; is it cut?"
        )
    return names


def _stem(name: str) -> str:
    folder, base = posixpath.split(name.strip("/"))
    return posixpath.join(folder, base.partition(".")[0])


def _suffix(name: str, depth: int | None) -> str:
    return name if depth is None else "/".join(name.split("/")[-depth:])


def _by_suffix(names: Sequence[str], depth: int | None) -> dict[str, int]:
    """Map the last `depth` parts of every name to its row, leaving out what two rows share."""
    rows: dict[str, int] = {}
    shared = set()
    for row, name in enumerate(names):
        suffix = _suffix(name, depth)
        if suffix in rows:
            shared.add(suffix)
        rows[suffix] = row
    return {s: r for s, r in rows.items() if s not in shared}

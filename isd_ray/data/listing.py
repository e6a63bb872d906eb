"""Which files lie under a folder: every one once, also where links lead in circles.

Links to files are followed, and so are links to folders. A folder that is reached twice, by two
links or by a link to a folder around it, is refused: its images would count twice, or for ever.
Hidden files and folders are left out.
"""

import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyarrow import fs as pafs

from isd_ray.errors import UserError, printable

DEPTH = 64  # folders inside each other
FILES = 20_000_000  # under one folder; more are to be packed into shards by parts
BROKEN_LINK, SPECIAL = "broken links", "pipes, sockets or devices"


class Listing(NamedTuple):
    """Sorted names of the wanted files, relative to the folder, and how many others there are."""

    names: list[str]
    others: Counter[str]

    def left_out(self) -> str:
        """Say how many files were left out and of which kinds, the commonest first; "" where there
        are none.
        """
        ordered = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
        kinds = [f"{n} {printable(kind)}" for kind, n in ordered[:6]]
        more = ", ..." if len(self.others) > 6 else ""
        return f"{self.others.total()} files left out ({', '.join(kinds)}{more})" if kinds else ""


def list_folder(
    filesystem: pafs.FileSystem, folder: str, extensions: Iterable[str], recursive: bool
) -> Listing:
    """List the files under `folder` whose names end in one of `extensions` (lower case, with dot).

    Raises:
        UserError: a folder is reached twice, a wanted name is no UTF-8, or there are too many or
            too deep.
        OSError: a folder cannot be read.
    """
    local = isinstance(filesystem, pafs.LocalFileSystem)
    found = _local(folder, recursive) if local else _remote(filesystem, folder, recursive)
    endings, names, others = tuple(extensions), [], Counter[str]()
    for number, (name, kind) in enumerate(found, 1):
        if number > FILES:
            raise UserError(f"more than {FILES:,} files under '{printable(folder)}': give parts of it")
        if kind or not name.lower().endswith(endings):
            others[kind or _suffix(name)] += 1
        else:
            names.append(name)
    _require_utf8(names, folder)
    return Listing(sorted(names), others)


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()[:20] or "without a suffix"


def _require_utf8(names: list[str], folder: str) -> None:
    """Refuse names that no file system but this one, no index and no message could hold."""
    wrong = [name for name in names if not name.isascii() and _escaped(name) != name]
    if wrong:
        raise UserError(
            f"{len(wrong)} files under '{printable(folder)}' have names that are no UTF-8, e.g. "
            f"'{printable(_escaped(wrong[0]))}': rename them (`convmv -f latin1 -t utf8 -r`)"
        )


def _escaped(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _remote(filesystem: pafs.FileSystem, folder: str, recursive: bool) -> Iterator[tuple[str, str]]:
    for info in filesystem.get_file_info(pafs.FileSelector(folder, recursive=recursive)):
        name = posixpath.relpath(info.path, folder)
        if info.type == pafs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield name, ""


def _local(folder: str, recursive: bool) -> Iterator[tuple[str, str]]:
    """Yield the path of every file with "", and that of what is none with its kind."""
    seen = {os.path.realpath(folder): "."}
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        with os.scandir(posixpath.join(folder, inner)) as entries:
            visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        for entry in visible:
            name = posixpath.join(inner, entry.name)
            kind = _kind(entry)
            if kind != "folder":
                yield name, kind
            elif recursive:
                _enter(folder, name, seen)
                waiting.append(name)


def _kind(entry: os.DirEntry) -> str:
    """Return "" for a file, "folder", or what else it is; links are followed."""
    try:
        if entry.is_file():
            return ""
        if entry.is_dir():
            return "folder"
    except PermissionError:
        raise
    except OSError:  # a link to itself
        return BROKEN_LINK
    return BROKEN_LINK if entry.is_symlink() else SPECIAL


def _enter(folder: str, name: str, seen: dict[str, str]) -> None:
    """Note a folder, which is `name` under `folder`; raises UserError where it was there before, or
    lies too deep.
    """
    place = os.path.realpath(posixpath.join(folder, name))
    before = seen.setdefault(place, name)
    said, first = (printable(_escaped(path)) for path in (name, before))
    if before != name:
        raise UserError(
            f"'{said}' and '{first}' under '{printable(folder)}' are one folder by a link: its files would come "
            "twice; remove the link"
        )
    if name.count("/") >= DEPTH:
        raise UserError(f"'{said[:60]}...' under '{printable(folder)}' is more than {DEPTH} folders deep")

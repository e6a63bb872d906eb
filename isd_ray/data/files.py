"""Files lie on disks and in buckets: one small set of verbs over `pyarrow.fs` serves both.

A URI is anything `pyarrow.fs` understands (`s3://`, `gs://`, `hdfs://`, `file://`), with its parameters
(`s3://bucket/set?endpoint_override=HOST:PORT&scheme=http`), or a local path. Files appear under their final
name only when they are whole.
"""

import fnmatch
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from isd_ray.data.listing import Listing, list_folder
from isd_ray.data.store import retry
from isd_ray.ending import broken
from isd_ray.errors import UserError, printable, shown
from isd_ray.names import secret_fault

T = TypeVar("T")
OURS = re.compile(r"\..+\.[0-9a-f]{8}\.part")  # names of the part files of `write_whole`


class AbsentError(UserError):
    """Nothing is there, as opposed to something that is wrong: another place may be tried."""


def absolute(uri: str | os.PathLike[str]) -> str:
    """Return `uri` with a local path made absolute and without a slash at its end."""
    text = os.fspath(uri)
    if "://" not in text:
        return os.path.abspath(os.path.expanduser(text))
    return join(text)


def join(uri: str, *names: str) -> str:
    """Return the URI or path of `names` under the folder `uri`; parameters of a URI stay at its end."""
    place, mark, parameters = uri.partition("?") if "://" in uri else (uri, "", "")
    return "/".join([place.rstrip("/"), *names]) + mark + parameters or "/"


def parent(uri: str) -> str:
    """Return the folder of a file."""
    place, mark, parameters = uri.partition("?") if "://" in uri else (uri, "", "")
    return (posixpath.dirname(place) or "/") + mark + parameters


def path_of(uri: str) -> str:
    """Return `uri` without its parameters."""
    return uri.partition("?")[0] if "://" in uri else uri


def has_suffix(uri: str, suffix: str) -> bool:
    """Does the path of `uri` end in `suffix`?"""
    return path_of(uri).endswith(suffix)


def open_filesystem(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """Return the file system of `uri` and the path in it.

    Raises:
        UserError: the scheme is unknown, the place cannot be reached, or the URI holds a key.
    """
    if fault := secret_fault(os.fspath(uri)):
        raise UserError(f"{shown(os.fspath(uri))}: {fault}")
    try:
        return pafs.FileSystem.from_uri(absolute(uri))
    except (pa.ArrowException, OSError, ValueError) as error:  # the last: a name that is no UTF-8
        said = printable(f"'{os.fspath(uri)}': {str(error).splitlines()[0]}")
        raise UserError(f"cannot open {said}") from error


def _ask(call: Callable[[], T], filesystem: pafs.FileSystem, uri: str) -> T:
    """Return `call()` as `retry` does; what stays wrong is a UserError, but for a missing file."""
    try:
        return retry(call, filesystem, uri)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise broken(uri, error) from error


def info(uri: str) -> pafs.FileInfo:
    """Return what lies at `uri`: its type, size and time."""
    filesystem, path = open_filesystem(uri)
    return _ask(lambda: filesystem.get_file_info(path), filesystem, uri)


def listing(uri: str, extensions: Iterable[str], recursive: bool = False) -> Listing:
    """List the files under the folder `uri` with one of `extensions` (lower case, with dot), and
    count the others.

    Names are relative to the folder. Links are followed; hidden files and folders (leading dot) are
    left out.

    Raises:
        AbsentError: `uri` is not a folder.
        UserError: what `list_folder` refuses, e.g. links that lead to one folder twice.
    """
    filesystem, folder = open_filesystem(uri)
    if info(uri).type != pafs.FileType.Directory:
        raise AbsentError(f"no folder at '{printable(uri)}': check the path")
    return _ask(lambda: list_folder(filesystem, folder, extensions, recursive), filesystem, uri)


def list_files(uri: str, extensions: Iterable[str], recursive: bool = False) -> list[str]:
    """Return the names of `listing`, sorted."""
    return listing(uri, extensions, recursive).names


def expand(uri: str, extension: str) -> list[str]:
    """Return the files that `uri` names: a file, a folder of `*extension`, or a glob in the last part of the
    path.

    Raises:
        AbsentError: nothing is there.
    """
    uri = absolute(uri)
    folder, pattern = parent(uri), posixpath.basename(path_of(uri))
    if any(c in pattern for c in "*?["):
        names = [n for n in list_files(folder, [extension]) if fnmatch.fnmatch(n, pattern)]
        found = [join(folder, n) for n in names]
    elif is_folder(uri):
        found = [join(uri, n) for n in list_files(uri, [extension])]
    else:
        found = [uri] if exists(uri) else []
    if not found:
        raise AbsentError(f"no {extension} file at '{printable(uri)}': check the path")
    return found


def exists(uri: str) -> bool:
    """Is there a file or folder at `uri`?"""
    return info(uri).type != pafs.FileType.NotFound


def is_folder(uri: str) -> bool:
    """Is there a folder at `uri`?"""
    return info(uri).type == pafs.FileType.Directory


def write_text(uri: str, text: str) -> None:
    """Put `text` at `uri`, all or nothing."""

    def write(path: str) -> None:
        Path(path).write_text(text)

    write_whole(uri, write)


def read_bytes(uri: str, most: int | None = None) -> bytes:
    """Return the content of the file at `uri`, or its first `most` bytes; raises AbsentError where
    there is none.
    """
    filesystem, path = open_filesystem(uri)

    def read() -> bytes:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return stream.read(most)

    try:
        return _ask(read, filesystem, uri)
    except FileNotFoundError:
        raise AbsentError(f"no file at '{printable(uri)}'") from None


def write_whole(uri: str, write: Callable[[str], None]) -> None:
    """Let `write` fill a local file, then put it at `uri` in one move: no reader ever sees half of it.

    The part file lies in the target folder (local) or is uploaded under a hidden name beside the target
    (remote).
    """
    filesystem, path = open_filesystem(uri)
    folder, name = posixpath.split(path)
    part = posixpath.join(folder, f".{name}.{uuid.uuid4().hex[:8]}.part")
    try:
        retry(lambda: filesystem.create_dir(folder, recursive=True), filesystem, uri)
        if isinstance(filesystem, pafs.LocalFileSystem):
            _fill(part, write)
        else:
            _upload(filesystem, part, write)
        retry(lambda: filesystem.move(part, path), filesystem, uri)
    except OSError as error:
        raise broken(uri, error) from error


def _fill(path: str, write: Callable[[str], None]) -> None:
    try:
        write(path)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise


def _upload(filesystem: pafs.FileSystem, part: str, write: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="isd_ray_") as folder:
        local = os.path.join(folder, "part")
        write(local)

        def copy() -> None:
            with open(local, "rb") as source, filesystem.open_output_stream(part) as target:
                shutil.copyfileobj(source, target, 1 << 20)

        retry(copy, filesystem, part)


def remove_stale_parts(uri: str, older_than: float = 3600.0) -> None:
    """Delete part files of killed runs in the folder `uri`, once untouched for `older_than` seconds."""
    filesystem, folder = open_filesystem(uri)
    for info in filesystem.get_file_info(pafs.FileSelector(folder, allow_not_found=True)):
        if OURS.fullmatch(info.base_name) and info.mtime_ns < (time.time() - older_than) * 1e9:
            filesystem.delete_file(info.path)

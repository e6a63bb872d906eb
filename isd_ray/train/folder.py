"""The run folder: everything a run leaves behind, on a local disk or any pyarrow file system (S3, GCS).

config.yaml  selection.parquet  metrics.jsonl  tensorboard/  bad_samples.jsonl
checkpoints/step-00001234.pt  backbone.safetensors  result.json
"""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs
import torch

from isd_ray.config import Config, merge, validate
from isd_ray.data.files import absolute, join, open_filesystem, path_of
from isd_ray.data.index import NoIndexError, parse_index
from isd_ray.data.store import retry
from isd_ray.ending import broken
from isd_ray.errors import UserError, printable
from isd_ray.yaml_files import parse_mapping

T = TypeVar("T")
Row = dict[str, Any]
LARGEST = 2**53  # beyond it floats skip whole numbers


class RunFolder:
    """Reads and writes whole files under one folder or URI; a file appears under its name only when complete.

    A store is asked again where it fails (`isd_ray.data.store.retry`). Raises MachineError where a disk or
    store fails for good, FileNotFoundError for a file that is not there.
    """

    def __init__(self, uri: str) -> None:
        self.uri = absolute(uri)
        self.filesystem, path = open_filesystem(self.uri)
        self.path = path.rstrip("/")
        self.local = isinstance(self.filesystem, pa.fs.LocalFileSystem)

    @property
    def name(self) -> str:
        """The last part of the URI."""
        return path_of(self.uri).rsplit("/", 1)[-1]

    def place(self, *names: str) -> str:
        """Return the URI of what lies under these names in the folder; parameters of a URI stay at its end."""
        return join(self.uri, *filter(None, names))

    def sub(self, *names: str) -> "RunFolder":
        """Return a folder in this one."""
        return RunFolder(self.place(*names))

    def make(self, name: str = "") -> None:
        """Make the folder, or one in it, where it is not there yet."""
        place = f"{self.path}/{name}".rstrip("/")
        self._ask(name, lambda: self.filesystem.create_dir(place, recursive=True))

    def write(self, name: str, content: bytes) -> None:
        """Write one file in one piece: object stores show it when complete, local files are renamed."""
        target = f"{self.path}/{name}"
        self.make(os.path.dirname(name))
        self._ask(name, lambda: _replace(target, content) if self.local else self._upload(target, content))

    def _upload(self, target: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(target) as stream:
            stream.write(content)

    def read(self, name: str) -> bytes:
        """Return the content of one file; FileNotFoundError where there is none."""

        def read() -> bytes:
            with self.filesystem.open_input_stream(f"{self.path}/{name}", compression=None) as stream:
                return stream.readall()

        return self._ask(name, read)

    def exists(self, name: str) -> bool:
        """Return whether the file or folder exists."""
        return self.type(name) != pa.fs.FileType.NotFound

    def type(self, name: str = "") -> pa.fs.FileType:
        """Return what lies under the name, or what the folder itself is: File, Directory or NotFound."""
        place = f"{self.path}/{name}".rstrip("/")
        return self._ask(name, lambda: self.filesystem.get_file_info(place)).type

    def names(self, folder: str = "", files: bool = True) -> list[str]:
        """Return the sorted names of what is in a sub-folder: its files, or else everything."""
        selector = pa.fs.FileSelector(f"{self.path}/{folder}".rstrip("/"), allow_not_found=True)
        found = self._ask(folder, lambda: self.filesystem.get_file_info(selector))
        return sorted(i.base_name for i in found if not files or i.type == pa.fs.FileType.File)

    def remove(self, name: str) -> None:
        """Remove one file."""
        self._ask(name, lambda: self.filesystem.delete_file(f"{self.path}/{name}"))

    def remove_folder(self, name: str) -> None:
        """Remove a sub-folder that this process has made, and what is in it, where it exists."""
        if self.exists(name):
            self._ask(name, lambda: self.filesystem.delete_dir(f"{self.path}/{name}"))

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file that people can read."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Read a JSON file; raises UserError where it is damaged."""
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.place(name)} is damaged ({error}); {REMEDY.get(name, PUT_BACK)}"
            ) from None

    def _ask(self, name: str, call: Callable[[], T]) -> T:
        """Return `call()`, asked again where a store fails; what stays wrong is a MachineError."""
        try:
            return retry(call, self.filesystem, self.place(name))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise broken(self.place(name), error) from None


PUT_BACK = "put it back as it was, or choose another --name"
REMEDY = {"result.json": "remove that file, and the same command evaluates the run anew"}


def read_lines(folder: RunFolder, name: str) -> list[Row]:
    """Return the rows of a file of JSON lines: numbers by name, `step` among them; no file has none.

    A line that a kill has torn is left out, and one that is no such row.
    """
    rows = []
    for line in folder.read(name).decode(errors="replace").splitlines() if folder.exists(name) else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and is_count(row.get("step")) and all(map(_is_number, row.values())):
            rows.append(row)
    return rows


def _is_number(value: Any) -> bool:
    """Tell whether this is a number of a row: finite, and None for one that was not."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (known and abs(value) < LARGEST)


def is_count(value: Any) -> bool:
    """Tell whether this counts something, as steps and epochs do."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def read_table(folder: RunFolder, name: str) -> pa.Table:
    """Return an index table of a run's images; raises UserError where it is gone or damaged."""
    try:
        return parse_index(folder.read(name))
    except FileNotFoundError:
        raise UserError(f"{folder.place(name)} is gone; {PUT_BACK}") from None
    except NoIndexError as error:
        raise UserError(f"{folder.place(name)} {error}; {PUT_BACK}") from None


def read_saved(folder: RunFolder) -> dict[str, Any]:
    """Return the options that a run was started with, as they stand in its file; older runs lack some.

    Raises UserError where there are none or they are damaged.
    """
    place = folder.place("config.yaml")
    try:
        content = folder.read("config.yaml")
    except FileNotFoundError:
        raise UserError(
            f"{folder.uri}: no run there (config.yaml is missing); give the folder that a run printed"
        ) from None
    try:
        saved = parse_mapping(content, place)
    except UserError as error:
        raise _damaged(place, error) from None
    missing = [part for part in ("data", "model", "method", "train") if not isinstance(saved.get(part), dict)]
    if missing:
        raise _damaged(place, f"there are no options of {', '.join(missing)}")
    return saved


def saved_config(folder: RunFolder) -> Config:
    """Return the configuration that a run was started with; raises UserError as `read_saved` does."""
    saved = read_saved(folder)
    try:
        return validate(merge(saved))
    except UserError as error:
        raise _damaged(folder.place("config.yaml"), error) from None


def _damaged(place: str, reason: UserError | str) -> UserError:
    said = str(reason).removeprefix(f"{place}: ")
    return UserError(f"{place} is damaged ({said}); {PUT_BACK}")


def _replace(target: str, content: bytes) -> None:
    """Put a file in its place in one move, and on the disk before that: a power cut leaves the old or the new."""
    part = f"{target}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise


def save_checkpoint(folder: RunFolder, state: dict[str, Any], keep: int) -> str:
    """Write `state` (tensors and plain values) as checkpoints/step-N.pt and drop all but the newest `keep`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = f"step-{state['step']:08d}.pt"
    folder.write(f"checkpoints/{name}", buffer.getvalue())
    for old in checkpoint_names(folder)[:-keep]:
        folder.remove(f"checkpoints/{old}")
    return name


def checkpoint_names(folder: RunFolder) -> list[str]:
    """Return the names of the complete checkpoints, oldest first."""
    return [name for name in folder.names("checkpoints") if name.startswith("step-") and name.endswith(".pt")]


def load_checkpoint(folder: RunFolder, name: str | None = None) -> dict[str, Any] | None:
    """Read the named or the newest checkpoint on the CPU; None where the run has none yet.

    Only tensors and plain values are accepted (`weights_only=True`): a checkpoint cannot run code.
    """
    names = checkpoint_names(folder)
    if name is None and not names:
        return None
    if name is not None and name not in names:
        raise UserError(f"{folder.uri}: no checkpoint '{name}'; there are: {', '.join(names) or 'none'}")
    chosen = name or names[-1]
    content = folder.read(f"checkpoints/{chosen}")
    try:
        check_sums(content)
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or not saved.keys() >= KEYS or not is_count(saved["step"]):
            raise ValueError("it is no checkpoint of a run")
        return saved
    except Exception as error:
        reason = printable((str(error).splitlines() or [type(error).__name__])[0])[:200]
        raise UserError(
            f"{folder.place('checkpoints', chosen)} cannot be read ({reason}); remove that file to go on from the "
            "one before it"
        ) from None


KEYS = {"step", "method", "optimizer", "queue", "bank"}  # of a checkpoint


def check_sums(content: bytes) -> None:
    """Raise ValueError where a byte of a checkpoint has changed since it was written.

    The file is a zip archive: PyTorch writes a CRC-32 of each tensor into it, and does not look at them.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            changed = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError(f"it is cut or damaged: {error}") from None
    if changed is not None:
        raise ValueError(f"its bytes have changed since it was written: {changed}")

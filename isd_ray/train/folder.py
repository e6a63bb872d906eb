"""The run folder: everything a run leaves behind, on a local disk or any pyarrow file system (S3, GCS).

config.yaml  selection.parquet  metrics.jsonl  tensorboard/  bad_samples.jsonl
checkpoints/step-00001234.pt  backbone.safetensors  result.json
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import torch

from isd_ray.errors import UserError


class RunFolder:
    """Reads and writes whole files under one folder or URI; a file appears under its name only when complete."""

    def __init__(self, uri: str) -> None:
        if "://" not in uri:
            uri = str(Path(uri).expanduser().absolute())
        self.uri = uri.rstrip("/")
        try:
            self.filesystem, self.path = pa.fs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"output {uri}: {error}; give a folder or an s3:// or gs:// URI") from None
        self.local = isinstance(self.filesystem, pa.fs.LocalFileSystem)

    def write(self, name: str, content: bytes) -> None:
        """Write one file in one piece: object stores show it when complete, local files are renamed."""
        target = f"{self.path}/{name}"
        self.filesystem.create_dir(os.path.dirname(target), recursive=True)
        part = f"{target}.part" if self.local else target
        with self.filesystem.open_output_stream(part) as stream:
            stream.write(content)
        if self.local:
            os.replace(part, target)

    def read(self, name: str) -> bytes:
        """Return the content of one file; FileNotFoundError where there is none."""
        with self.filesystem.open_input_stream(f"{self.path}/{name}", compression=None) as stream:
            return stream.readall()

    def exists(self, name: str) -> bool:
        """Tell whether the file or folder exists."""
        return self.filesystem.get_file_info(f"{self.path}/{name}").type != pa.fs.FileType.NotFound

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files in a sub-folder."""
        selector = pa.fs.FileSelector(f"{self.path}/{folder}", allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def remove(self, name: str) -> None:
        """Remove one file."""
        self.filesystem.delete_file(f"{self.path}/{name}")

    def remove_folder(self, name: str) -> None:
        """Remove a sub-folder and what is in it, where it exists."""
        if self.exists(name):
            self.filesystem.delete_dir(f"{self.path}/{name}")

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file that people can read."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Read a JSON file."""
        return json.loads(self.read(name))


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
    try:
        content = folder.read(f"checkpoints/{chosen}")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{folder.uri}/checkpoints/{chosen} cannot be read ({type(error).__name__}: {error}); "
            "remove that file to go on from the one before it"
        ) from None

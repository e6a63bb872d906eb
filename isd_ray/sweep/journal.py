"""The search's memory: every draw, result and decision as a line of JSON that survives a kill at any moment."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from optuna.storages.journal import BaseJournalBackend

from isd_ray.errors import UserError
from isd_ray.train.folder import RunFolder

FILE = "journal.jsonl"


class FolderJournal(BaseJournalBackend):
    """Optuna's log in a run folder, a JSON list of entries a line. It has one writer, `only_driver` sees to that.

    What is logged within `at_once` becomes one line: a kill leaves all of it or nothing. A local file grows line by
    line and is synced; an object store, which cannot append, gets the whole file. A last line that a kill has torn is
    dropped: what it said had not happened yet.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        text = folder.read(FILE).decode(errors="replace") if folder.exists(FILE) else ""
        self.lines = text.splitlines(keepends=True)
        if self.lines and not _is_whole(self.lines[-1]):
            self.lines.pop()
        folder.write(FILE, "".join(self.lines).encode())
        self.entries: list[dict[str, Any]] = []
        for number, line in enumerate(self.lines, 1):
            if not _is_whole(line) or not isinstance(json.loads(line), list):
                raise UserError(
                    f"{folder.uri}/{FILE}: line {number} is damaged; cut the file before it, or start anew"
                )
            self.entries += json.loads(line)
        self.held: list[dict[str, Any]] | None = None

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the entries from this number on."""
        yield from self.entries[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add entries; they are on disk when this returns, or at the end of `at_once`."""
        self.entries += logs
        if self.held is None:
            self._write(logs)
        else:
            self.held += logs

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Write what is logged within as one line."""
        assert self.held is None
        self.held = []
        yield
        held, self.held = self.held, None
        if held:
            self._write(held)

    def _write(self, logs: list[dict[str, Any]]) -> None:
        line = json.dumps(logs, separators=(",", ":")) + "\n"
        self.lines.append(line)
        if not self.folder.local:
            self.folder.write(FILE, "".join(self.lines).encode())
            return
        with open(f"{self.folder.path}/{FILE}", "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith("\n")


def only_driver(folder: RunFolder, what: str = "sweep") -> IO[str] | None:
    """Hold the folder for this process until it ends, however it ends; None where the folder is not local.

    Raises UserError while another process holds it.
    """
    if not folder.local:
        return None
    import fcntl  # not on Windows, where Ray's clusters are not supported either

    folder.filesystem.create_dir(folder.path, recursive=True)
    file = open(f"{folder.path}/driver.lock", "a")  # noqa: SIM115 (the lock lasts as long as the file is open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(
            f"{folder.uri}: another process works on this {what}; wait for it, or choose another --name"
        ) from None
    return file

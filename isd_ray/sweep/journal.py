"""The search's memory: every draw, result and decision as a line of JSON that survives a kill at any moment."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from isd_ray.errors import UserError
from isd_ray.train.folder import RunFolder

FILE = "journal.jsonl"
NUMBER = "line"  # in the first entry of each line


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
            if not _is_whole(line) or not _is_number(number, json.loads(line)):
                raise UserError(
                    f"{folder.place(FILE)}: line {number} is damaged or one before it is missing; put the file back as "
                    "it was, cut it before this line, or choose another --name"
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
        numbered = [logs[0] | {NUMBER: len(self.lines) + 1}, *logs[1:]]
        line = json.dumps(numbered, separators=(",", ":")) + "\n"
        if self.folder.local:
            self._append(line)
        else:
            self.folder.write(FILE, "".join([*self.lines, line]).encode())
        self.lines.append(line)

    def _append(self, line: str) -> None:
        with open(f"{self.folder.path}/{FILE}", "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line.encode()) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(before)  # half a line would damage the file for what is added after it
                raise


def _is_number(number: int, entries: Any) -> bool:
    """Tell whether this is the line of that number; Optuna itself passes over what refers to a line that is gone."""
    good = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    return good and bool(entries) and entries[0].get(NUMBER, number) == number


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith("\n")

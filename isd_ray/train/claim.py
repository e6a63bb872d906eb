"""A folder belongs to one run, sweep or study, and one process writes to it at a time.

On a disk that process holds a lock of the operating system, which ends with it however it ends. A store
knows no locks: there it renews a small file, and another process takes over once that stands still.
"""

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from isd_ray.errors import MachineError, UserError, printable
from isd_ray.messages import note
from isd_ray.train.folder import RunFolder, checkpoint_names

MARK = ".isd_ray.json"  # says whose a folder is, and who writes to it
KINDS = {  # and what each has, also where it was begun by a version that left no mark
    "run": ("config.yaml", "selection.parquet"),
    "sweep": ("space.yaml", "journal.jsonl"),
    "study": ("study.yaml", "cells"),
}
GRACE = 5.0  # seconds in which what a killed process has started lets go of its lock
RENEW = 5.0  # seconds between two signs of life in a store
SILENT = 30.0  # seconds without one after which a process counts as gone


@contextmanager
def claimed(folder: RunFolder, kind: str) -> Iterator[None]:
    """Keep the folder of a run, sweep or study to this process while it works there.

    Raises UserError where the folder holds something else or another process works on it.
    """
    refuse_foreign(folder, kind)
    me = {"kind": kind, "host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    with _locked(folder, me) if folder.local else _leased(folder, me):
        yield


def refuse_foreign(folder: RunFolder, kind: str) -> None:
    """Raise UserError where the folder is there, is not empty, and is not one of this kind of ours."""
    if folder.type() == pa.fs.FileType.File:
        raise UserError(f"{folder.uri} is a file; choose another --name or --output")
    names = set(folder.names(files=False))
    if not names or (names == {MARK} and not folder.read(MARK)):  # the latter was killed as it began
        return
    kinds = [_mark(folder).get("kind"), *(k for k, files in KINDS.items() if names >= set(files))]
    holds = next((k for k in kinds if k in KINDS), None)
    only_checkpoints = kind == "run" and "checkpoints" in names and bool(checkpoint_names(folder))
    if holds == kind or only_checkpoints:
        return
    held = f"a {holds}" if holds else printable(", ".join(sorted(names))[:100])
    raise UserError(
        f"{folder.uri} holds {held}, which is no {kind} of ours; choose another --name, or another --output"
    )


def _mark(folder: RunFolder) -> dict[str, Any]:
    """Return what the mark says; {} where there is none, or one that a kill or a store has cut."""
    try:
        mark = json.loads(folder.read(MARK))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _in_use(folder: RunFolder, mark: dict[str, Any]) -> UserError:
    kind, host, pid = (printable(str(mark.get(name, "?"))[:80]) for name in ("kind", "host", "pid"))
    return UserError(
        f"{folder.uri}: another process (number {pid} on {host}) works on this {kind}; wait for it, or choose "
        "another --name"
    )


# -- on a disk -----------------------------------------------------------------------------------------------


@contextmanager
def _locked(folder: RunFolder, me: dict[str, Any]) -> Iterator[None]:
    import fcntl  # not on Windows, where Ray's clusters are not supported either

    folder.make()
    with Path(folder.path, MARK).open("a+") as file:
        end = time.monotonic() + GRACE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise _in_use(folder, _mark(folder)) from None
                time.sleep(0.1)
        file.truncate(0)
        file.write(json.dumps(me))
        file.flush()
        yield


# -- in a store ----------------------------------------------------------------------------------------------


@contextmanager
def _leased(folder: RunFolder, me: dict[str, Any]) -> Iterator[None]:
    _wait_for_silence(folder)
    lease = _Lease(folder, me)
    try:
        yield
    finally:
        lease.end()


def _wait_for_silence(folder: RunFolder) -> None:
    """Return when nobody renews the mark (any more); raises UserError as soon as somebody does."""
    first = _mark(folder)
    if first.get("token") is None or _died_here(first):
        return
    writer = f"process {first.get('pid')} on {first.get('host')}"
    note(f"{folder.uri} was written by {writer}; waiting up to {SILENT:.0f} s to see whether it still lives")
    end = time.monotonic() + SILENT
    while time.monotonic() < end:
        time.sleep(RENEW / 5)
        now = _mark(folder)
        if now.get("token") is None:
            return
        if now != first:
            raise _in_use(folder, now)


def _died_here(mark: dict[str, Any]) -> bool:
    """Return whether the mark is of a process of this machine that is no more."""
    return mark.get("host") == socket.gethostname() and not Path(f"/proc/{mark.get('pid')}").exists()


class _Lease:
    """Renews the mark from a thread; ends this process where another one has taken the folder over."""

    def __init__(self, folder: RunFolder, me: dict[str, Any]) -> None:
        self.folder, self.me, self.turn = folder, me, 0
        self.over = threading.Event()
        self._write()
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        self.turn += 1
        self.folder.write(MARK, json.dumps(self.me | {"turn": self.turn}).encode())

    def _renew(self) -> None:
        while not self.over.wait(RENEW):
            try:
                holder = _mark(self.folder).get("token", self.me["token"])
                if holder == self.me["token"]:
                    self._write()
                    continue
            except MachineError:
                continue  # the store is away: what is written meanwhile fails by itself
            note(f"error: {self.folder.uri}: another process took over while this one stood still")
            os.kill(os.getpid(), signal.SIGTERM)
            return

    def end(self) -> None:
        """Give the folder back: the mark stays, and says that nobody writes."""
        self.over.set()
        self.thread.join()
        if _mark(self.folder).get("token") == self.me["token"]:
            self.folder.write(MARK, json.dumps({"kind": self.me["kind"]}).encode())

"""Reading from a store that fails now and then: a request is repeated, with growing waits, a bounded number of times.

pyarrow itself repeats for a few seconds what its S3 client calls retryable (connections, 5xx). This stands above it,
for longer outages, for short answers, and for every other remote file system. A disk is asked once.
"""

import io
import random
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

from isd_ray.errors import MachineError, printable

TRIES = 5  # the four waits between them add up to about WAIT * 15
WAIT = 0.5  # seconds before the second try; doubled before each further one
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # no wait mends these

AWAY = 60.0  # seconds after a request that failed in all tries in which others are tried once

T = TypeVar("T")
_away: list[tuple[pafs.FileSystem, float]] = []  # the store that failed last, and when


class StoreError(MachineError):
    """A remote store did not answer in all tries. It says nothing about the data, so no image counts as broken."""


def retry(call: Callable[[], T], filesystem: pafs.FileSystem, place: str) -> T:
    """Return `call()`, tried up to TRIES times where it raises OSError; `place` is what the error names.

    A store that has just failed in all tries is asked once: a job that ends has more to write, and would
    wait as long for each of it.

    Raises:
        StoreError: the last try failed too.
        OSError: at once, from a local file system or where a wait mends nothing (no such file, no permission).
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return call()
    tries = 1 if _has_failed(filesystem) else TRIES
    for turn in range(tries):
        try:
            answer = call()
            _away.clear()
            return answer
        except _FINAL:
            raise
        except OSError as error:
            reason = str(error)
        if turn + 1 < tries:
            time.sleep(WAIT * 2**turn * random.uniform(0.5, 1.5))  # apart, lest all readers come back at once
    _away[:] = [(filesystem, time.monotonic())]
    often = f"{tries} times" if tries > 1 else "again"
    raise StoreError(
        f"the store failed {often} at '{printable(place)}': {printable(reason)[:300]}. Check endpoint, "
        "credentials and network, then start again; a run continues from its checkpoint."
    )


def _has_failed(filesystem: pafs.FileSystem) -> bool:
    return any(filesystem.equals(store) and time.monotonic() < since + AWAY for store, since in _away)


class StoredFile(io.RawIOBase):
    """A file on a disk or in a store, read by range; failed and short answers are asked for again.

    Raises OSError and StoreError as `retry` does.
    """

    def __init__(self, filesystem: pafs.FileSystem, path: str):
        super().__init__()
        self.filesystem, self.path, self.place = filesystem, path, 0
        self.file: pa.NativeFile = retry(lambda: filesystem.open_input_file(path), filesystem, path)
        self.length: int = retry(self.file.size, filesystem, path)

    def read_at(self, count: int, start: int) -> bytes:
        """Return `count` bytes from `start` on, fewer only where the file ends before."""
        wanted = max(0, min(count, self.length - start))

        def read() -> bytes:
            data = self.file.read_at(wanted, start) if wanted else b""
            if len(data) < wanted:
                raise OSError(f"{len(data)} of {wanted} bytes came")
            return data

        return retry(read, self.filesystem, self.path)

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self.read_at(len(buffer), self.place)
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()

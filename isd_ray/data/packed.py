"""Compressed tars. Nothing in them has a place to be read at: they are unpacked from the front, slowly."""

import bz2
import gzip
import io
import lzma
import zlib
from typing import Any, Self

from pyarrow import fs as pafs

from isd_ray.data.store import StoredFile

UNPACKERS = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}
UNKNOWN = (".tar.zst",)  # no module of Python 3.11's unpacks it
BUFFER = 1 << 20
SLOW = "each read unpacks such a shard from its front: slow; repack them as plain .tar"


def is_packed(name: str) -> bool:
    """Tell by its name whether a shard is compressed."""
    return name.lower().endswith((*UNPACKERS, *UNKNOWN))


def open_shard(filesystem: pafs.FileSystem, path: str) -> "StoredFile | UnpackedFile":
    """Open a shard for reads by range, compressed or not; raises OSError and StoreError as `StoredFile` does."""
    return UnpackedFile(filesystem, path) if is_packed(path) else StoredFile(filesystem, path)


class UnpackedFile(io.RawIOBase):
    """A compressed file as if it were plain; a read before the last one starts from the front again.

    Raises OSError where the file is damaged or cut short, besides what `StoredFile` raises.
    """

    def __init__(self, filesystem: pafs.FileSystem, path: str):
        super().__init__()
        suffix = next((s for s in UNPACKERS if path.lower().endswith(s)), None)
        if suffix is None:
            raise OSError("compressed tar: unpack it, nothing here reads this kind")
        self._stored = StoredFile(filesystem, path)
        self._plain: Any = UNPACKERS[suffix](io.BufferedReader(self._stored, BUFFER))  # type: ignore[operator]

    @property
    def length(self) -> int:
        """Bytes of the unpacked file; finding out takes a pass over it."""
        place = self.tell()
        end = self.seek(0, io.SEEK_END)
        self.seek(place)
        return end

    def read_at(self, count: int, start: int) -> bytes:
        """Return `count` bytes from `start` on, fewer only where the file ends before."""
        self.seek(start)
        return self._guard(lambda: self._plain.read(max(count, 0)))

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._guard(lambda: self._plain.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._guard(lambda: self._plain.seek(offset, whence))

    def tell(self) -> int:
        return self._plain.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._plain.close()
            self._stored.close()
        super().close()

    def __enter__(self) -> Self:
        return self

    @staticmethod
    def _guard(call: Any) -> Any:
        try:
            return call()
        except EOFError:
            raise OSError("the compressed shard is cut short") from None
        except (zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise OSError(f"the compressed shard is damaged: {error}") from None

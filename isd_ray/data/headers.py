"""What the headers of a tar call its members, by the rules of Python's tarfile."""

import io
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Self

BLOCK = 512  # bytes of a header; a tar consists of blocks of this size
EXTENDED_BYTES = 1 << 20  # a long name or a set of pax records beyond this is an attempt to fill the memory
_EXTENDED = b"LKxgX"  # header kinds that say something of the member behind them
_ENCODING, _ERRORS = "utf-8", "backslashreplace"
_TRIES = 8  # headers that may stand before a member's own: a long name, a long link, records


class Member(tarfile.TarInfo):
    """A header that claims nothing absurd: tarfile itself would go back for ever, or read gigabytes
    as a name.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        is_header = info.type not in tarfile.REGULAR_TYPES and info.type in _EXTENDED
        if info.size < 0 or (is_header and info.size > EXTENDED_BYTES):
            raise tarfile.ReadError(f"a header claims {info.size} bytes")
        return info


def open_tar(file: io.BufferedIOBase) -> tarfile.TarFile:
    """Open an uncompressed tar; bytes of a name that are no UTF-8 stand in it as `\\xNN`.

    Raises tarfile.ReadError, and on hostile bytes nearly anything.
    """
    return tarfile.open(fileobj=file, mode="r:", tarinfo=Member, encoding=_ENCODING, errors=_ERRORS)


def split_key(name: str) -> tuple[str, str]:
    """Return key and extension of a member: its path before and after the base name's first dot."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension.lower()


def stated_size(header: bytes) -> int:
    """Return the size of the member that a header of 512 bytes states, -1 where it states none."""
    try:
        return tarfile.nti(header[124:136])  # type: ignore[attr-defined]
    except tarfile.HeaderError:
        return -1


def has_key(data: bytes, at: int, key: str) -> bool:
    """Tell whether the member whose own header ends at data[at] has this key.

    A name that is long, or in pax tars not ASCII, stands cut or mangled in the member's own header,
    and whole in headers before it; they are found where `data` reaches back to them.
    """
    header = data[at - BLOCK : at]
    name, end, _ = header[:100].partition(b"\0")
    start = key.encode() + b"."
    if end and not header[345] and name.startswith(start) and b"/" not in name[len(start) :]:
        return True  # what nearly every member says; the rest of this takes a hundred times as long
    return any(split_key(stated)[0] == key for stated in _names(data, at))


def _names(data: bytes, at: int) -> Iterator[str]:
    """Yield the names that the header ending at data[at] has alone, and with the extended headers
    before it.
    """
    tries = 0
    for start in range(at - BLOCK, max(-1, at - 4 * BLOCK - EXTENDED_BYTES), -BLOCK):
        if not (start == at - BLOCK or data[start + 156] in _EXTENDED):
            continue
        try:
            Member.frombuf(data[start : start + BLOCK], _ENCODING, _ERRORS)
            tries += 1
            info = open_tar(io.BytesIO(data[start:at])).next()
        except Exception:  # these bytes are no header, or hostile: tarfile raises nearly anything
            info = None
        if info is not None and info.offset_data == at - start:
            yield info.name
        if tries == _TRIES:
            return

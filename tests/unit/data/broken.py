"""Broken and hostile images and tars, made byte by byte, for the tests of the data engine."""

import io
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
from PIL import Image

from isd_ray.data.stream import Stream

WIDTH, HEIGHT = 12, 8
Member = tuple[str, bytes] | tarfile.TarInfo


def pixels(seed: int = 0) -> Image.Image:
    """A small image without symmetry."""
    values = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return Image.fromarray(values)


def file(image: Image.Image | None = None, kind: str = "PNG", **options) -> bytes:
    """The file of an image."""
    (image or pixels()).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims a size, whatever its chunks hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG with a compressed comment of 256 MB."""
    packed = zlib.compressobj(9)
    body = b"".join(packed.compress(b"\0" * 2**22) for _ in range(64)) + packed.flush()
    rows = zlib.compress(b"\0" * (HEIGHT * (1 + 3 * WIDTH)))
    return png(WIDTH, HEIGHT, chunk(b"zTXt", b"Comment\0\0" + body), chunk(b"IDAT", rows))


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields) -> tarfile.TarInfo:
    """A member without content: a link, a device."""
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def tar(*members: Member, format: int = tarfile.GNU_FORMAT, encoding: str = "utf-8") -> bytes:
    """A tar of (name, content) pairs and members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding=encoding) as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
            else:
                name, content = member
                out.addfile(info(name, size=len(content)), io.BytesIO(content))
    return buffer.getvalue()


def sample(
    key: str, label: int | None = 0, extension: str = "png", content: bytes | None = None
) -> list[Member]:
    """An image member and its label."""
    image: Member = (f"{key}.{extension}", file() if content is None else content)
    return [image] if label is None else [image, (f"{key}.cls", str(label).encode())]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """The 512 bytes of a tar header with a right checksum and any size, also a negative one (base 256)."""
    block = bytearray(info(name, kind).tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 2**88).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def before_end(content: bytes, raw: bytes) -> bytes:
    """Put raw blocks between the members of a tar and its end."""
    end = max(i for i in range(0, len(content), 512) if any(content[i : i + 512])) + 512
    while len(content) > end and any(content[end : end + 512]):
        end += 512
    return content[:end] + raw + content[end:]


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def streamed(table: pa.Table, cache: str = "none") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """One epoch in one batch: images by key, and the reasons of the bad ones by key."""
    stream = Stream(table, seed=0, global_batch=len(table), size=8, views=["weak"], cache=cache, max_bad=1.0)
    keys = table["key"].to_pylist()
    (batch,) = stream.epoch(0)
    images = {keys[i]: image for i, image in zip(batch.index.tolist(), batch.image.numpy(), strict=True)}
    assert len(images) == len(batch.index), "an image came twice"
    return images, {entry["key"]: entry["reason"] for entry in stream.bad}

"""Images, and what holds them: folders, Parquet files, tars; also those that claim more than they are."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import ARRAYS, FILES, TEXTS, damaged, parquet_files, texts
from doors import knock
from fuzzing import fuzz
from hypothesis import strategies as st
from sandbox import put
from world import World, picture, rows_of

ENDINGS = ("png", "jpg", "jpeg", "webp", "bmp", "ppm", "tif", "gif", "PNG", "txt", "png.png", "")
GOOD = [
    picture(0, n, kind)
    for n, kind in enumerate(("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "JPEG2000"))
]


def claiming(width: int, height: int) -> bytes:
    """A PNG that says to have these sides."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


CLAIMS = [claiming(w, h) for w, h in ((60_000, 60_000), (2**31 - 1, 1), (0, 0), (1, 20_000), (8, 8))]
contents = st.one_of(
    st.sampled_from(GOOD), st.sampled_from(GOOD), st.sampled_from(CLAIMS), st.sampled_from(FILES),
    *(damaged(good) for good in GOOD[:6]),
)  # fmt: skip
names = st.one_of(st.sampled_from(TEXTS), texts, st.text("abc._- é", min_size=1, max_size=6))


def safe(name: str) -> bytes:
    """Return a name that a file can have: a part of a path, in bytes."""
    odd = name.replace("\0", "").replace("/", "_").encode("utf-8", "surrogatepass")[:200]
    return b"x" if odd in (b"", b".", b"..") else odd


# -- folders -------------------------------------------------------------------------------------------------


def _link(place: bytes, target: str) -> None:
    os.symlink(target, place)


KINDS: tuple[Callable[[bytes], None], ...] = (
    lambda place: os.mkdir(place),
    lambda place: os.mkfifo(place),
    lambda place: _link(place, ".."),
    lambda place: _link(place, "."),
    lambda place: _link(place, "nowhere"),
    lambda place: _link(place, os.fsdecode(place)),
    lambda place: _link(place, "/dev/zero"),
    lambda place: _link(place, "../../precious.txt"),
)


@st.composite
def folders(draw: Any) -> list[tuple[bytes, bytes, bytes | Callable[[bytes], None]]]:
    """Return entries of a folder: class, name, and the content of a file or what else lies there."""
    entry = st.tuples(
        st.one_of(st.sampled_from(("a", "b")), st.just(""), names).map(safe),
        st.tuples(names.map(safe), st.sampled_from(ENDINGS)).map(lambda p: p[0] + b"." + p[1].encode()),
        st.one_of(contents, contents, contents, st.sampled_from(KINDS)),
    )
    return draw(st.lists(entry, min_size=1, max_size=6))


@fuzz(220, entries=folders(), max_bad=st.sampled_from(("0.01", "0.5", "1")))
def test_folders(entries, max_bad, sandbox, jobs) -> None:
    sandbox.fresh()
    source = os.fsencode(sandbox.inputs / "photos")
    os.mkdir(source)
    for folder, name, content in entries:
        place = os.path.join(source, b"" if folder == b"x" else folder)
        if not os.path.lexists(place):
            os.mkdir(place)
        if not os.path.isdir(place):
            continue
        place = os.path.join(place, name)
        if os.path.lexists(place):
            continue
        if callable(content):
            content(place)
        else:
            Path(os.fsdecode(place)).write_bytes(content)
    out = sandbox.out / "shards"
    given = [f"--source=folder:{os.fsdecode(source)}", f"--out={out}", f"--max-bad={max_bad}"]
    answer = knock("image folders", jobs["make_shards"], given, sandbox, writes=[out], about=entries)
    if answer.code == 0:
        knock(
            "image folders, checked",
            jobs["make_shards"],
            [f"--verify={out / 'train'}"],
            sandbox,
            codes=(0, 1),
        )


# -- Parquet -------------------------------------------------------------------------------------------------


def test_parquet(world: World, sandbox, jobs) -> None:
    content = world.parquet.read_bytes()
    columns = st.sampled_from(("", "", "--image-column=key", "--label-column=label_name", "--label-column=none",
                               "--label-column=image", "--label-column=x"))  # fmt: skip

    @fuzz(
        260,
        first=parquet_files(content),
        second=st.one_of(st.none(), st.none(), parquet_files(content)),
        column=columns,
    )
    def case(first: bytes, second: bytes | None, column: str) -> None:
        sandbox.fresh()
        (sandbox.inputs / "a.parquet").write_bytes(first)
        if second is not None:
            (sandbox.inputs / "b.parquet").write_bytes(second)
        out = sandbox.out / "shards"
        given = [f"--source={sandbox.inputs}", f"--out={out}", "--max-bad=0.5", *filter(None, [column])]
        knock(
            "Parquet",
            jobs["make_shards"],
            given,
            sandbox,
            writes=[out],
            about=(first[-600:], second and second[-600:]),
        )

    case()


@pytest.mark.parametrize("column", ["image", "label", "key", "label_name"])
def test_parquet_of_every_type(column, sandbox, jobs) -> None:
    """Each kind of column once: the strategies above may not come to all of them."""
    table = pa.Table.from_pylist(rows_of("test"))
    for number, make in enumerate(ARRAYS):
        sandbox.fresh()
        changed = table.set_column(table.column_names.index(column), column, make(table.num_rows))
        pq.write_table(changed, sandbox.inputs / "a.parquet")
        out = sandbox.out / "shards"
        given = [f"--source={sandbox.inputs / 'a.parquet'}", f"--out={out}", "--max-bad=1"]
        about = f"{column}: array {number}, {changed[column].type}"
        knock("Parquet of every type", jobs["make_shards"], given, sandbox, writes=[out], about=about)


# -- tars ----------------------------------------------------------------------------------------------------

TYPES = (
    *(tarfile.REGTYPE,) * 8, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
    tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"L", b"x", b"Z",
)  # fmt: skip
LABELS = (
    b"0", b"1", b"2", b"-1", b"", b"x", b"999999999", b"1048575", b"1e3", b" 1 ", b"\xff", b"9" * 5000,
    b'{"label": 1}', b'{"label": "a"}', b'{"label": 1.5}', b"[" * 3000, b"null",
)  # fmt: skip
labels = st.sampled_from(LABELS)
keys = st.one_of(st.sampled_from(("a", "b", "a/b", "../../x", "/x", "__a__", "a.b", "", "x" * 150)), names)


@st.composite
def tars(draw: Any) -> bytes:
    """Return a tar of samples, some of which are odd."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=draw(st.sampled_from((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    ) as tar:
        for _ in range(draw(st.integers(0, 5))):
            key = draw(keys).replace("\0", "")
            for ending, strategy in draw(
                st.sampled_from(
                    (
                        (("png", contents), ("cls", labels)),
                        (("png", contents),),
                        (("cls", labels),),
                        (("jpg", contents), ("json", labels)),
                    )
                )
            ):
                content = draw(strategy)
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.type, info.size = draw(st.sampled_from(TYPES)), len(content)
                info.linkname = "../../precious.txt"
                try:
                    tar.addfile(info, io.BytesIO(content))
                except (ValueError, UnicodeEncodeError):
                    break
    return buffer.getvalue()


PACKERS = {".tar": bytes, ".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress,
           ".tar.xz": lzma.compress, ".tar.zst": bytes}  # fmt: skip


def test_tars(world: World, sandbox, jobs) -> None:
    good = (world.shards / "test" / "test-000000.tar").read_bytes()

    @fuzz(
        260,
        content=st.one_of(tars(), tars(), tars().flatmap(damaged), damaged(good)),
        ending=st.sampled_from((".tar",) * 6 + tuple(PACKERS)),
        packed=st.booleans(),
        names=st.sampled_from((b"", b"a\nb\nc\n", b"a\n", b"\xff", b"\x1b[31m\n" * 9)),
        door=st.sampled_from(("--index-only", "--source", "--verify")),
    )
    def case(content: bytes, ending: str, packed: bool, names: bytes, door: str) -> None:
        sandbox.fresh()
        place, out = sandbox.inputs / "shards", sandbox.out / "shards"
        place.mkdir()
        whole = PACKERS[ending](content) if packed else content
        (place / f"a{ending}").write_bytes(whole)
        (sandbox.inputs / "names.txt").write_bytes(names)
        if door == "--verify":
            put(world.shards / "test" / "index.parquet", place / "index.parquet")
            (place / f"a{ending}").rename(place / "test-000000.tar")
        given = [f"{door}={place}"] + {
            "--index-only": [
                "--max-bad=0.9",
                *([f"--classes={sandbox.inputs / 'names.txt'}"] if names else []),
            ],
            "--source": [f"--out={out}", "--max-bad=0.9"],
            "--verify": [],
        }[door]
        written = [place / "index.parquet", place / "bad_samples.jsonl"] if door == "--index-only" else [out]
        knock(f"tars, {door}", jobs["make_shards"], given, sandbox, writes=written, codes=(0, 1, 2),
              about=(ending, packed, names, whole[:700]))  # fmt: skip

    case()


# -- the index -----------------------------------------------------------------------------------------------


def test_index(world: World, sandbox, jobs, untrained) -> None:
    content = (world.shards / "train" / "index.parquet").read_bytes()
    doors = ("verify", "embed", "pretrain", "source", "train")

    @fuzz(220, changed=parquet_files(content), door=st.sampled_from(doors[:4]))
    def case(changed: bytes, door: str) -> None:
        sandbox.fresh()
        shards, out = put(world.shards, sandbox.inputs / "shards"), sandbox.out / "run"
        (shards / "train" / "index.parquet").write_bytes(changed)
        weights = world.root / "weights.safetensors"
        job, given = {
            "verify": ("make_shards", [f"--verify={shards / 'train'}"]),
            "source": ("make_shards", [f"--source=tars:{shards / 'train'}", f"--out={out}", "--max-bad=0.9"]),
            "embed": (
                "embed",
                [f"--weights={weights}", f"--shards={shards / 'train'}", f"--out={out}", "--max-bad=0.9"],
            ),
            "pretrain": (
                "pretrain",
                [*world.arguments(shards=shards), f"--output={sandbox.out}", "--name=run"],
            ),
        }[door]
        codes = (0, 1, 2) if door == "verify" else (0, 2)
        knock(f"index, {door}", jobs[job], given, sandbox, writes=[out], codes=codes, about=changed[-1500:])

    case()

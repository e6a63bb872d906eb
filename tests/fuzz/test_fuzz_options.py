"""Command lines: options that nobody has, values that nobody expects, names and places that lead elsewhere."""

import os
from pathlib import Path

import pytest
from damage import TEXTS, texts
from doors import SECRET, knock
from fuzzing import fuzz
from hypothesis import strategies as st
from sandbox import put
from world import World, as_arguments

from isd_ray.config import option_names

PLACES = ("name", "output", "address", "config")  # of what is written, or reached: apart, below
SLOW = ("data.dataset",)  # sets that are made on the way take seconds
OPTIONS = [name for name in option_names() if name not in (*PLACES, *SLOW)]
NUMBERS = (
    "0", "1", "-1", "2", "3", "8", "16", "0.5", "1e-9", "1e9", "2147483648",
    "18446744073709551616", "1e400", "-0.0", "inf", "nan", "true", "false", "9" * 5000,
)  # fmt: skip
LISTS = (
    "[]", "[0.5]", "[0,0,0]", "[1,2,3,4]", "[nan,0.5,0.5]", "[\"a\"]", "[null]", "[[]]", "{}",
    "{\"a\": 1}", "[0.1,0.2,0.3]", "0.1,0.2,0.3", "[", "{", "[" * 500, "n_max=1",
    "{\"n_max\": -5}", "{\"workers\": 1}", "[\"strong\",\"strong\"]", "[\"knn1\"]",
    "[\"knn1\",\"knn1\"]", "[1e999,1,1]", "[-1,1,1]",
)  # fmt: skip
KNOWN = (
    "simsiam", "moco_v2", "byol", "resnet20", "resnet8", "cifar", "stride2", "exponential",
    "step", "lars", "adamw", "natural", "list", "isd_8_30", "balanced", "random", "train",
    "memory", "none", "tasks", "device", "sync", "timm:none", "timm:resnet10t", "strong", "weak",
    "auto", "unit", "sharded", "float16",
)  # fmt: skip
values = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(LISTS), st.sampled_from(KNOWN), texts)


def word(text: str) -> str:
    """Return a text as an argument of a process can be: no NUL, and of bytes that are no UTF-8 what Python makes."""
    return "".join(
        c for c in text if c != "\0" and not ("\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff")
    )


words = st.one_of(
    st.tuples(st.sampled_from(OPTIONS), values).map(lambda p: [f"--{p[0]}={p[1]}"]),
    st.tuples(st.sampled_from(OPTIONS), values).map(lambda p: [f"--{p[0]}={p[1]}"]),
    st.tuples(st.sampled_from(OPTIONS), values).map(lambda p: [f"--{p[0]}", p[1]]),
    st.tuples(texts, values).map(lambda p: [f"--{p[0]}={p[1]}"]),
    st.sampled_from([*OPTIONS, "data", "train", "help", "h", "x", ""]).map(lambda name: [f"--{name}"]),
    texts.map(lambda text: [text]),
)


@fuzz(260, parts=st.lists(words, min_size=1, max_size=2))
def test_options_of_a_run(parts, world: World, sandbox, jobs, untrained) -> None:
    sandbox.fresh()
    extra = [word(text) for part in parts for text in part]
    given = [*world.command("pretrain", sandbox.out), *extra]
    knock("options of a run", jobs["pretrain"], given, sandbox, writes=[sandbox.out / "run"])


OWN = {  # options of the other jobs
    "evaluate": ("checkpoint", "bank", "protocols", "transfer-root", "shards", "root", "address", "linear", "x"),
    "embed": ("run", "weights", "shards", "dataset", "network", "checkpoint", "backbone", "stem", "encoder",
              "image-size", "split", "root", "dtype", "device", "workers", "batch-size", "max-bad", "x"),
    "make_shards": ("source", "index-only", "verify", "split", "name", "shard-size", "workers", "max-bad", "root",
                    "image-column", "label-column", "classes", "x"),
    "sweep": ("space", "trials", "address", "train.lr", "data.ratio", "queue.size", "x"),
    "compare": ("study", "report-only", "address", "train.lr", "train.epochs", "data.ratio", "queue.size", "x"),
}  # fmt: skip
CASES = {"evaluate": 60, "embed": 60, "make_shards": 120, "sweep": 50, "compare": 40}


@pytest.mark.parametrize("job", OWN)
def test_options_of_other_jobs(job, world: World, sandbox, jobs, untrained, light) -> None:
    option = st.sampled_from(OWN[job])
    one = st.one_of(
        st.tuples(option, values).map(lambda p: [f"--{p[0]}={p[1]}"]),
        st.tuples(option, values).map(lambda p: [f"--{p[0]}", p[1]]),
        option.map(lambda name: [f"--{name}"]),
        texts.map(lambda text: [text]),
    )

    @fuzz(CASES[job], given=st.lists(one, min_size=1, max_size=2), drop=st.booleans())
    def case(given: list[list[str]], drop: bool) -> None:
        sandbox.fresh()
        if job == "evaluate":
            put(world.run, sandbox.out / "run")
        base = world.command(job, sandbox.out)
        named = {text.partition("=")[0] for part in given for text in part}
        kept = [text for text in base if not drop or text.partition("=")[0] not in named]
        extra = [word(text) for part in given for text in part]
        codes = (0, 1, 2) if job in ("make_shards", "compare") else (0, 2)
        knock(
            f"options of {job}",
            jobs[job],
            [*kept, *extra],
            sandbox,
            writes=[sandbox.out / "run"],
            codes=codes,
        )

    case()


# -- names and places ----------------------------------------------------------------------------------------

names = st.one_of(
    st.sampled_from([text for text in TEXTS if text not in ("/", "~")]),
    st.sampled_from(
        ("a/../../b", "./a", "../../../x", "a//b", ".hidden", "-x", "a" * 250, "é" * 130, "run.", "CON")
    ),
    st.text(max_size=6).filter(lambda text: not text.startswith("/")),
)
WRITERS = ("pretrain", "sweep", "compare", "embed", "make_shards")


@pytest.mark.parametrize("job", WRITERS)
def test_names_and_places(job, world: World, sandbox, jobs, untrained, light) -> None:
    new = st.just("out/new")
    output = st.one_of(new, new, st.tuples(new, names).map("/".join), st.just("in/file"), st.just("link"))

    @fuzz(
        {"pretrain": 60, "sweep": 30, "compare": 20, "embed": 40, "make_shards": 60}[job],
        output=output,
        name=names,
    )
    def case(output: str, name: str) -> None:
        sandbox.fresh()
        (sandbox.inputs / "file").write_text("theirs\n")
        writes = [sandbox.out / "new", *([sandbox.elsewhere] if output == "link" else [])]
        if job in ("embed", "make_shards"):  # these are given a place and no name
            named = Path(os.path.normpath(sandbox.work / word(output) / word(name)))
            writes.append(named / "train" if named.is_dir() else named)
        given = world.command(job, word(output), word(name))
        knock(f"places of {job}", jobs[job], given, sandbox, writes=writes)

    case()


KEYED = (
    f"s3://key:{SECRET}@bucket/set?endpoint_override=127.0.0.1:1&scheme=http",
    f"s3://key:{SECRET}/x@bucket/set?endpoint_override=127.0.0.1:1&scheme=http",
    f"s3://bucket/set?endpoint_override=key:{SECRET}@127.0.0.1:1&scheme=http",
    f"S3://key:{SECRET}@bucket", f"s3://key:{SECRET}@", f"ftp://key:{SECRET}@host/x",
    f"x-y://k:{SECRET}@host/x", f"file://key:{SECRET}@host/x", f"s3a://key:{SECRET}@bucket/x",
    f"http://u:{SECRET}@host/x", f"s3:/k:{SECRET}@b/x", f"hdfs://user:{SECRET}@127.0.0.1:1/x",
    f"s3://key:{SECRET}@[::1/x", f"s3://key:{SECRET}@bucket/%zz",
)  # fmt: skip
ODD = (
    "s3://", "s3:///", "s3://?x", "file://", "file:///", "file:x", "://x", "a://b://c",
    "s3://b ucket/x", "s3://b/\x1b", "file://%00/x", "file:///%zz",
    "s3://bucket?endpoint_override=", "mock://x", "gs://", "abfs://x", "s3://bucket/x?unknown=1",
    "s3://bucket/x?scheme=ftp", "s3://bucket/x?region=\n",
)  # fmt: skip
uris = st.one_of(st.sampled_from(KEYED), st.sampled_from(ODD))


@fuzz(
    120,
    uri=uris,
    door=st.sampled_from(("output", "data.shards", "--run", "--out", "--source", "--verify", "--shards")),
)
def test_uris(uri, door, world: World, sandbox, jobs, untrained) -> None:
    sandbox.fresh()
    out = sandbox.out / "run"
    uri, weights = word(uri), f"--weights={world.root / 'weights.safetensors'}"
    job, given = {
        "output": ("pretrain", [*world.arguments(), f"--output={uri}"]),
        "data.shards": (
            "pretrain",
            [*as_arguments(world.options(**{"data.shards": uri})), f"--output={sandbox.out}"],
        ),
        "--run": ("evaluate", [uri]),
        "--out": ("embed", [weights, f"--shards={world.shards / 'test'}", f"--out={uri}"]),
        "--source": ("make_shards", [f"--source={uri}", f"--out={out}"]),
        "--verify": ("make_shards", [f"--verify={uri}"]),
        "--shards": ("embed", [weights, f"--shards={uri}", f"--out={out}"]),
    }[door]
    knock(f"URIs of {door}", jobs[job], given, sandbox, writes=[out], codes=(0, 2, 3))

"""Turn images into WebDataset shards plus an index, or index or check shards that exist already.

  python jobs/make_shards.py --source photos/ --out shards/photos
  python jobs/make_shards.py --source 'cifar10_train*.parquet' --out shards/cifar10
  python jobs/make_shards.py --source torchvision:SVHN --root ~/data --download --split test --out shards/svhn
  python jobs/make_shards.py --index-only s3://bucket/set/train
  python jobs/make_shards.py --verify shards/cifar10/train

Run it again after a stop: whole shards are kept. Use the result with `--data.shards shards/photos`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # works where the package is not installed

from isd_ray.ending import DONE, FOUND
from isd_ray.errors import UserError
from isd_ray.messages import Arguments, place, say, source
from isd_ray.supervisor import run

SHOWN = 50  # findings that are printed
PARSER = Arguments(__doc__)
what = PARSER.add_mutually_exclusive_group(required=True)
what.add_argument(
    "--source", type=source, help="image folder, Parquet file or glob, folder of tars, torchvision:NAME"
)
what.add_argument("--index-only", type=place, metavar="URI", help="index the tars of this folder, in place")
what.add_argument(
    "--verify", type=place, metavar="URI", help="read and decode everything; exit code 1 if anything is wrong"
)
option = PARSER.add_argument
option(
    "--out",
    type=place,
    help="folder (path or URI) that gets SPLIT/NAME-000000.tar ... and SPLIT/index.parquet",
)
option("--split", default="train", help="split to read and write (train)")
option("--name", help="beginning of the shards' names (the split)")
option("--shard-size", type=int, default=1000, help="samples a shard (1000)")
option("--workers", type=int, help="Ray tasks at once (every core); 0: without Ray")
option("--max-bad", type=float, default=0.01, help="part of the samples that may be bad (0.01)")
option("--root", type=place, help="where relative sources start and torchvision's files lie")
option("--download", action="store_true", help="let torchvision fetch missing files")
option("--image-column", default="image", help="Parquet column of image bytes (image)")
option("--label-column", default="label", help="Parquet column of labels (label); none: unlabelled")
option("--classes", type=place, help="with --index-only: text file of class names, one a line")


def main(arguments: list[str]) -> int:
    """Run the job; 1 where --verify found something, else the exit codes of isd_ray.ending."""
    options = vars(PARSER.parse_args(arguments))
    from isd_ray.data import files, index
    from isd_ray.data.packed import SLOW
    from isd_ray.data.shards import index_only, make_shards

    uri, images, names = options.pop("index_only"), options.pop("source"), options.pop("classes")
    folder = options.pop("verify")
    if folder:
        return verify(folder, options["workers"])
    if names and not uri:
        raise UserError("--classes goes with --index-only; other sources know their classes")
    if uri:
        table = index_only(uri, read_names(names), options["workers"], options["max_bad"])
        if packed := index.packed_shards(table):
            say(f"note: {packed} shards are compressed; {SLOW}")
    elif options["out"]:
        table = make_shards(images, quiet=False, **options)
    else:
        raise UserError("--source needs --out: the folder that gets the shards")
    place = files.join(index.root(table), index.FILE_NAME)
    say(f"{len(table)} images of {len(index.classes(table))} classes: {place}")
    return DONE


def read_names(path: str | None) -> list[str] | None:
    """Read the names of the classes, one a line."""
    if path is None:
        return None
    from isd_ray.data import files

    try:
        return files.read_bytes(path).decode().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"--classes {path}: the file is not UTF-8 text; save it as UTF-8") from None


def verify(folder: str, workers: int | None) -> int:
    """Print what is wrong with a folder of shards; returns the exit code."""
    from isd_ray.data.verify import verify_shards

    report = verify_shards(folder, workers=workers, quiet=False)
    for finding in report.findings[:SHOWN]:
        place = finding["shard"] if finding["key"] is None else f"{finding['shard']} {finding['key']}"
        say(f"{place}: {finding['reason']}")
    if len(report.findings) > SHOWN:
        say(f"... and {len(report.findings) - SHOWN} more")
    found = f"{len(report.findings)} findings" if report.findings else "nothing wrong"
    say(
        f"{report.shards} shards, {report.decoded} of {report.images} images decoded, "
        f"{report.bytes / 1e6:,.1f} MB: {found}"
    )
    return FOUND if report.findings else DONE


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

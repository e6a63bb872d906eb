"""Turn images into WebDataset shards plus an index, or index or check shards that exist already.

  python jobs/make_shards.py --source photos/ --out shards/photos
  python jobs/make_shards.py --source 'cifar10_train*.parquet' --out shards/cifar10
  python jobs/make_shards.py --source torchvision:SVHN --root ~/data --download --split test --out shards/svhn
  python jobs/make_shards.py --index-only s3://bucket/set/train
  python jobs/make_shards.py --verify shards/cifar10/train

Run it again after a stop: whole shards are kept. Use the result with `--data.shards shards/photos`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # works where the package is not installed

from isd_ray.data import files, index
from isd_ray.data.packed import SLOW
from isd_ray.data.shards import index_only, make_shards
from isd_ray.data.verify import verify_shards
from isd_ray.errors import UserError

SHOWN = 50  # findings that are printed
PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
what = PARSER.add_mutually_exclusive_group(required=True)
what.add_argument("--source", help="image folder, Parquet file or glob, folder of tars, torchvision:NAME")
what.add_argument("--index-only", metavar="URI", help="index the tars of this folder, in place")
what.add_argument(
    "--verify", metavar="URI", help="read and decode everything; exit code 1 if anything is wrong"
)
option = PARSER.add_argument
option("--out", help="folder (path or URI) that gets SPLIT/NAME-000000.tar ... and SPLIT/index.parquet")
option("--split", default="train", help="split to read and write (train)")
option("--name", help="beginning of the shards' names (the split)")
option("--shard-size", type=int, default=1000, help="samples a shard (1000)")
option("--workers", type=int, help="Ray tasks at once (every core); 0: without Ray")
option("--max-bad", type=float, default=0.01, help="part of the samples that may be bad (0.01)")
option("--root", help="where relative sources start and torchvision's files lie")
option("--download", action="store_true", help="let torchvision fetch missing files")
option("--image-column", default="image", help="Parquet column of image bytes (image)")
option("--label-column", default="label", help="Parquet column of labels (label); none: unlabelled")
option("--classes", help="with --index-only: text file of class names, one a line")


def main() -> None:
    options = vars(PARSER.parse_args())
    uri, source, names = options.pop("index_only"), options.pop("source"), options.pop("classes")
    folder = options.pop("verify")
    if folder:
        sys.exit(verify(folder, options["workers"]))
    if uri:
        classes = files.read_bytes(names).decode().splitlines() if names else None
        table = index_only(uri, classes, options["workers"], options["max_bad"])
        if packed := index.packed_shards(table):
            print(f"note: {packed} shards are compressed; {SLOW}")
    elif options["out"]:
        table = make_shards(source, quiet=False, **options)
    else:
        raise UserError("--source needs --out: the folder that gets the shards")
    print(
        f"{len(table)} images of {len(index.classes(table))} classes: {index.root(table)}/{index.FILE_NAME}"
    )


def verify(folder: str, workers: int | None) -> int:
    """Print what is wrong with a folder of shards; returns the exit code."""
    report = verify_shards(folder, workers=workers, quiet=False)
    for finding in report.findings[:SHOWN]:
        place = finding["shard"] if finding["key"] is None else f"{finding['shard']} {finding['key']}"
        print(f"{place}: {finding['reason']}")
    if len(report.findings) > SHOWN:
        print(f"... and {len(report.findings) - SHOWN} more")
    found = f"{len(report.findings)} findings" if report.findings else "nothing wrong"
    print(
        f"{report.shards} shards, {report.decoded} of {report.images} images decoded, "
        f"{report.bytes / 1e6:,.1f} MB: {found}"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"make_shards: {error}", file=sys.stderr)
        sys.exit(2)

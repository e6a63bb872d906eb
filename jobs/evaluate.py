"""Evaluate a checkpoint of a run: its student and teacher, over all classes and by group.

python jobs/evaluate.py runs/NAME
python jobs/evaluate.py runs/NAME --checkpoint step-00001000.pt --bank train --no-linear
python jobs/evaluate.py runs/NAME --protocols knn20 linear_sdclr fewshot10 labels1 nmi
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job's copy of the project is not installed

from isd_ray.messages import Arguments, place
from isd_ray.supervisor import run


def parser() -> Arguments:
    """The options."""
    from isd_ray.evaluate.names import listing

    options = Arguments(__doc__)
    options.epilog = f"protocols:\n{listing()}"
    options.add_argument("run", type=place, help="folder or URI of the run")
    options.add_argument("--checkpoint", help="name of a checkpoint of the run (default: the newest)")
    options.add_argument("--bank", choices=["auto", "balanced", "train"], help="labelled bank of kNN")
    options.add_argument(
        "--no-linear", dest="linear", action="store_const", const=False, help="leave out `linear`"
    )
    options.add_argument("--protocols", nargs="+", help="what to measure, of those below")
    options.add_argument(
        "--transfer-root", type=place, help="folder of torchvision's files, for transfer/SET"
    )
    options.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, help="untrained backbone and raw pixels"
    )
    options.add_argument(
        "--shards", type=place, help="folder or URI of the shards, where they moved since the run"
    )
    options.add_argument(
        "--root", type=place, help="folder of the raw data set, where it moved since the run"
    )
    options.add_argument(
        "--address", help="address of a running Ray cluster (default: RAY_ADDRESS, else local)"
    )
    return options


def main(arguments: list[str]) -> int:
    """Run the job; the exit codes are those of isd_ray.ending."""
    given = parser().parse_args(arguments)
    from isd_ray.train.trainer import evaluate, print_result

    options = {"bank": given.bank, "linear": given.linear, "baselines": given.baselines}
    options |= {"protocols": given.protocols, "transfer_root": given.transfer_root}
    places = {"shards": given.shards, "root": given.root}
    print_result(evaluate(given.run, given.checkpoint, options, places, given.address))
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

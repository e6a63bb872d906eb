"""Search for good settings: a file of tune_spaces/ says what is varied, on what data, and what counts.

python jobs/sweep.py --space tune_spaces/isd_default.yaml
python jobs/sweep.py --space tune_spaces/isd_cifar10_lt.yaml --data.shards /data/shards/cifar10 --trials 60

Options of a run (`jobs/pretrain.py --help`) hold for every trial. A sweep that was stopped goes on when the same
command is given again; with more --trials it goes further.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job's copy of the project is not installed

from isd_ray.ending import DONE
from isd_ray.errors import UserError
from isd_ray.messages import Arguments
from isd_ray.supervisor import run


def parser() -> Arguments:
    """The options that are the sweep's own."""
    options = Arguments(__doc__)
    options.add_argument("--space", required=True, help="YAML file of the search space")
    options.add_argument("--name", help="name of the sweep (default: sweep- and the file's name)")
    options.add_argument(
        "--output", default="runs", help="folder or URI that holds the sweep (default: runs)"
    )
    options.add_argument("--trials", type=int, help="trials, the default among them (default: the file's)")
    return options


def main(arguments: list[str]) -> int:
    """Run the job; the exit codes are those of isd_ray.ending."""
    given, rest = parser().parse_known_args(arguments)
    from isd_ray.config import read_options
    from isd_ray.sweep.run import sweep
    from isd_ray.sweep.space import read_space

    space = read_space(given.space)
    if given.trials is not None:
        if given.trials < 1:
            raise UserError(f"--trials {given.trials}: give 1 or more")
        space.budget.trials = given.trials
    options = read_options(rest, "jobs/sweep.py")
    name = f"sweep-{Path(given.space).stem}" if given.name is None else given.name
    sweep(space, name, given.output, options)
    return DONE


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

"""Pretrain a backbone on unlabelled images and evaluate it. Without options: the embedded data set, in minutes.

python jobs/pretrain.py --data.dataset cifar10_lt --data.shards /data/shards/cifar10 --train.workers 2
ray job submit --working-dir . -- python jobs/pretrain.py --config jobs/recipes/cifar10_lt.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job's copy of the project is not installed

from isd_ray.supervisor import run


def main(arguments: list[str]) -> int:
    """Run the job; the exit codes are those of isd_ray.ending."""
    from isd_ray.config import parse

    config = parse(arguments, program="jobs/pretrain.py")
    from isd_ray.train.trainer import pretrain, print_result

    print_result(pretrain(config))
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

"""Compare methods: a study file says which, on what data, how unbalanced, with which seeds. One report at the end.

python jobs/compare.py --study jobs/recipes/study_embedded.yaml
python jobs/compare.py --study jobs/recipes/study_cifar10.yaml --data.shards /data/shards/cifar10

Options of a run (`jobs/pretrain.py --help`) hold for every run. A study that was stopped goes on when the same command
is given again: finished runs stay as they are, failed ones are tried again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job's copy of the project is not installed

from isd_ray.ending import DONE, FOUND
from isd_ray.messages import Arguments
from isd_ray.supervisor import run


def parser() -> Arguments:
    """The options that are the study's own."""
    options = Arguments(__doc__)
    options.add_argument(
        "--study",
        required=True,
        help="YAML file or URI of the study, or the name of one that comes with isd_ray",
    )
    options.add_argument("--name", help="name of the study (default: the file's)")
    options.add_argument(
        "--output", default="runs", help="folder or URI that holds the study (default: runs)"
    )
    options.add_argument("--report-only", action="store_true", help="run nothing, report what is finished")
    return options


def main(arguments: list[str]) -> int:
    """Run the job; 1 where some runs failed, else the exit codes of isd_ray.ending."""
    given, rest = parser().parse_known_args(arguments)
    from isd_ray.config import read_options
    from isd_ray.definitions import file_or_name
    from isd_ray.study.run import compare
    from isd_ray.yaml_files import read_mapping

    content = read_mapping(file_or_name("recipes", given.study), "study")
    options = read_options(rest, "jobs/compare.py")
    name = Path(given.study).stem if given.name is None else given.name
    outcome = compare(content, name, given.output, options, given.report_only)
    return FOUND if outcome.failed else DONE


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

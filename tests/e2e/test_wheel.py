"""A wheel holds everything that a run needs: it works in an empty folder, without the repository."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRETRAIN = """
import isd_ray, sys
assert isd_ray.__file__.startswith(sys.argv[1]), isd_ray.__file__
options = {"train.epochs": 1, "train.workers": 0, "train.threads": 1, "evaluate.protocols": ["knn20"]}
result = isd_ray.pretrain(options | {"name": "run", "model.backbone": "resnet8"})
print(result["metrics"]["student"]["knn20"])
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--target", folder / "site", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=200)
    return folder / "site"


@pytest.mark.slow
def test_a_run_from_an_installed_wheel(site, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site), "HOME": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", PRETRAIN, str(site)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0
    assert (tmp_path / "runs" / "run" / "result.json").is_file()

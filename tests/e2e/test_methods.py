"""Every baseline trains on the common loop, continues from its checkpoint to the same bits, and is evaluated."""

import pytest
import torch

import isd_ray
from isd_ray.errors import UserError
from isd_ray.methods import METHODS
from isd_ray.train.folder import RunFolder, load_checkpoint
from isd_ray.train.trainer import print_result

pytestmark = pytest.mark.usefixtures("ray_session")
WITHOUT_FILE = [name for name in METHODS if "method.teacher" not in METHODS[name].defaults]  # test_frozen
BASELINES = [name for name in WITHOUT_FILE if not name.startswith("isd")]
HALF = "checkpoints/step-00000008.pt"  # in the middle of the second epoch


@pytest.fixture
def options(tiny_options):
    """Three epochs of 5 steps."""
    every = {"train.epochs": 3, "train.batch_size": 32, "train.log_every": 4, "train.keep_checkpoints": 5}
    return tiny_options | every | {"method.views": ["strong", "weak"]}


@pytest.mark.parametrize("name", BASELINES)
def test_a_method_trains_and_continues_to_the_same_bits(options, name):
    from test_pretrain import assert_same

    options["method.name"] = name
    count = len(METHODS[name].defaults["method.views"])
    options["method.views"] = ["strong", *["weak"] * (count - 1)]
    isd_ray.pretrain(options | {"name": "whole"})
    whole, half = (RunFolder(f"{options['output']}/{run}") for run in ("whole", "half"))
    half.write(HALF, whole.read(HALF))
    isd_ray.pretrain(options | {"name": "half"})
    saved, middle = load_checkpoint(whole), load_checkpoint(whole, HALF.split("/")[1])
    assert saved["step"] == 15
    assert all(torch.isfinite(w.float()).all() for w in saved["method"].values())
    moved = [n for n, w in saved["method"].items() if not torch.equal(w, middle["method"][n])]
    assert any(n.startswith("student.backbone") for n in moved)
    assert any(n.startswith("teacher") for n in moved) == ("method.momentum" in METHODS[name].defaults)
    assert (saved["queue"] is None) != METHODS[name].uses_queue
    assert (saved["bank"] is None) != METHODS[name].uses_bank
    assert_same(saved, load_checkpoint(half))


def test_a_run_without_a_teacher_is_evaluated(options, capsys):
    options |= {"method.name": "simsiam", "evaluate.enabled": True, "evaluate.protocols": ["knn1", "knn20"]}
    result = isd_ray.pretrain(options | {"queue.size": 100_000})  # it has no queue that could be too large
    assert set(result["metrics"]) == {"student", "untrained", "pixels"}
    assert result["config"]["method"]["momentum"] is None
    print_result(result)
    assert "student" in capsys.readouterr().out


def test_other_options_of_a_method_make_another_run(options):
    both = options | {"method.name": "moco_v2", "train.epochs": 1}
    isd_ray.pretrain(both)
    with pytest.raises(UserError, match=r"method.symmetric was False, now True"):
        isd_ray.pretrain(both | {"method.symmetric": True})

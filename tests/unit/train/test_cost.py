"""What a method costs an image, against what its page says."""

import pytest

from isd_ray.config import resolve
from isd_ray.methods import METHODS
from isd_ray.train.cost import cost

TINY = {"data.image_size": 16, "model.backbone": "resnet8", "model.stem": "stride2", "queue.size": 32}
ONE_WAY = ("isd", "isd_r18", "isd_plus", "moco_v1", "moco_v2", "byol_asym", "ressl", "co2", "msf")
PASSES = {
    **dict.fromkeys(ONE_WAY, (1, 1, 1)),
    **dict.fromkeys(("simclr", "simsiam", "debiased", "nnclr", "barlow_twins", "vicreg"), (2, 0, 2)),
    **dict.fromkeys(("swav", "deepcluster_v2"), (2, 0, 2)),
    **dict.fromkeys(("byol", "sce", "dino"), (2, 2, 2)),
    **dict.fromkeys(("npid", "invprop"), (1, 0, 1)),
    "fnc": (4, 0, 2),
    "pirl": (1 + 9 * 4**2 / 16**2, 0, 1 + 9 * 4**2 / 16**2),  # nine pieces of 4 pixels
}
TEACHER_NEEDED = [name for name in METHODS if "method.teacher" in METHODS[name].defaults]


def passes(options) -> tuple[float, ...]:
    found = cost(resolve(TINY | options))
    return tuple(found[name] for name in ("student_forward", "teacher_forward", "backward"))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in TEACHER_NEEDED])
def test_passes_of_each_method(name):
    given = {"method.name": name, "method.views": METHODS[name].defaults["method.views"]}
    assert passes(given) == pytest.approx(PASSES[name], abs=1e-3)


def test_symmetric_moco_costs_twice_as_much():
    assert passes({"method.name": "moco_v2", "method.symmetric": True}) == (2, 2, 2)


def test_a_small_view_counts_by_its_pixels():
    views = ["swav_large", "swav_large", "swav_small"]
    side = round(16 * 96 / 224)
    expected = 2 + side**2 / 16**2
    assert passes({"method.name": "swav", "method.views": views})[0] == pytest.approx(expected, abs=1e-3)


def test_operations_grow_with_the_pixels_and_twice_as_many_come_back():
    one, four = (
        cost(resolve(TINY | {"method.name": "npid", "method.views": ["weak"], "data.image_size": s}))["gflop"]
        for s in (32, 64)
    )
    assert four == pytest.approx(4 * one, rel=0.05)
    asymmetric = cost(resolve(TINY | {"method.name": "byol_asym"}))["gflop"]
    symmetric = cost(resolve(TINY | {"method.name": "byol"}))["gflop"]
    assert 1.5 * asymmetric < symmetric < 4 * asymmetric

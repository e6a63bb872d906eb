"""Where views are made is decided by what is fixed for a run: it rounds them."""

import pyarrow as pa
import pytest
import torch

from isd_ray.config import resolve
from isd_ray.train.loop import finish_in_tasks


@pytest.mark.parametrize(
    ("augment_on", "device", "widths", "in_tasks"),
    [
        ("auto", "cpu", [32, 32], False),
        ("auto", "cpu", [32, 33], True),
        ("auto", "cpu", [512, 512], True),
        ("auto", "cuda", [32, 33], False),
        ("device", "cpu", [512, 512], False),
        ("tasks", "cuda", [32, 32], True),
        ("device", "cpu", [32, 33], False),
    ],
)
def test_tasks_make_views_where_they_crop_for_a_cpu(augment_on, device, widths, in_tasks):
    table = pa.table(
        {"width": pa.array(widths, pa.int32()), "height": pa.array(sorted(widths)[:1] * 2, pa.int32())}
    )
    config = resolve({"data.augment_on": augment_on})
    assert finish_in_tasks(config, table, torch.device(device)) is in_tasks

"""What a run may ask of a cluster is judged before it waits for it."""

from typing import Any

import pytest

from isd_ray.config import resolve
from isd_ray.errors import UserError
from isd_ray.room import room
from isd_ray.train import cluster
from isd_ray.train.cluster import choose_device


@pytest.fixture
def nodes(monkeypatch):
    """Pretend that these nodes are up: a list of their resources."""

    def up(*resources: dict[str, float]) -> None:
        total: dict[str, float] = {}
        for node in resources:
            for unit, count in node.items():
                total[unit] = total.get(unit, 0) + count
        monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: total)
        monkeypatch.setattr(
            cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in resources]
        )

    return up


def asks(**train: Any) -> str:
    return choose_device(resolve({f"train.{name}": value for name, value in train.items()}))


def test_threads_that_no_node_has_cores_for_are_refused(nodes):
    nodes({"CPU": 8}, {"CPU": 4})
    assert asks(workers=2, threads=4) == asks(workers=1, threads=8) == asks(workers=0, threads=64) == "cpu"
    with pytest.raises(UserError, match=r"--train.threads 9: 1 workers .* have 8, 4; use at most 8"):
        asks(workers=1, threads=9)
    with pytest.raises(UserError, match=r"--train.threads 5: 2 workers .* use at most 4"):
        asks(workers=2, threads=5)


def test_nodes_that_are_not_up_are_asked_for_where_the_user_says_that_they_may_come(nodes):
    nodes({"CPU": 2}, {"CPU": 2})
    for wanted in ({"workers": 16}, {"device": "cuda"}):
        with pytest.raises(UserError, match=r"--train.autoscale true"):
            asks(**wanted)
    assert asks(workers=16, device="cpu", autoscale=True) == "cpu"
    assert asks(workers=16, device="cuda", autoscale=True) == "cuda"
    with pytest.raises(UserError, match=r"say --train.device cuda, or cpu"):
        asks(autoscale=True)
    assert room("trial", 4, 1.0, 8, 2, autoscale=True) == (8, 1.0)
    with pytest.raises(UserError, match=r"give resources.concurrent and resources.gpus"):
        room("trial", 4, autoscale=True)

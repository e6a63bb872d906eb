"""Groups of 1 to 4 gloo processes equal a single process, and take over each other's saved queues."""

import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))  # spawned processes import the worker by its name
import queue_worker


def test_groups_equal_single_process(tmp_path):
    """One set of processes makes all groups, since starting it takes longer than most checks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(queue_worker.run, (port, str(tmp_path)), nprocs=4)
    states = [torch.load(path, weights_only=True) for path in tmp_path.iterdir()]
    assert len(states) == 4
    for state in states:
        for name in state:
            assert torch.equal(state[name], states[0][name]), name

"""result.json is what a run has written, or one line says that it is not."""

import json
from contextlib import suppress
from copy import deepcopy

import pytest
from made_up import result_of

from isd_ray.errors import UserError
from isd_ray.train.folder import RunFolder
from isd_ray.train.result import read_result
from isd_ray.train.trainer import print_result

INNER = (
    "seconds.train", "cost.gflop", "metrics.student", "std.student", "metrics.student.knn20",
    "per_class.student.knn20", "protocol.bank", "protocol.groups", "groups.student.knn20", "protocol.bank.images",
)  # fmt: skip
RESULT = result_of({"student": {"knn20": [50.0, 70.0, None], "linear": [1.0, 2.0, 3.0]}}, ["a", "b", "c"])


@pytest.fixture
def folder(tmp_path):
    return RunFolder(str(tmp_path / "run"))


def test_a_whole_result_comes_back_and_can_be_printed(folder, capsys):
    folder.write_json("result.json", RESULT)
    assert read_result(folder) == RESULT
    print_result(read_result(folder))
    assert "20-NN" in capsys.readouterr().out


def test_a_run_without_metrics_has_a_result_too(folder):
    bare = {k: RESULT[k] for k in ("folder", "seconds", "images_per_second", "cost")} | {"note": "none"}
    folder.write_json("result.json", bare)
    print_result(read_result(folder))


@pytest.mark.parametrize(
    "text", ["", "x", "\0", "[1]", "[" * 3000, "{}", "null", '{"folder": 1}', "9" * 5000]
)
def test_other_files_are_damage(folder, text):
    folder.write("result.json", text.encode())
    with pytest.raises(UserError, match=r"result\.json is damaged") as error:
        read_result(folder)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("value", [None, True, "1", [], {}, {"a": []}, float("nan"), 1e300, -1])
@pytest.mark.parametrize("path", [*RESULT, *INNER])
def test_any_other_value_is_damage_or_can_be_printed(folder, capsys, path, value):
    changed = deepcopy(RESULT)
    *way, last = path.split(".")
    holder = changed
    for part in way:
        holder = holder[part]
    holder[last] = value
    folder.write("result.json", json.dumps(changed).encode())
    with suppress(UserError):
        print_result(read_result(folder))  # any other exception fails

"""Short runs write the same bits as they did when golden.json was recorded (see record.py)."""

import json

import pytest

from tests.golden.record import GOLDEN, environment, record


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return record(tmp_path_factory.mktemp("golden"))


def test_the_same_files_are_written(golden, found):
    assert sorted(found) == sorted(golden["files"])


def test_files_hold_the_same(golden, found):
    if golden["environment"] == environment():
        odd = [path for path, facts in found.items() if facts["sha256"] != golden["files"][path]["sha256"]]
        assert odd == []
    for path, facts in found.items():
        assert facts["sums"] == pytest.approx(golden["files"][path]["sums"], rel=1e-2, abs=1e-2), path

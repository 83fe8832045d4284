"""Short runs write the same bits as they did when golden.json was recorded (see record.py)."""

import json

import pytest

from tests.golden.record import GOLDEN, are_close, environment, record


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return record(tmp_path_factory.mktemp("golden"))


def test_the_same_files_are_written(golden, found):
    assert sorted(found) == sorted(golden["sums"])


def test_files_hold_the_same(golden, found):
    hashes = next((each["sha256"] for each in golden["hashes"] if each["environment"] == environment()), {})
    assert {path: found[path]["sha256"] for path in hashes} == hashes
    far = {path: facts["sums"] for path, facts in found.items() if not are_close(facts["sums"], golden["sums"][path])}
    assert far == {}

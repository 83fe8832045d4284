"""What is collected is kept in files, each whole or absent."""

import pytest
import torch

from stagepatch.core import UserError
from stagepatch.evaluation import shards
from stagepatch.evaluation.shards import Shards, begin_shards, finish_shards


@pytest.fixture
def made():
    return []


@pytest.fixture
def make(made):
    def rows(numbers):
        made.append(list(numbers))
        values = torch.tensor([float(number) for number in numbers])
        return {"features": torch.stack([values, values**2], dim=1), "flag": values > 3}

    return rows


def test_each_shard_is_made_once_whatever_asks_for_it(tmp_path, make, made):
    parts = Shards(tmp_path, 10, make, 4)
    parts.make_own()
    again, whole = Shards(tmp_path, 10, make, 4), parts.gathered()
    there = []
    again.make_own(there.append)
    assert there == [4, 4, 2]
    assert made == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert whole["features"][:, 1].tolist() == [number**2 for number in range(10)]
    assert whole["flag"].tolist() == [number > 3 for number in range(10)]
    assert torch.equal(again.gathered()["features"], whole["features"])


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_missing_or_broken_shard_alone_is_made_anew(tmp_path, make, made, content):
    whole = Shards(tmp_path, 10, make, 4).gathered()["features"]
    path = tmp_path / "00001.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    Shards(tmp_path, 10, make, 4).make_own()
    assert made[3:] == [[4, 5, 6, 7]]
    assert torch.equal(Shards(tmp_path, 10, make, 4).gathered()["features"], whole)
    assert len(made) == 4


def test_a_shard_of_another_count_is_made_anew(tmp_path, make, made):
    Shards(tmp_path, 10, make, 4).make_own()
    assert len(Shards(tmp_path, 12, make, 4).gathered()["features"]) == 12
    assert made[3:] == [[8, 9, 10, 11]]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_processes_share_the_shards_and_none_is_made_twice(tmp_path, make, made, monkeypatch, count):
    for index in range(count):
        state = type("State", (), {"process_index": index, "num_processes": count})
        monkeypatch.setattr(shards, "processes", lambda state=state: state)
        Shards(tmp_path, 10, make, 3).make_own()
    assert sorted(made) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_where_nothing_can_be_written_it_costs_time_or_is_said(tmp_path, make):
    (tmp_path / "file").write_text("a file where the folder should be")
    parts = Shards(tmp_path / "file", 10, make, 4, must_write=False)
    assert len(parts.gathered()["features"]) == 10
    with pytest.raises(UserError, match="Cannot write"):
        Shards(tmp_path / "file", 10, make, 4).make_own()


def test_other_settings_do_not_go_on_and_what_has_no_plan_counts_for_nothing(tmp_path, make, made):
    begin_shards(tmp_path / "a", {"steps": 20})
    Shards(tmp_path / "a" / "seed-0", 4, make, 4).make_own()
    begin_shards(tmp_path / "a", {"steps": 20})
    with pytest.raises(UserError, match=r"part of an evaluation of other settings \(steps was 20, is 30\)"):
        begin_shards(tmp_path / "a", {"steps": 30})
    (tmp_path / "a" / "plan.json").unlink()  # as if killed while it was removed
    begin_shards(tmp_path / "a", {"steps": 30})
    Shards(tmp_path / "a" / "seed-0", 4, make, 4).make_own()
    assert len(made) == 2
    finish_shards(tmp_path / "a")
    assert not (tmp_path / "a").exists()

"""The engine: it finds optima, evaluates nothing twice, is shared, and prunes."""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import signal
import time
from functools import partial

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from stagepatch.core import UserError
from stagepatch.search import Evaluation, MergeConfig, best_of, storages
from stagepatch.search.results import print_merge_results, write_merge_results
from tests.search.searches import OPTIMUM, Counted, quadratic, search, search_job


def test_grid_finds_the_best_point_of_both_levels(tmp_path):
    objective = Counted()
    found = search(tmp_path / "journal", objective, count=3, strategies=["grid"])["grid"]
    coarse = [(0.0, 0.0, 0.0), (1 / 3, 1 / 3, 1 / 3)]
    coarse += [point for point in itertools.product([0.0, 0.5, 1.0], repeat=3) if point not in coarse]
    assert objective.asked[:28] == coarse
    assert min(coarse, key=quadratic) == (0.5, 0.0, 0.5)
    around = itertools.product([0.25, 0.5, 0.75], [0.0, 0.25], [0.25, 0.5, 0.75])
    assert sorted(objective.asked[28:]) == sorted(point for point in around if point not in coarse)
    assert best_of(found).point == (0.5, 0.25, 0.5)
    assert len(found) == len(set(objective.asked)) == len(objective.asked)


@pytest.mark.parametrize("strategy", ["tpe", "cma"])
@pytest.mark.parametrize("count", [1, 3])
def test_samplers_find_the_optimum(tmp_path, strategy, count):
    found = search(tmp_path / "journal", count=count, strategies=[strategy], evaluations=80)[strategy]
    assert len(found) == 80
    assert best_of(found).point == pytest.approx(OPTIMUM[:count], abs=0.1)
    assert best_of(found).value < min(quadratic(one.point) for one in found[:12]) / 2


def test_every_strategy_begins_with_the_base_and_the_mean(tmp_path):
    found = search(tmp_path / "journal", strategies=["grid", "tpe", "cma"])
    for evaluations in found.values():
        assert [one.point for one in evaluations[:2]] == [(0.0, 0.0), (0.5, 0.5)]
        assert evaluations[0].value == quadratic([0.0, 0.0])


def test_the_same_seed_gives_the_same_search_and_another_another(tmp_path):
    first, again, other = (
        [one.point for one in search(tmp_path / name, seed=seed)["tpe"]]
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again != other


def test_a_longer_search_goes_on_from_a_shorter_one(tmp_path):
    objective = Counted()
    search(tmp_path / "journal", objective, strategies=["tpe", "cma"], evaluations=8)
    assert len(objective.asked) == 16
    found = search(tmp_path / "journal", objective, strategies=["tpe", "cma"], evaluations=12)
    assert len(objective.asked) == 24
    for evaluations in found.values():
        assert len(evaluations) == len({tuple(one.point) for one in evaluations}) == 12


def test_progress_is_reported(tmp_path):
    reports = []
    note = lambda name, ended, total: reports.append((len(ended), total))  # noqa: E731
    search(tmp_path / "journal", evaluations=3, on_progress=note)
    assert reports == [(number, 3) for number in range(4)]


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_weights_that_were_drawn_again_are_looked_up(tmp_path, monkeypatch):
    always = optuna.samplers.PartialFixedSampler({"w0": 0.25}, optuna.samplers.RandomSampler())
    monkeypatch.setattr("stagepatch.search.merge_search._seeded", lambda *_, **options: always)
    objective = Counted()
    found = search(tmp_path / "journal", objective, count=1, evaluations=5)["tpe"]
    assert objective.asked == [(0.0,), (1.0,), (0.25,)]
    assert [one.value for one in found[2:]] == [quadratic([0.25])] * 3


def test_an_error_ends_the_search_and_its_weights_are_evaluated_again(tmp_path):
    def breaks(weights):
        if len(objective.asked) == 5:
            raise RuntimeError("no memory")
        return quadratic(weights)

    objective, again = Counted(breaks), Counted()
    with pytest.raises(RuntimeError, match="no memory"):
        search(tmp_path / "journal", objective)
    found = search(tmp_path / "journal", again)["tpe"]
    undisturbed = search(tmp_path / "undisturbed")["tpe"]
    assert [one.point for one in found] == [one.point for one in undisturbed]
    assert (len(objective.asked), len(again.asked)) == (5, 8)
    assert objective.asked[4] in again.asked
    assert not set(again.asked) & set(objective.asked[:4])


def test_on_a_full_disk_it_ends_in_words_and_goes_on_as_it_would_have(tmp_path, monkeypatch):
    monkeypatch.setattr("stagepatch.search.engine._CLAIM", 0.02)
    monkeypatch.setattr("stagepatch.search.engine._POLL", 0.01)
    expected = [one.point for one in search(tmp_path / "undisturbed", evaluations=3)["tpe"]]
    append = JournalFileBackend.append_logs
    for room in itertools.count():
        left = iter(range(room))

        def append_while_there_is_room(journal, logs, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(journal, logs)

        with monkeypatch.context() as patched, contextlib.suppress(UserError):
            patched.setattr(JournalFileBackend, "append_logs", append_while_there_is_room)
            search(tmp_path / str(room), evaluations=3)
            break
        assert [one.point for one in search(tmp_path / str(room), evaluations=3)["tpe"]] == expected
    assert room > 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_merges_that_sample_no_numbers_are_worst(tmp_path, value):
    objective = Counted(lambda weights: value if max(weights) > 0.4 else quadratic(weights))
    found = search(tmp_path / "journal", objective, strategies=["grid", "tpe", "cma"])
    assert len(found["tpe"]) == 12
    for evaluations in found.values():
        assert any(one.value == math.inf for one in evaluations)
        assert math.isfinite(best_of(evaluations).value)
    write_merge_results(MergeConfig(output_dir=str(tmp_path)), found)
    print_merge_results(MergeConfig(), found)
    written = json.loads((tmp_path / "search.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert None in [one["value"] for one in written["strategies"]["tpe"]]
    assert (tmp_path / "search.png").stat().st_size > 1000


def test_another_objective_or_grid_is_refused_by_name(tmp_path):
    same = {"identity": {"base": "a", "metric": "fid_train"}}
    search(tmp_path / "journal", **same, strategies=["grid", "tpe"])
    for changes, message in (
        ({"identity": {"base": "b", "metric": "x"}}, "base was a, is b, metric was fid_train, is x)"),
        ({"strategies": ["grid"], "coarse": [0.0, 1.0]}, "coarse was"),
        ({"seed": 3}, "seed was"),
    ):
        with pytest.raises(UserError, match=re.escape(f"something else ({message}")):
            search(tmp_path / "journal", **{**same, **changes})
    search(tmp_path / "journal", identity={"base": "b"}, name="other")
    objective = Counted()
    search(tmp_path / "journal", objective, **same, strategies=["grid", "tpe"])
    assert objective.asked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategies": ["tpe", "tpe"]}, "once each"),
        ({"strategies": ["random"]}, "must be some of grid, tpe, cma"),
        ({"low": 0.5}, "low ≤ 0 < high"),
        ({"high": 0.0}, "low ≤ 0 < high"),
        ({"coarse": [0.0, 2.0]}, r"coarse=\[0.0, 2.0\] must be within"),
        ({"evaluations": 1}, "2 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        search(tmp_path / "journal", **options)
    assert not (tmp_path / "journal").exists()


def test_a_line_that_was_not_wholly_written_is_forgotten(tmp_path):
    objective = Counted()
    search(tmp_path / "journal", objective, evaluations=5)
    with open(tmp_path / "journal", "a") as file:
        file.write('{"op_code":5,"worker')
    found = search(tmp_path / "journal", objective, evaluations=7)["tpe"]
    assert len(found) == len(objective.asked) == 7


@pytest.mark.parametrize("content", ["not a journal\n", '{"a": 1}\n', "[]\n", "\x00\x01\n"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "journal").write_text(content)
    with pytest.raises(UserError, match="is no journal of a search"):
        search(tmp_path / "journal")
    assert (tmp_path / "journal").read_text() == content


def test_storages_that_cannot_be_opened_are_refused(tmp_path):
    for url in ("nosuchdatabase://host/name", "sqlite:////nowhere/at/all.db"):
        with pytest.raises(UserError, match="cannot be opened"):
            search(url)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is no journal"):
        search(tmp_path / "file" / "journal")


def test_a_journal_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(self, logs):
        raise OSError(28, "No space left on device")

    search(tmp_path / "journal", evaluations=4)
    monkeypatch.setattr(optuna.storages.journal.JournalFileBackend, "append_logs", full)
    with pytest.raises(UserError, match=r"Cannot write the search's journal: .*No space left"):
        search(tmp_path / "journal", evaluations=6)


@pytest.fixture
def start(processes, tmp_path):
    """Starts a search in another process."""
    return partial(processes.start, search_job, directory=tmp_path)


@pytest.fixture
def result_of(processes):
    """The points by strategy that a process prints at its end."""
    return lambda process: eval(processes.finish(process).splitlines()[-1])


def lines(directory, what):
    """(process, weights) of each time that an evaluation began or ended."""
    noted = [line.split(" ", 2) for line in (directory / "log").read_text().splitlines()]
    return [(process, weights) for kind, process, weights in noted if kind == what]


def study_of(directory):
    """The study in a journal, as another process has it."""
    path = directory / "journal"
    backend = optuna.storages.journal.JournalFileBackend(str(path), storages._JournalLock(path))
    return optuna.load_study(study_name="merge tpe", storage=optuna.storages.JournalStorage(backend))


@pytest.mark.parametrize(
    ("kind", "strategy"), [*itertools.product(["journal"], ["grid", "tpe", "cma", "evolution"]), ("database", "tpe")]
)
def test_nothing_is_evaluated_twice_after_sigkill(tmp_path, processes, start, result_of, kind, strategy):
    options = {"kind": kind, "grace": 2, "strategies": [strategy]}
    for dies_at in (6, 3):
        processes.finish(start(**options, dies_at=dies_at), -signal.SIGKILL)
    assert len(lines(tmp_path, "end")) == 5 + 2
    found = result_of(start(**options))[strategy]
    ended, begun = ([weights for _, weights in lines(tmp_path, what)] for what in ("end", "begin"))
    assert len(ended) == len(set(ended))
    assert set(begun) == set(ended)  # what was interrupted was done again, with its weights
    assert len(begun) == len(ended) + 2
    assert {str(weights) for weights in found} == set(ended)
    if strategy != "grid":
        assert len(ended) == 15


@pytest.mark.parametrize(
    ("kind", "strategies"), [("journal", ("grid", "tpe", "cma")), ("journal", ("evolution",)), ("database", ("cma",))]
)
def test_processes_share_a_search(tmp_path, start, result_of, kind, strategies):
    both = [start(kind=kind, seconds=0.1, strategies=strategies) for _ in range(2)]
    found, again = map(result_of, both)
    assert found == again
    assert all(len(found[name]) == 15 for name in strategies if name != "grid")
    ended = lines(tmp_path, "end")
    assert len(ended) == sum(map(len, found.values()))
    assert all(len(set(points)) == len(points) for points in found.values())
    for process in both:
        assert sum(name == str(process.pid) for name, _ in ended) > len(ended) / 5


def test_the_work_of_a_process_that_dies_is_done_by_the_other(tmp_path, processes, start, result_of):
    dies, lives = (start(dies_at=dies_at, seconds=0.1, strategies=["cma"]) for dies_at in (4, 0))
    processes.finish(dies, -signal.SIGKILL)
    assert len(result_of(lives)["cma"]) == len(lines(tmp_path, "end")) == 15


@pytest.mark.parametrize("strategy", ["tpe", "evolution"])
def test_what_a_longer_search_has_begun_is_left(tmp_path, processes, start, strategy):
    processes.finish(start(dies_at=3, count=20, strategies=[strategy]), -signal.SIGKILL)
    objective = Counted()
    assert len(search(tmp_path / "journal", objective, strategies=[strategy], evaluations=8)[strategy]) == 8
    assert len(objective.asked) == 6


def test_a_process_that_died_before_it_gave_its_name_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("stagepatch.search.engine._CLAIM", 1.0)
    search(tmp_path / "journal", evaluations=4)
    study = study_of(tmp_path)
    study.enqueue_trial({}, user_attrs={"slot": 4})
    study.ask()
    begun = time.monotonic()
    found, undisturbed = (search(tmp_path / name, evaluations=7)["tpe"] for name in ("journal", "undisturbed"))
    assert time.monotonic() - begun > 0.5
    assert [one.point for one in found] == [one.point for one in undisturbed]


def test_a_process_that_was_taken_for_dead_goes_on(tmp_path):
    def slow(weights):
        if len(objective.asked) == 3:
            study = study_of(tmp_path)
            (running,) = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
            study.tell(running.number, state=optuna.trial.TrialState.FAIL)
        return quadratic(weights)

    objective = Counted(slow)
    assert len(search(tmp_path / "journal", objective, evaluations=6)["tpe"]) == 6
    assert len(objective.asked) == 7
    assert objective.asked.count(objective.asked[2]) == 2


def test_workers_know_who_lives(tmp_path):
    one, two = (storages.Workers(tmp_path / "workers") for _ in range(2))
    assert [one.is_gone(worker.own) for worker in (one, two)] == [False, False]
    two.close()
    assert one.is_gone(two.own)
    (tmp_path / "workers" / "killed").touch()
    assert one.is_gone("killed")
    assert not (tmp_path / "workers" / "killed").exists()
    one.close()
    assert os.listdir(tmp_path / "workers") == []


def test_best_is_the_first_of_the_lowest():
    evaluations = [Evaluation((float(number),), value, 1.0) for number, value in enumerate([3.0, 1.0, 1.0])]
    assert best_of(evaluations).point == (1.0,)


@pytest.mark.parametrize("strategy", ["tpe", "evolution"])
def test_what_is_clearly_bad_is_given_up_where_that_is_asked_for(tmp_path, strategy):
    whole = []

    def objective(point, report):
        report(quadratic(point))  # the first part says it all
        whole.append(point)
        return quadratic(point)

    options = {"strategies": [strategy], "evaluations": 30}
    found = search(tmp_path / "journal", objective, **options, prune=True)[strategy]
    pruned = [one.value for one in found if one.pruned]
    assert len(found) == 30
    assert 5 <= len(whole) == 30 - len(pruned) < 28
    assert set(pruned) == {math.inf}
    assert best_of(found).value == min(quadratic(one.point) for one in found)
    assert search(tmp_path / "journal", objective, **options, prune=True)[strategy] == found
    assert len(whole) == 30 - len(pruned)
    if strategy == "tpe":
        write_merge_results(MergeConfig(output_dir=str(tmp_path)), {strategy: found})
        written = json.loads((tmp_path / "search.json").read_text())["strategies"]["tpe"]
        assert [one.get("pruned", False) for one in written] == [one.pruned for one in found]
    with pytest.raises(UserError, match="prune was True, is False"):
        search(tmp_path / "journal", **options)


def test_an_identity_may_gain_what_has_its_default(tmp_path):
    search(tmp_path / "journal", identity={"budget": 1})
    search(tmp_path / "journal", identity={"budget": 1, "metric": "fid_train"})
    with pytest.raises(UserError, match=r"metric was fid_train, is fid_held_out"):
        search(tmp_path / "journal", identity={"budget": 1, "metric": "fid_held_out"})


def test_optuna_logs_afterwards_as_before(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search(tmp_path / "journal", evaluations=2)
    with pytest.raises(UserError):
        search(tmp_path / "journal", evaluations=2, seed=1)
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING

"""Whether a run may go on from a file: its settings, whichever version of the package wrote them."""

import json
from dataclasses import dataclass, field

import pytest

from stagepatch.core.errors import UserError
from stagepatch.core.settings import as_json, check_unchanged, differences


@dataclass
class Inner:
    steps: int = 5
    betas: tuple[float, float] = (0.9, 0.999)
    log_every: int = 10


@dataclass
class Outer:
    name: str = "x"
    inner: Inner = field(default_factory=Inner)


def stored(**settings):
    return json.loads(json.dumps(as_json(settings)))


def test_same_settings_have_no_differences():
    assert differences(stored(inner=Inner(), seeds=[1, 2]), {"inner": Inner(), "seeds": [1, 2]}) == {}


def test_differences_are_named_with_both_values():
    changes = differences(stored(inner=Inner(steps=5)), {"inner": Inner(steps=6), "model": "m"})
    assert changes == {"inner.steps": "was 5, is 6", "model": "was None, is m"}
    assert len(differences({}, {"digest": "a" * 640})["digest"]) < 80


def test_an_option_younger_than_the_file_had_its_default():
    then = stored(inner=Inner())
    del then["inner"]["steps"], then["inner"]["betas"]
    assert differences(then, {"inner": Inner()}) == {}
    assert differences(then, {"inner": Inner(steps=6)}) == {"inner.steps": "was 5, is 6"}
    # Of values that are no dataclass, an object knows the defaults; and a dataclass that is younger than the file.
    assert differences({}, {"name": "x", "inner": Inner()}, Outer()) == {}
    changes = differences({}, {"name": "y", "inner": Inner(steps=7)}, Outer())
    assert changes == {"inner.steps": "was 5, is 7", "name": "was x, is y"}


def test_an_option_that_is_no_more_counts_and_bookkeeping_does_not():
    assert differences(stored(gone=1), {}) == {"gone": "was 1, is None"}
    then = stored(inner=Inner(log_every=3))
    assert differences(then, {"inner": Inner()}, ignored=["log_every"]) == {}
    assert differences(then, {"inner": Inner()}) == {"inner.log_every": "was 3, is 10"}


def test_a_file_of_other_settings_is_refused_by_name_of_four_of_them():
    now = {"inner": Inner(steps=6), "model": "m", "a": 1, "b": 2, "z": 3}
    with pytest.raises(UserError) as error:
        check_unchanged(stored(inner=Inner()), now, "'x' is of another run", "Go elsewhere.")
    named = "a was None, is 1, b was None, is 2, inner.steps was 5, is 6, model was None, is m"
    assert str(error.value) == f"'x' is of another run ({named}). Go elsewhere."
    check_unchanged(stored(**now), now, "", "")

"""Post-hoc EMA against the paper's closed forms, numerical integrals, and averages that were tracked."""

import signal

import numpy as np
import pytest
from safetensors.torch import load_file
from scipy.integrate import quad

from stagepatch.core import UserError
from stagepatch.training import posthoc_weights, power_of, relative_std
from stagepatch.training.posthoc_ema import _inner
from tests import runs
from tests.runs import Strike, assert_same, patch_of, run, train_job

SIGMAS = [0.05, 0.1]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def profile(time, power):
    return lambda t: (power + 1) * t**power / time ** (power + 1) if t <= time else 0.0


def averages_of(directory, sigma):
    """By step."""
    found = sorted((directory / "posthoc_ema" / str(sigma)).iterdir())
    return {int(path.name): load_file(next(path.rglob("*.safetensors"))) for path in found}


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1, 0.25, 0.2886])
def test_sigma_is_the_standard_deviation_of_the_profile(sigma):
    power = power_of(sigma)
    weigh = profile(1.0, power)
    mean, square = (quad(lambda t, n=n: t**n * weigh(t), 0, 1, limit=200)[0] for n in (1, 2))
    assert np.sqrt(square - mean**2) == pytest.approx(sigma, rel=1e-5)
    assert relative_std(power) == pytest.approx(sigma, rel=1e-9)


def test_powers_of_the_paper():
    # Section 3: the averages that are kept have γ of 16.97 and 6.94.
    assert [round(power_of(sigma), 2) for sigma in SIGMAS] == [16.97, 6.94]


@pytest.mark.parametrize("sigma", [0.0, -0.1, 0.3])
def test_lengths_that_cannot_be(sigma):
    with pytest.raises(UserError, match=r"must be above 0 and below 0\.2887"):
        power_of(sigma)


@pytest.mark.parametrize(("time", "power", "other_time", "other"), [(3, 17, 8, 7), (8, 7, 3, 17), (5, 2.5, 5, 9)])
def test_inner_products_are_the_integrals(time, power, other_time, other):
    first, second = profile(time, power), profile(other_time, other)
    expected, _ = quad(lambda t: first(t) * second(t), 0, min(time, other_time), epsabs=1e-13)
    assert _inner(np.float64(time), np.float64(power), other_time, other) == pytest.approx(expected, rel=1e-9)


def test_weights_make_the_nearest_profile():
    # The same least squares on a fine grid of times, by numpy.
    steps, sigmas = [100, 100, 200, 200, 300, 300], SIGMAS * 3
    grid = np.linspace(0, 300, 12_001)[1:] - 0.0125

    def on_grid(step, sigma):
        weigh = profile(step, power_of(sigma))
        return np.array([weigh(t) for t in grid])

    saved = np.stack([on_grid(*one) for one in zip(steps, sigmas, strict=True)], axis=1)
    expected = np.linalg.lstsq(saved, on_grid(300, 0.08), rcond=None)[0]
    weights, difference = posthoc_weights(steps, sigmas, 300, 0.08)
    np.testing.assert_allclose(weights, expected / expected.sum(), atol=2e-3)
    assert sum(weights) == pytest.approx(1.0)
    made, wanted = saved @ weights, on_grid(300, 0.08)
    assert difference == pytest.approx(np.linalg.norm(made - wanted) / np.linalg.norm(wanted), rel=1e-3)


def test_a_saved_average_is_itself():
    weights, difference = posthoc_weights([100, 100, 200, 200], SIGMAS * 2, 200, 0.1)
    np.testing.assert_allclose(weights, [0, 0, 0, 1], atol=1e-9)
    assert difference == pytest.approx(0.0, abs=1e-7)


def test_tracked_average_is_the_integral_of_the_profile(tmp_path):
    run(tmp_path, method="finetune", steps=9, snapshot_every=1, posthoc_ema=SIGMAS)
    plain = [load_file(tmp_path / "snapshots" / f"{step:07d}" / WEIGHTS) for step in range(1, 10)]
    for sigma in SIGMAS:
        tracked = averages_of(tmp_path, sigma)
        assert list(tracked) == list(range(1, 10))
        for step in (1, 4, 9):
            share = [quad(profile(step, power_of(sigma)), t - 1, t, epsabs=1e-13)[0] for t in range(1, step + 1)]
            for name, found in tracked[step].items():
                expected = sum(weight * one[name].double() for weight, one in zip(share, plain, strict=False))
                np.testing.assert_allclose(found.double(), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["dmp", "finetune"])
def test_averages_leave_the_run_as_it_is(tmp_path, method):
    patch = runs.RELEASED if method == "dmp" else None
    choices = {"steps": 7, "snapshot_every": 3, "ema_decay": 0.8}
    run(tmp_path / "with", patch, method, posthoc_ema=SIGMAS, **choices)
    run(tmp_path / "without", patch, method, **choices)
    files = sorted(path.relative_to(tmp_path / "without") for path in (tmp_path / "without").rglob("*.safetensors"))
    assert len(files) == 4  # the result, the checkpoint, two snapshots
    for file in files:
        expected, found = (load_file(tmp_path / name / file) for name in ("without", "with"))
        assert_same({name: found[name] for name in expected}, expected)
        assert set(found) == set(expected) or file.name == "checkpoint.safetensors"
    assert not (tmp_path / "without" / "posthoc_ema").exists()
    assert sorted(averages_of(tmp_path / "with", 0.1)) == [3, 6, 7]  # the end too


@pytest.mark.parametrize(
    "strike", [Strike("iteration", 5), Strike("half", 2), Strike("renamed", 2), Strike("half", 2, "model.safetensors")]
)
def test_killed_run_has_the_averages_of_the_undisturbed_one(processes, tmp_path, strike):
    choices = {**runs.EVERYTHING, "snapshot_every": 3, "posthoc_ema": SIGMAS, "patch": runs.RELEASED}
    processes.call(train_job, directory=tmp_path / "whole", **choices)
    processes.call(train_job, -signal.SIGKILL, directory=tmp_path / "cut", strike=strike, **choices)
    processes.call(train_job, directory=tmp_path / "cut", **choices)
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.safetensors"))
    assert len(files) == 2 + 4 * (1 + len(SIGMAS))
    for file in files:
        assert_same(load_file(tmp_path / "cut" / file), load_file(tmp_path / "whole" / file))


def test_other_averages_are_refused(tmp_path):
    run(tmp_path, steps=2, snapshot_every=1, posthoc_ema=[0.05])
    patch = patch_of(tmp_path)
    with pytest.raises(UserError, match=r"training\.posthoc_ema was \[0\.05\], is \[0\.05, 0\.1\]"):
        run(tmp_path, steps=2, snapshot_every=1, posthoc_ema=SIGMAS)
    with pytest.raises(UserError, match="set snapshot_every"):
        run(tmp_path / "none", posthoc_ema=SIGMAS)
    assert_same(patch_of(tmp_path), patch)

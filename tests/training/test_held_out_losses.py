"""The loss on held-out images while a run trains."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from stagepatch import Patch
from stagepatch.core import UserError
from stagepatch.core.randomness import generator_for
from stagepatch.diffusion import Objective
from stagepatch.methods import DMP, Finetune
from stagepatch.patch import PatchConfig
from stagepatch.training import ValidationConfig
from stagepatch.training.held_out import HeldOutLosses
from tests.runs import (
    RELEASED,
    Processes,
    assert_same,
    log_of,
    make_dataset,
    make_model,
    make_objective,
    patch_of,
    run,
)

NAMES = ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1", "all"]


def losses_of(model=None, objective=None, every=2, images=6, dataset=None, **options):
    config = ValidationConfig(loss_every=every, loss_images=images)
    parts = dataset or make_dataset(20), model or make_model(), objective or make_objective()
    return HeldOutLosses(config, *parts, **options)


def records(directory, kind="held_out"):
    """By iteration: the losses of what is learned, or of the base, by range."""
    kept = [record for record in log_of(directory) if f"{kind}/all" in record]
    return {record["iteration"]: {name: record[f"{kind}/{name}"] for name in NAMES} for record in kept}


def test_the_base_s_loss_is_diffusers_own_at_even_timesteps_of_each_quarter():
    model, dataset, count = make_model(learn_sigma=False), make_dataset(20), 5
    found = losses_of(model, make_objective(learn_sigma=False), images=count, dataset=dataset)._base
    scheduler = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=2e-2)
    expected = []
    for quarter in range(4):
        squares = []
        for number in range(count):
            item = dataset[number * 4]  # spread over the 20 images
            noise = torch.randn(2, 1, 8, 8, generator=generator_for(torch.device("cpu"), 102, number))[:1]
            timestep = torch.tensor([250 * quarter + 25 + 50 * number])
            x_t = scheduler.add_noise(item["image"][None], noise, timestep)
            with torch.no_grad():
                output = model(x_t, timestep, item["label"][None]).sample
            squares.append(float(((output - noise) ** 2).mean()))
        expected.append(sum(squares) / count)
    assert list(found) == NAMES
    assert list(found.values()) == pytest.approx([*expected, sum(expected) / 4], rel=1e-5)


def test_ranges_are_of_the_noise_level_that_the_model_is_told():
    objective = Objective(FlowMatchEulerDiscreteScheduler(shift=3.0))
    model, told = make_model(learn_sigma=False), []
    handle = model.register_forward_pre_hook(
        lambda _, given, named: told.append(given[1] if len(given) > 1 else named["timestep"]), with_kwargs=True
    )
    losses = losses_of(model, objective, levels=(0.5, 1.0), images=4)
    handle.remove()
    assert list(losses._base)[:4] == ["0.5-0.625", "0.625-0.75", "0.75-0.875", "0.875-1"]
    for timesteps, (low, high) in zip(told, itertools.pairwise([500, 625, 750, 875, 1000.1]), strict=True):
        assert len(timesteps) == 4
        assert (low <= timesteps).all()
        assert (timesteps < high).all()


def test_size_of_batches_and_groups_change_nothing_but_rounding():
    class Grouped(type(make_dataset())):
        def groups(self):
            return [range(0, len(self), 2), range(1, len(self), 2)]

    dataset = make_dataset(20)
    whole = losses_of(dataset=dataset, batch_size=64)._base
    for other in (dataset, Grouped(dataset.images, dataset.labels)):
        assert losses_of(dataset=other, batch_size=2)._base == pytest.approx(whole, rel=1e-5)


METHODS = {
    "prompts with a noisy gate": lambda: DMP(PatchConfig(**RELEASED)),
    "all weights": Finetune,
}


@pytest.mark.parametrize("name", METHODS)
def test_measuring_changes_no_bit_of_training_and_is_of_the_average(tmp_path, name):
    choices = {"ema_decay": 0.6, "flip": True, "log_every": 2, "steps": 5}
    run(tmp_path / "plain", method=METHODS[name](), **choices)
    model = make_model()
    method = run(tmp_path / "watched", method=METHODS[name](), model=model, checks=[losses_of(model)], **choices)
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "watched" / path.name).read_bytes(), path.name
    getattr(method, "patch", model).eval()  # without the gate's noise
    found = records(tmp_path / "watched")
    assert list(found) == [2, 4, 5]
    assert found[5] == pytest.approx(losses_of(model)._base, rel=1e-6), "what is saved, and is on the model now"
    base = records(tmp_path / "watched", "held_out_base")
    assert base[2] == base[5] == pytest.approx(losses_of()._base, rel=1e-6)
    assert found[5]["all"] != pytest.approx(base[5]["all"], rel=1e-4)
    plain, watched = (
        [{**record, "images_per_second": 0} for record in log_of(tmp_path / name) if "loss" in record]
        for name in ("plain", "watched")
    )
    assert plain == watched


def job(directory, stop=0, **choices):
    """A run with held-out losses, killed when so many iterations are done."""
    model = make_model()
    losses = losses_of(model)
    if stop:
        measure = losses.is_due
        losses.is_due = lambda done, steps: measure(done, steps) if done < stop else 1 / 0
    run(directory, model=model, checks=[losses], checkpoint_every=3, **choices)


def test_a_run_that_goes_on_measures_the_same(tmp_path):
    job(tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        job(tmp_path / "stopped", stop=5)
    assert list(records(tmp_path / "stopped")) == [2, 4]
    job(tmp_path / "stopped")
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    assert list(records(tmp_path / "whole")) == [2, 4, 6]
    assert_same(patch_of(tmp_path / "stopped"), patch_of(tmp_path / "whole"))


def test_two_processes_measure_what_one_does(tmp_path, processes: Processes):
    job(tmp_path / "one")
    processes.call_together(job, 2, directory=tmp_path / "two")
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert list(one) == list(two)
    assert all(two[done] == pytest.approx(one[done], rel=1e-4) for done in one)
    assert len(log_of(tmp_path / "two")) == len(log_of(tmp_path / "one")), "one process writes"


def test_progress_says_both(tmp_path, capsys):
    model = make_model()
    run(tmp_path, model=model, checks=[losses_of(model, every=6)], progress=True)
    found = records(tmp_path)[6]["all"]
    assert f"held out {found:.4f}" in " ".join(capsys.readouterr().out.split())
    assert Patch.from_pretrained(tmp_path)


@pytest.mark.parametrize("choice", [{"every": -1}, {"images": 0}])
def test_numbers_that_cannot_be(choice):
    with pytest.raises(UserError, match=r"validation\.loss_(every=-1 must be at least 0|images=0 must be at least 1)"):
        losses_of(**choice)

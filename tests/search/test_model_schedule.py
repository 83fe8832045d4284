"""The search for a model schedule: it finds what is best, keeps to the budget, goes on as if it had never stopped."""

import itertools
import math
import random
import signal
from functools import partial

import pytest
import torch
import yaml

from stagepatch.checkpoints import load_denoiser, save_denoiser
from stagepatch.cli import main
from stagepatch.core import UserError, read_json, write_json
from stagepatch.core.process_state import processes as own_processes
from stagepatch.evaluation import Evaluator, evaluate, load_extractor, load_references
from stagepatch.patch import Patch
from stagepatch.sampling import SamplingConfig
from stagepatch.sampling.generation import spread
from stagepatch.search import NONE, ScheduleConfig, Space, Zoo, ZooEntry, best_of, evolution, median_seconds, propose
from stagepatch.search.model_schedule import _features, _predicted
from tests.runs import draw_weights
from tests.sampling.test_generate import SCHEDULER, by_hand, sampled, sampler_of
from tests.search.searches import alone, schedule_job
from tests.tiny_pipelines import PIPELINES
from tests.training.test_train_on_pipelines import draw_images

COSTS = (1.0, 0.5, 0.25)


def toy(steps, seed=0):
    """An error that each model adds at its step, and that a gap between steps adds by its length squared."""
    draw = random.Random(seed)
    own = [[draw.uniform(0.02, 0.15) * factor for _ in range(steps)] for factor in (1.0, 1.6, 2.5)]
    weights = [draw.uniform(0.02, 0.1) for _ in range(steps + 1)]

    def error(choices):
        total, last = 0.0, -1
        for step in (*(step for step, choice in enumerate(choices) if choice != NONE), steps):
            total += weights[step] * (step - last) ** 2 + (own[choices[step]][step] if step < steps else 0.0)
            last = step
        return total

    return error


def all_within(space):
    for choices in itertools.product(space.options(), repeat=space.steps):
        if any(choice != NONE for choice in choices) and space.holds(space.seconds(choices)):
            yield choices


@pytest.mark.parametrize("drop_steps", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_is_found_in_a_fraction_of_the_evaluations(drop_steps, seed):
    space, error = Space(COSTS, 7, 3.5, drop_steps), toy(7, seed)
    everything = [error(choices) for choices in all_within(space)]
    found = best_of(alone(evolution(space, 120, seed), error)).value
    assert len(everything) > (5000 if drop_steps else 600)
    assert found <= min(everything) * 1.02
    assert sorted(everything).index(found) < 8
    assert found < min(random.Random(seed).sample(everything, 120))


def test_small_spaces_are_searched_through_and_then_it_stops():
    space = Space(COSTS, 3, 1.0)
    found = alone(evolution(space, 10_000, 0), toy(3))
    assert len(found) == len({one.point for one in found})
    assert {one.point for one in found} == set(all_within(space))


@pytest.mark.parametrize("seed", range(20))
def test_every_proposal_is_new_and_within_the_budget(seed):
    draw = random.Random(seed)
    costs = tuple(draw.uniform(0.01, 2.0) for _ in range(draw.randint(1, 4)))
    steps, drop_steps = draw.randint(2, 12), draw.random() < 0.7 or len(costs) == 1
    least = min(costs) * (1 if drop_steps else steps)
    space = Space(costs, steps, draw.uniform(least, max(least, costs[0] * steps)), drop_steps)
    known = {}
    for _ in range(60):
        choices = propose(space, known, seed)
        if choices is None:
            break
        assert choices not in known
        assert len(choices) == steps
        assert set(choices) <= set(space.options())
        assert any(choice != NONE for choice in choices)
        assert sum(costs[choice] for choice in choices if choice != NONE) <= space.budget * (1 + 1e-6)
        known[choices] = draw.random()
    assert known


@pytest.mark.parametrize("stop", [0, 1, 4, 12, 39])
def test_a_search_that_stopped_goes_on_as_it_would_have(stop):
    strategy, error = evolution(Space(COSTS, 8, 4.0), 40, 5), toy(8)
    whole = alone(strategy, error)
    ended = dict(enumerate(alone(strategy, error, stop)))
    begun = {slot: one.point for slot, one in ended.items()}
    assert [begun[slot] for slot in range(stop)] == [one.point for one in whole[:stop]]
    assert strategy.points(ended, begun)[-1] == whole[stop].point


def test_what_others_are_at_is_not_proposed_again():
    strategy = evolution(Space(COSTS, 8, 4.0), 40, 5)
    begun = {}
    for slot in range(40):
        *_, begun[slot] = strategy.points({}, begun)
    assert len(set(begun.values())) == 40
    assert list(strategy.points({}, begun)) == list(begun.values())


def test_it_starts_with_each_model_alone_at_as_many_even_steps_as_there_is_room_for():
    n = NONE
    assert Space((1.0, 0.5), 9, 3.0).starts() == [(0, n, n, n, 0, n, n, n, 0), (1, n, 1, 1, n, 1, 1, n, 1)]
    assert Space((1.0, 0.5), 4, 4.0).starts() == [(0,) * 4, (1,) * 4]
    assert Space((1.0, 0.5), 4, 100.0).starts() == [(0,) * 4, (1,) * 4]
    assert Space((1.0, 0.5), 4, 0.6).starts() == [(1, n, n, n)]
    # None may be left out: what is too dear for all steps shares them with the cheapest.
    assert Space((1.0, 0.5), 4, 3.0, drop_steps=False).starts() == [(0, 1, 1, 0), (1,) * 4]


def test_rounding_takes_no_step_away():
    draw = random.Random(0)
    for _ in range(500):
        cost, steps = draw.uniform(0.001, 1.0), draw.randint(2, 30)
        count = draw.randint(1, steps)
        space = Space((cost,), steps, count / steps * cost * steps)
        alone = space.evenly(0)
        assert alone.count(0) == count
        assert space.repaired(alone, random.Random(0)) == alone


def test_what_is_over_the_budget_is_repaired():
    space = Space((1.0, 0.1), 6, 2.0)
    mended = space.repaired((0,) * 6, random.Random(0))
    assert sorted(mended) == [NONE] * 4 + [0, 0]
    assert space.repaired(mended, random.Random(1)) == mended
    assert {space.repaired((0,) * 6, random.Random(seed)) for seed in range(9)} != {mended}
    assert sorted(space.repaired((NONE,) * 6, random.Random(0))) == [NONE] * 5 + [1]
    every = Space((1.0, 0.1), 6, 2.0, drop_steps=False)
    assert sorted(every.repaired((0,) * 6, random.Random(0))) == [0, 1, 1, 1, 1, 1]


def test_budgets_that_nothing_is_within():
    with pytest.raises(UserError, match=r"the cheapest takes 0.5 s. Give a larger budget\."):
        Space((1.0, 0.5), 4, 0.4)
    with pytest.raises(UserError, match=r"the cheapest takes 2 s.*drop_steps=true"):
        Space((1.0, 0.5), 4, 1.9, drop_steps=False)


def test_samples_that_are_no_numbers_are_the_worst():
    space, error = Space(COSTS, 6, 3.0), toy(6)
    for bad in (0, 1):  # model 0 is evaluated first
        found = alone(evolution(space, 40, 0), lambda choices, bad=bad: math.inf if bad in choices else error(choices))
        assert bad not in best_of(found).point
    assert len(alone(evolution(space, 20, 0), lambda choices: math.inf)) == 20


def test_predictor_ranks_what_it_has_not_seen():
    space, error, draw = Space(COSTS, 8, 8.0), toy(8), random.Random(0)
    everything = [space.repaired(tuple(draw.choices(space.options(), k=8)), draw) for _ in range(300)]
    known = {choices: error(choices) for choices in everything[:150]}
    predicted = torch.tensor(_predicted(everything[150:], known, 3))
    true = torch.tensor([error(choices) for choices in everything[150:]])
    assert torch.corrcoef(torch.stack([predicted.double(), true.double()]))[0, 1] > 0.9
    assert _features((0, NONE, 1), 2) == [1, 0, 0, 0, 0, 1, 1, 2, 2, 1]


def test_calls_take_turns_and_the_first_round_is_not_counted(monkeypatch):
    order, now = [], [0.0]
    monkeypatch.setattr("stagepatch.search.schedule_search._now", lambda: now[0])

    def call(name, times):
        order.append(name)
        now[0] += times.pop(0)

    first, second = [100.0, 1.0, 9.0, 2.0], [100.0, 5.0, 4.0, 6.0]
    seconds = median_seconds({"a": lambda: call("a", first), "b": lambda: call("b", second)}, 3)
    assert seconds == pytest.approx({"a": 2.0, "b": 5.0})
    assert order == ["a", "b"] * 4


def test_costs_are_measured_once_and_then_read(tiny_dit, tmp_path, monkeypatch):
    save_denoiser(tiny_dit(hidden_size=16, num_layers=1), SCHEDULER, tmp_path / "small")
    entries, base = [ZooEntry("small", str(tmp_path / "small"))], tiny_dit(hidden_size=256, num_layers=8)
    config = ScheduleConfig(output_dir=str(tmp_path / "out"), zoo=entries, sampling=SamplingConfig("ddpm", 5))
    costs = Zoo(config, base, SCHEDULER, None).space.costs
    assert costs[0] > 3 * costs[1] > 0
    monkeypatch.setattr("stagepatch.search.schedule_search.median_seconds", lambda *_: pytest.fail("measured again"))
    assert Zoo(config, base, SCHEDULER, None).space.costs == costs
    write_costs(tmp_path / "out", base=1.0)
    with pytest.raises(UserError, match="has not the costs of base, small: delete it"):
        Zoo(config, base, SCHEDULER, None)


@pytest.fixture
def models(tiny_dit, tmp_path):
    """A base, a cheaper model, and a patch for the base."""
    base = tiny_dit(0, learn_sigma=False)
    save_denoiser(base, SCHEDULER, tmp_path / "base")
    save_denoiser(tiny_dit(1, learn_sigma=False, hidden_size=16, num_layers=1), SCHEDULER, tmp_path / "small")
    patch = Patch.create(base)
    draw_weights(patch.prompts, 5.0)
    patch.save_pretrained(tmp_path / "patch")
    zoo = f"[{{name: small, model: {tmp_path / 'small'}}}, {{name: patched, learned: {tmp_path / 'patch'}}}]"
    places = [f"--model={tmp_path / 'base'}", f"--zoo={zoo}", f"--output_dir={tmp_path / 'out'}"]
    counts = ["--evaluations=7", "--seeds=[5, 6]", "--sampling.num_images=60", "--sampling.num_inference_steps=6"]
    return ["schedule", *places, *counts]


def write_costs(directory, **seconds):
    """Costs that do not hang on what else the machine does."""
    write_json(directory / "costs.json", {"seconds": seconds})


def found(tmp_path, name="out"):
    return read_json(tmp_path / name / "search.json")["evaluations"]


def steps_of(tmp_path, name="out"):
    """(timestep, expert) of each step of the schedule that was found."""
    steps = yaml.safe_load((tmp_path / name / "schedule.yaml").read_text())["steps"]
    return [(step["timestep"], step["expert"]) for step in steps]


def sample_schedule(tmp_path, *arguments, model="base", name="out"):
    schedule = f"--schedule={tmp_path / name / 'schedule.yaml'}"
    return sampled(tmp_path / model, tmp_path / "samples", schedule, *arguments)


def test_command_finds_a_schedule_that_sample_takes(models, tmp_path, capsys):
    assert main(models) == 0
    printed = capsys.readouterr().out
    evaluations, costs = found(tmp_path), read_json(tmp_path / "out" / "costs.json")["seconds"]
    budget = 0.5 * 6 * costs["base"]
    assert len({tuple(evaluation["schedule"]) for evaluation in evaluations}) == len(evaluations) == 7
    for evaluation in evaluations:
        seconds = sum(costs[name] for name in evaluation["schedule"] if name is not None)
        assert evaluation["seconds"] == pytest.approx(seconds)
        assert 0 < seconds <= budget * (1 + 1e-6)
    assert evaluations[0]["schedule"].count("base") == 3
    for text in ("base, 6 steps", "base, 3 steps", "base, 3 of the 6", "schedule, ", "s per image", "50%"):
        assert text in printed
    # The best schedule, by hand: its own steps and models, in diffusers' loop.
    best = min(evaluations, key=lambda evaluation: evaluation["value"])
    names = {"base": "base", "patched": "base", "small": "small"}
    by_name = {name: load_denoiser(tmp_path / directory)[0] for name, directory in names.items()}
    Patch.from_pretrained(tmp_path / "patch").attach(by_name["patched"])
    # Out of its file: diffusers takes over settings that were written, and not those that are a class's defaults.
    own_sampler = partial(sampler_of, "DPMSolverMultistep", load_denoiser(tmp_path / "base")[1])
    six = own_sampler(6).timesteps
    steps = [step for step in zip(six.tolist(), best["schedule"], strict=True) if step[1] is not None]
    assert steps_of(tmp_path) == steps
    assert "scheduler: dpmsolver++" in (tmp_path / "out" / "schedule.yaml").read_text()

    def expected(steps, seed, count, labels):
        experts = {timestep: by_name[name] for timestep, name in steps}
        return by_hand(own_sampler(list(experts)), lambda x, t: experts[int(t[0])](x, t, labels).sample, count, seed)

    images = sample_schedule(tmp_path, "--sampling.num_images=4")
    torch.testing.assert_close(images, expected(steps, 0, 4, torch.arange(4)), atol=1e-4, rtol=1e-4)
    # The value that the search gave it, and those of the comparison.
    references, extractor = load_references(ScheduleConfig().data), load_extractor("digits")
    labels = references.train.labels
    labels = labels.sort().values[spread(len(labels), 60)]

    def measured(steps, seed):
        return evaluate(expected(steps, seed, 60, labels), references, extractor)

    assert best["value"] == pytest.approx(measured(steps, 0)["fid_train"], rel=1e-3)
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["seeds"] == [5, 6]
    name = next(name for name in metrics if name.startswith("schedule"))
    assert metrics[name][1] == pytest.approx(measured(steps, 6), rel=1e-2, abs=1e-3)
    # The base within the same budget: the sampler's own three steps, and three of the six.
    three = own_sampler(3).timesteps.tolist()
    for name, timesteps in [("base, 3 steps", three), ("base, 3 of the 6", six[[0, 2, 5]].tolist())]:
        alone = measured([(timestep, "base") for timestep in timesteps], 5)
        assert metrics[name][0] == pytest.approx(alone, rel=1e-2, abs=1e-3)


def test_command_stopped_and_started_again_repeats_nothing(models, tiny_dit, tmp_path, monkeypatch, capsys):
    sample, seen, stops_after = Evaluator.sample, [], 3

    def counted(evaluator, model, scheduler, sampling, *more):
        if sampling.seed == 0:
            if len(seen) == stops_after:
                raise KeyboardInterrupt
            seen.append(sampling)
        # What is chosen must not be judged by the same images.
        assert (evaluator.references.held_out is None) == (sampling.seed == 0)
        return sample(evaluator, model, scheduler, sampling, *more)

    monkeypatch.setattr(Evaluator, "sample", counted)
    assert main(models) == 130
    costs = (tmp_path / "out" / "costs.json").read_text()
    stops_after = None
    assert main(models) == 0
    assert len(seen) == 7
    assert (tmp_path / "out" / "costs.json").read_text() == costs
    whole = found(tmp_path)
    assert main(models) == 0  # done: only the comparison is made again
    assert len(seen) == 7
    assert main([*models, "--evaluations=9"]) == 0
    assert len(seen) == 9
    assert found(tmp_path)[:7] == whole
    # A run that was not stopped, of the same costs, finds the same.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "costs.json").write_text(costs)
    assert main([*models, "--evaluations=9", f"--output_dir={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / "search.json").read_text() == (tmp_path / "out" / "search.json").read_text()
    capsys.readouterr()
    assert main([*models, "--sampling.num_images=61"]) == 2
    assert "sampling.num_images was 60, is 61" in capsys.readouterr().err
    save_denoiser(tiny_dit(2, learn_sigma=False, hidden_size=16, num_layers=1), SCHEDULER, tmp_path / "small")
    assert main(models) == 2  # another model in the same place
    assert "weights.small was" in capsys.readouterr().err


def test_commands_share_a_search_and_one_that_is_killed_is_replaced(models, tmp_path, processes):
    job = {"function": schedule_job, "arguments": [*models, "--evaluations=12"], "log": tmp_path / "log"}
    processes.call(**job, dies_at=3, expected=-signal.SIGKILL)
    for process in [processes.start(**job), processes.start(**job)]:
        processes.finish(process)
    assert len({tuple(evaluation["schedule"]) for evaluation in found(tmp_path)}) == 12
    noted = (tmp_path / "log").read_text().split()
    assert len(noted) == 12  # none twice, and what the one that died was at
    assert noted.count(noted[0]) == 2
    assert (tmp_path / "out" / "metrics.json").exists()


def test_without_a_zoo_the_steps_are_chosen_and_without_dropping_the_models(models, tmp_path):
    assert main([*models, "--zoo=[]", "--metric=recall", "--evaluations=4"]) == 0
    assert {name for each in found(tmp_path) for name in each["schedule"]} == {"base", None}
    recalls = [evaluation["value"] for evaluation in found(tmp_path)]
    assert min(recalls) < max(recalls)
    best = found(tmp_path)[recalls.index(max(recalls))]["schedule"]
    timesteps = read_json(tmp_path / "out" / "search.json")["settings"]["timesteps"]
    kept = [timestep for timestep, name in zip(timesteps, best, strict=True) if name is not None]
    assert [timestep for timestep, _ in steps_of(tmp_path)] == kept
    write_costs(tmp_path / "kept", base=1.0, small=0.2, patched=1.0)
    kept = ["--drop_steps=false", "--sampling.scheduler=ddim", "--budget=0.9", f"--output_dir={tmp_path / 'kept'}"]
    assert main([*models, *kept, "--evaluations=4"]) == 0
    assert all(None not in evaluation["schedule"] for evaluation in found(tmp_path, "kept"))
    # All steps are there, so that even a sampler that takes none by itself has them.
    sample_schedule(tmp_path, "--sampling.num_images=2", name="kept")


@pytest.mark.usefixtures("pixels")
def test_model_of_latents_is_searched_by_its_images(tmp_path):
    tiny = PIPELINES["UNet2DConditionModel"]
    tiny.build(0).save_pretrained(tmp_path / "model")
    tiny.build(1).save_pretrained(tmp_path / "other")
    images = draw_images(tmp_path / "images", count=6, size=(32, 32))
    given = [f"--model={tmp_path / 'model'}", f"--data.source={images}", "--data.image_size=32"]
    given += [f"--zoo=[{{name: other, model: {tmp_path / 'other'}}}]", "--evaluations=3", "--seeds=[4]"]
    given += ["--sampling.num_images=6", "--sampling.num_inference_steps=4", "--sampling.guidance_scale=3"]
    assert main(["schedule", *given, f"--output_dir={tmp_path / 'out'}"]) == 0
    assert len(found(tmp_path)) == 3
    sample_schedule(tmp_path, "--prompts=['a cat']", "--sampling.num_images=1", model="model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--budget=0"], "must be above 0"),
        (["--budget=0.001"], "Give a larger budget"),
        (["--evaluations=0"], "must be at least 1"),
        (["--seeds=[3, 0]"], "without 0, the search's own seed"),
        (["--seeds=[]"], "must be some"),
        (["--sampling.scheduler=ddim"], "'ddim' takes no timesteps"),
        (["--sampling.scheduler=dimm"], "no scheduler 'dimm'"),
        (["--sampling.scheduler=flow_euler"], "does not fit a model trained with"),
        (["--sampling.scheduler=HeunDiscreteScheduler"], "otherwise than once"),
        (["--sampling.scheduler=ddpm", "--sampling.num_inference_steps=2000"], "cannot sample in 2000 steps"),
        (["--zoo=[]", "--drop_steps=false"], "nothing to choose"),
        (["--zoo=[{name: a}]"], "one of `model` and `learned`"),
        (["--zoo=[{name: base, model: digits}]"], "'base' is empty, or taken"),
        (["--zoo=[{name: a, model: nowhere}]"], "The expert 'a': No model at 'nowhere'"),
        (["--zoo=[{name: a, learned: nowhere}]"], "The expert 'a': No patch at 'nowhere'"),
        (["--zoo=[{name: a, model: digits}]"], "The expert 'a': it was trained on another noise schedule"),
        (["--zoo=[{name: a, modle: digits}]"], "modle"),
        (["--metric=fid_held_out"], "fid_held_out"),
        (["--extractor=nothing"], "No feature extractor"),
    ],
)
def test_mistakes_are_named(models, capsys, changes, message):
    assert main([*models, *changes]) == 2
    assert message in capsys.readouterr().err


def test_processes_of_a_launch_are_refused_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(own_processes(), "num_processes", 2)
    assert main(["schedule", "--model=nowhere/at/all"]) == 2
    assert "start `stagepatch schedule` several times instead" in capsys.readouterr().err

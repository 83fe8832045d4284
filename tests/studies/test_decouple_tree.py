"""`stagepatch decouple --tree`: which branches are trained, from what each starts, and that the experts sample."""

import itertools
import json
import signal

import diffusers
import pytest
import torch

from stagepatch.checkpoints import load_denoiser, save_denoiser
from stagepatch.cli import main
from stagepatch.cli.config import DecoupleConfig
from stagepatch.methods import load_learned
from stagepatch.studies import plan_stages
from tests.runs import Strike
from tests.sampling.test_generate import sampled
from tests.studies.conftest import write_config
from tests.studies.test_decouple import TRAINING, decouple, differs, experts_of, stage_of, weights

PLAIN = {"p": 0.0, "consistency": 0.0}


@pytest.fixture
def model(tmp_path, tiny_dit):
    save_denoiser(tiny_dit(learn_sigma=False), diffusers.DDPMScheduler(), tmp_path / "model")
    return tmp_path / "model"


def lineages(model, **changes):
    """Of each expert: the ranges of its branches and its own."""
    stages = plan_stages(DecoupleConfig(model=str(model), **changes))
    return [[(each.first, each.stop) for each in (*stage.branches, stage)] for stage in stages]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ([1, 1], [[(0, 500)], [(500, 1000)]]),
        ([2, 2], [[(0, 500), (0, 250)], [(250, 750)], [(500, 1000), (750, 1000)]]),
        (
            [3, 3],
            [[(0, 500), (0, 250), (0, 125)], [(125, 875)], [(500, 1000), (750, 1000), (875, 1000)]],
        ),
        ([1, 3], [[(0, 500)], [(500, 875)], [(500, 1000), (750, 1000), (875, 1000)]]),
        ([0, 2], [[(0, 750)], [(500, 1000), (750, 1000)]]),
        ([2, 0], [[(0, 500), (0, 250)], [(250, 1000)]]),
    ],
    ids=str,
)
def test_the_plan_by_hand(model, tree, expected):
    assert lineages(model, tree=tree) == expected


@pytest.mark.parametrize(
    ("tree", "split"),
    [([3, 9], "t"), *[(tree, split) for tree in ([1, 4], [0, 1], [2, 0], [3, 2]) for split in ("t", "log_snr")]],
    ids=str,
)
def test_experts_part_all_timesteps_and_each_range_lies_within_its_parent_s(model, tree, split):
    grown = lineages(model, tree=tree, split=split)
    own = [ranges[-1] for ranges in grown]
    assert [timestep for first, stop in own for timestep in range(first, stop)] == list(range(1000))
    for ranges in grown:
        for (first, stop), (child_first, child_stop) in itertools.pairwise(ranges):
            assert first <= child_first < child_stop <= stop
            assert child_stop - child_first < stop - first


def test_the_published_tree_has_three_experts_on_levels_three_and_nine(model):
    low, middle, high = lineages(model, tree=[3, 9])
    assert (len(low), len(middle), len(high)) == (3, 1, 9)
    assert (low[-1], middle[-1], high[-1]) == ((0, 125), (125, 998), (998, 1000))


def parents(folder, tree):
    """(its parent's, its own) directory in the order in which they are trained; None for the model."""
    out = folder / "out"
    for number, levels in enumerate((tree[0], 1, tree[1])):
        places = [out / "branches" / f"{number}-{level}" for level in range(1, levels)]
        places.append(out / "stages" / str(number))
        yield from zip([None, *places], places, strict=False)


@pytest.mark.parametrize("method", ["finetune", "bitfit", "lora", "dmp"])
def test_each_child_s_first_loss_is_its_parent_s(tmp_path, model, seen, method):
    tree, training = [3, 2], {**TRAINING, "log_every": 1, "learning_rate": 3e-2}
    assert decouple(tmp_path, model, tree=tree, method=method, training={**training, "steps": 3}, **PLAIN) == 0
    families = list(parents(tmp_path, tree))
    assert len(seen) == 3 * len(families) == 18
    scheduler, losses = diffusers.DDPMScheduler(), []
    for (parent, child), draws in zip(families, seen[::3], strict=True):
        denoiser, _ = load_denoiser(parent if parent and method == "finetune" else model)
        if parent and method != "finetune":
            load_learned(denoiser, parent)
        noisy = scheduler.add_noise(draws.x_start, draws.noise, draws.timesteps)
        with torch.no_grad():
            prediction = denoiser(noisy, draws.timesteps, draws.condition["class_labels"]).sample
        first = json.loads((child / "log.jsonl").read_text().splitlines()[0])["loss"]
        assert first == pytest.approx(float((prediction - draws.noise).square().mean()), rel=1e-5)
        with torch.no_grad():
            base = load_denoiser(model)[0](noisy, draws.timesteps, draws.condition["class_labels"]).sample
        losses.append(abs(float((base - draws.noise).square().mean()) / first - 1))
    assert min(loss for loss, (parent, _) in zip(losses, families, strict=True) if parent) > 1e-4


def test_branches_draw_within_their_ranges_and_share_no_noise(tmp_path, model, seen):
    assert decouple(tmp_path, model, steps=2, tree=[2, 2], **PLAIN) == 0
    expected = [(0, 500), (0, 250), (250, 750), (500, 1000), (750, 1000)]
    for number, (first, stop) in enumerate(expected):
        timesteps = torch.cat([draws.timesteps for draws in seen[2 * number : 2 * number + 2]])
        assert first <= int(timesteps.min()) <= int(timesteps.max()) < stop
    assert len({tuple(draws.noise.flatten().tolist()) for draws in seen}) == len(seen) == 10


def test_experts_sample_as_any(tmp_path, model, capsys):
    assert decouple(tmp_path, model, tree=[2, 1], **PLAIN) == 0
    assert "3 stages, 0 of them done" in capsys.readouterr().out
    assert [(each["from"], each["to"], each["model"]) for each in experts_of(tmp_path)] == [
        (0, 250, "stages/0"),
        (250, 500, "stages/1"),
        (500, 1000, "stages/2"),
    ]
    schedule = f"--schedule={tmp_path / 'out' / 'experts.yaml'}"
    images = sampled(model, tmp_path / "samples", schedule, "--sampling.num_images=2")
    assert images.isfinite().all()
    base = sampled(model, tmp_path / "plain", "--sampling.num_images=2")
    assert differs({"": images}, {"": base})


def test_the_same_command_again_trains_nothing_and_one_expert_alone_its_branches_too(tmp_path, model, seen):
    assert decouple(tmp_path, model, tree=[2, 2], **PLAIN) == 0
    count = len(seen)
    assert decouple(tmp_path, model, tree=[2, 2], **PLAIN) == 0
    assert len(seen) == count
    assert decouple(tmp_path / "alone", model, tree=[2, 2], stage=2, **PLAIN) == 0
    assert sorted(path.name for path in (tmp_path / "alone" / "out" / "branches").iterdir()) == ["2-1"]
    assert not differs(weights(stage_of(tmp_path, 2)), weights(stage_of(tmp_path / "alone", 2)))


@pytest.mark.parametrize("iteration", [11, 11 + 20])
def test_a_killed_chain_goes_on_to_the_same_weights(tmp_path, model, processes, iteration):
    changes = {"tree": [0, 2], "stage": 1, **PLAIN}
    assert decouple(tmp_path / "whole", model, steps=20, **changes) == 0
    path = write_config(tmp_path / "killed", model=str(model), training={**TRAINING, "steps": 20}, **changes)
    command = ["decouple", f"--config={path}"]
    processes.call(main, -signal.SIGKILL, arguments=command, strike=Strike("iteration", iteration))
    assert not (stage_of(tmp_path / "killed", 1) / "stage.json").exists()
    assert (tmp_path / "killed" / "out" / "branches" / "1-1" / "stage.json").exists() == (iteration > 20)
    assert decouple(tmp_path / "killed", model, steps=20, **changes) == 0
    assert not differs(weights(stage_of(tmp_path / "killed", 1)), weights(stage_of(tmp_path / "whole", 1)))


def test_an_expert_of_a_tree_is_none_of_the_same_range_from_the_model(tmp_path, model, capsys):
    assert decouple(tmp_path, model, boundaries=[250, 500], projection=False, **PLAIN) == 0
    assert decouple(tmp_path, model, tree=[2, 1], **PLAIN) == 2
    assert "holds a stage of another config (tree was [], is [[0, 500]])" in capsys.readouterr().err


def test_a_branch_of_another_config_is_not_built_on(tmp_path, model, capsys):
    assert decouple(tmp_path, model, tree=[0, 2], **PLAIN) == 0
    for leaf in (tmp_path / "out" / "stages").glob("*/stage.json"):
        leaf.unlink()
    assert decouple(tmp_path, model, steps=5, tree=[0, 2], **PLAIN) == 2
    assert "branches/1-1' holds a stage of another config (training.steps was 4, is 5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree": [3]}, "tree=[3] must be two levels"),
        ({"tree": [0, 0]}, "must be two levels"),
        ({"tree": [-1, 2]}, "tree=[-1, 2] must be at least 0"),
        ({"tree": [1, 10]}, "tree=[1, 10]: 2^10 ranges are more than there is room for"),
        ({"tree": [9, 1], "split": "log_snr"}, "tree=[9, 1]: 2^"),
        ({"tree": [1, 1], "boundaries": [500]}, "boundaries say where ranges begin"),
        ({"tree": [1, 1], "projection": True}, "projection does not go with tree"),
        ({"tree": [1, 1], "objective": "ddo", "method": "lora"}, "tree trains by objective='denoising'"),
        ({"tree": [1, 1], "stage": 2}, "stage=2 is none of 0 to 1"),
    ],
    ids=str,
)
def test_mistakes_are_named(tmp_path, model, capsys, changes, message):
    assert decouple(tmp_path, model, **changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()

"""`stagepatch decouple`: what each stage sees, what it saves, how it goes on."""

import signal
from dataclasses import replace

import diffusers
import pytest
import torch
import yaml

from stagepatch.checkpoints import load_denoiser, save_denoiser
from stagepatch.cli import main
from stagepatch.cli.config import DecoupleConfig
from stagepatch.core import UserError, as_json, read_json, write_json
from stagepatch.diffusion import Objective
from stagepatch.methods import load_learned
from stagepatch.sampling import read_schedule
from stagepatch.studies import StageTrainingConfig, plan_stages, write_experts
from stagepatch.training import TrainingConfig
from tests.runs import Strike, iteration_of
from tests.studies.conftest import study, write_config

TRAINING = {"steps": 4, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 2, "tensorboard": False}


def decouple(folder, model, steps=4, seed=0, **changes):
    training = {**TRAINING, "steps": steps, "seed": seed}
    return study("decouple", folder, **{"model": str(model), "training": training, **changes})


@pytest.fixture
def model(tmp_path, tiny_dit):
    save_denoiser(tiny_dit(), diffusers.DDPMScheduler(), tmp_path / "model")
    return tmp_path / "model"


def weights(directory):
    return load_denoiser(directory)[0].state_dict()


def differs(first, second):
    return any(not torch.equal(first[name], second[name]) for name in first)


def stage_of(folder, number=0):
    return folder / "out" / "stages" / str(number)


def experts_of(folder):
    return yaml.safe_load((folder / "out" / "experts.yaml").read_text())["experts"]


def test_each_stage_trains_on_its_own_range_and_is_a_whole_model(tmp_path, model, seen, capsys):
    assert decouple(tmp_path, model, p=0.0, projection=False) == 0
    assert len(seen) == 16
    for number in range(4):
        timesteps = torch.cat([draws.timesteps for draws in seen[4 * number : 4 * number + 4]])
        assert 250 * number <= int(timesteps.min()) <= int(timesteps.max()) < 250 * (number + 1)
    base = weights(model)
    stages = [weights(stage_of(tmp_path, number)) for number in range(4)]
    assert all(differs(stage, base) for stage in stages)
    assert differs(stages[0], stages[1])
    assert experts_of(tmp_path)[1] == {"from": 250, "to": 500, "model": "stages/1"}
    facts = read_json(stage_of(tmp_path, 2) / "stage.json")
    assert (facts["from"], facts["to"], facts["base"]["source"]) == (500, 750, str(model))
    # The same command again trains nothing.
    assert decouple(tmp_path, model, p=0.0, projection=False) == 0
    assert len(seen) == 16
    assert "4 stages, 4 of them done" in capsys.readouterr().out


def test_p_of_one_is_fine_tuning_on_all_timesteps(tmp_path, model, seen):
    assert decouple(tmp_path, model, steps=30, p=1.0, num_stages=2, projection=False) == 0
    for half in (seen[:30], seen[30:]):
        timesteps = torch.cat([draws.timesteps for draws in half])
        assert (timesteps < 500).float().mean().sub(0.5).abs() < 0.15


def test_stages_share_no_draws_and_another_seed_gives_others(tmp_path, model, seen):
    for seed in (0, 1):
        assert decouple(tmp_path / str(seed), model, steps=1, seed=seed, num_stages=2, projection=False) == 0
    assert len(seen) == len({tuple(draws.noise.flatten().tolist()) for draws in seen}) == 4


def test_consistency_holds_a_stage_near_the_original(tmp_path, model):
    base, distances = weights(model), []
    for number, weight in enumerate((0.0, 1.0, 100.0)):
        # SGD-like steps: AdamW's are of one size whatever the loss, so many steps show the pull.
        changes = {"num_stages": 1, "training": {**TRAINING, "steps": 25, "learning_rate": 3e-4}, "projection": False}
        assert decouple(tmp_path / str(number), model, consistency=weight, **changes) == 0
        stage = weights(stage_of(tmp_path / str(number)))
        distances.append(sum(float((stage[name] - base[name]).square().sum()) for name in base))
    assert distances[2] < distances[1] < distances[0]


@pytest.mark.parametrize(
    ("method", "file"), [("lora", "lora.json"), ("dmp", "config.json"), ("bitfit", "weights.safetensors")]
)
def test_stages_of_other_methods_are_small_files_that_load(tmp_path, model, method, file):
    assert decouple(tmp_path, model, method=method, num_stages=2) == 0
    for number in range(2):
        assert (stage_of(tmp_path, number) / file).exists()
        load_learned(load_denoiser(model)[0], stage_of(tmp_path, number))
    assert experts_of(tmp_path)[1] == {"from": 500, "to": 1000, "learned": "stages/1"}


def small_unet():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, **blocks)


@pytest.mark.parametrize(("name", "kept"), [("unet", ["1", "2", "4"]), ("dit", ["0", "1", "2"])])
def test_projections_train_and_stay_where_they_cannot_be_folded(tmp_path, tiny_dit, name, kept):
    save_denoiser(tiny_dit() if name == "dit" else small_unet(), diffusers.DDPMScheduler(), tmp_path / "model")
    assert decouple(tmp_path, tmp_path / "model", num_stages=1) == 0
    stage, _ = load_denoiser(stage_of(tmp_path))
    assert list(stage.stagepatch_projection.maps) == kept
    assert all(not torch.equal(value, torch.eye(len(value))) for value in stage.stagepatch_projection.maps.values())
    labels = [torch.tensor([1])] if name == "dit" else []
    assert stage(torch.randn(1, 1, 8, 8), torch.tensor([3]), *labels)[0].isfinite().all()


def test_a_stage_alone_is_the_same_as_among_all_and_ends_the_set(tmp_path, model, capsys):
    assert decouple(tmp_path, model, num_stages=2) == 0
    assert decouple(tmp_path / "alone", model, num_stages=2, stage=1) == 0
    assert "Stages 0 are still to be trained" in capsys.readouterr().out
    assert not differs(weights(stage_of(tmp_path, 1)), weights(stage_of(tmp_path / "alone", 1)))
    assert decouple(tmp_path / "alone", model, num_stages=2, stage=0) == 0
    assert "still to be trained" not in capsys.readouterr().out


def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path, model, processes):
    changes = {"num_stages": 2, "stage": 1}
    assert decouple(tmp_path / "whole", model, steps=20, **changes) == 0
    path = write_config(tmp_path / "killed", model=str(model), training={**TRAINING, "steps": 20}, **changes)
    command = ["decouple", f"--config={path}"]
    processes.call(main, -signal.SIGKILL, arguments=command, strike=Strike("iteration", 11))
    directory = stage_of(tmp_path / "killed", 1)
    assert not (directory / "stage.json").exists()
    assert iteration_of(directory) == 10
    assert decouple(tmp_path / "killed", model, steps=20, **changes) == 0
    assert not differs(weights(directory), weights(stage_of(tmp_path / "whole", 1)))


def test_stages_are_jobs_in_processes_of_their_own(tmp_path, model, capsys):
    assert decouple(tmp_path, model, num_stages=2, launch={"executor": "local", "workers": 2}) == 0
    assert "done: stage 1 (timesteps 500 to 999)" in capsys.readouterr().out
    assert (tmp_path / "out" / "logs").is_dir()


def test_ranges_follow_t_log_snr_or_what_is_given(model):
    def edges(**changes):
        return [(stage.first, stage.stop) for stage in plan_stages(DecoupleConfig(model=str(model), **changes))]

    assert edges() == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert edges(boundaries=[100, 900]) == [(0, 100), (100, 900), (900, 1000)]
    scheduler = diffusers.DDPMScheduler()
    log_snr = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)).log()
    middle = edges(split="log_snr", num_stages=2)[0][1]
    half = (log_snr[0] + log_snr[-1]) / 2
    assert log_snr[middle - 1] > half >= log_snr[middle]


def test_released_preset_fills_in_what_was_left_out_and_nothing_else():
    released = DecoupleConfig(preset="released", training=StageTrainingConfig(steps=7, max_grad_norm=3.0))
    training = released.training.resolve("released")
    assert released.antithetic
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.95, 0.999, 1e-6)
    assert (training.ema_decay, training.ema_power) == (0.9999, 0.75)
    assert (training.steps, training.max_grad_norm) == (7, 3.0)
    default = TrainingConfig()
    explicit = StageTrainingConfig(adam_beta1=default.adam_beta1, weight_decay=default.weight_decay)
    assert (explicit.resolve("released").adam_beta1, explicit.resolve("released").weight_decay) == (0.9, 0.0)
    assert StageTrainingConfig().resolve("paper") == TrainingConfig(steps=20_000, batch_size=64, learning_rate=5e-5)
    paper = DecoupleConfig()
    assert (paper.p, paper.consistency, paper.num_stages) == (0.3, 1, 4)
    assert (paper.projection, paper.antithetic) == (True, False)
    assert not DecoupleConfig(preset="released", antithetic=False).antithetic


def test_preset_of_experts_trains_each_on_its_range_alone():
    experts = DecoupleConfig(preset="experts", p=0.1)
    training = experts.training.resolve("experts")
    assert (experts.p, experts.consistency, experts.projection, experts.antithetic) == (0.1, 0, False, False)
    assert (training.steps, training.batch_size, training.lr_scheduler, training.ema_decay) == (
        2000,
        128,
        "linear",
        0.998,
    )
    assert (
        DecoupleConfig(preset="experts", training=StageTrainingConfig(steps=7)).training.resolve("experts").steps == 7
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundaries": [500, 400]}, "boundaries=[500, 400] must rise"),
        ({"num_stages": 0}, "num_stages=0 must be at least 1"),
        ({"p": 1.5}, "p=1.5 must be from 0 to 1"),
        ({"stage": 4}, "stage=4 is none of 0 to 3"),
        ({"method": "lora", "projection": True}, "projection trains with all weights"),
        ({"consistency": -1.0}, "consistency=-1.0 must be at least 0"),
        ({"preset": "relaesed"}, "preset"),
        ({"model": "nowhere"}, "No model at 'nowhere'"),
        ({"method": "lora", "lora": {"targets": ["nope"]}}, "lora targets=['nope']"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_any_training(tmp_path, capsys, model, changes, message):
    assert decouple(tmp_path, **{"model": model, **changes}) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()


def test_stage_of_another_config_is_not_taken_for_done(tmp_path, model, capsys):
    assert decouple(tmp_path, model, num_stages=1) == 0
    assert decouple(tmp_path, model, num_stages=1, p=0.5) == 2
    assert "holds a stage of another config (p was 0.3, is 0.5)" in capsys.readouterr().err
    assert decouple(tmp_path, model, num_stages=1, steps=5) == 2
    assert "(training.steps was 4, is 5)" in capsys.readouterr().err


@pytest.fixture
def stage(tmp_path, model):
    """The only one of a plan, not yet trained."""
    values = {"output_dir": str(tmp_path / "out"), "model": str(model), "training": StageTrainingConfig(**TRAINING)}
    return plan_stages(DecoupleConfig(**values, num_stages=1))[0]


def test_stages_that_were_moved_count_as_done(tmp_path, model, seen):
    assert decouple(tmp_path / "here", model) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    seen.clear()
    assert decouple(tmp_path / "there", model) == 0
    assert not seen


def test_a_stage_that_was_trained_is_not_trained_again(tmp_path, model, stage, monkeypatch):
    assert decouple(tmp_path, model, num_stages=1) == 0
    monkeypatch.setattr("stagepatch.studies.decouple_jobs.Run", None)
    stage.run()


def test_a_stage_that_another_process_trains_is_waited_for(stage, works_after_another):
    assert not works_after_another(stage, lambda: (stage.directory / "stage.json").write_text("{}"))


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize(
    "ranges",
    [{"num_stages": 4}, {"num_stages": 3, "split": "log_snr"}, {"boundaries": [200, 875]}, {"tree": [2, 3]}],
    ids=str,
)
def test_a_flow_samples_each_timestep_with_the_stage_that_was_trained_on_it(tmp_path, tiny_dit, shift, ranges):
    """Trained by timesteps that the schedule shifts, sampled by what diffusers' scheduler tells the model."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    save_denoiser(tiny_dit(learn_sigma=False), scheduler, tmp_path / "model")
    stages = plan_stages(DecoupleConfig(model=str(tmp_path / "model"), output_dir=str(tmp_path), p=0.0, **ranges))
    objective = Objective(scheduler)
    write_experts(stages, tmp_path / "experts.yaml")
    model, _ = load_denoiser(tmp_path / "model")
    experts = read_schedule(tmp_path / "experts.yaml", 1000)
    of_base = replace(experts, ranges=[replace(each, denoiser=None) for each in experts.ranges])
    with of_base.attach(model) as attached:

        def dispatched(timesteps):
            return attached._choose(timesteps)

        trained = torch.empty(1000, dtype=torch.long)
        for number, stage in enumerate(stages):
            sampler = stage.timesteps(objective.levels)
            trained[sampler.first : sampler.stop] = number
        every = torch.arange(1000)
        assert dispatched(objective.model_timesteps(every)) == trained.tolist()
        assert len(set(trained.tolist())) == len(stages)
        scheduler.set_timesteps(40)
        nearest = (objective.levels - (scheduler.timesteps.double() / 1000).unsqueeze(1)).abs().argmin(dim=1)
        away = [abs(float(t) - stage.first) > 1.0 for t in scheduler.timesteps for stage in stages]
        clear = torch.tensor(away).view(40, -1).all(dim=1)
        expected = trained[nearest][clear].tolist()
        assert dispatched(scheduler.timesteps[clear]) == expected
    if "boundaries" in ranges:
        assert [(stage.first, stage.stop) for stage in stages] == [(0, 200), (200, 875), (875, 1000)]


def test_stages_of_a_flow_that_meant_its_unshifted_timesteps_are_not_gone_on_with(tmp_path, tiny_dit):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    save_denoiser(tiny_dit(learn_sigma=False), scheduler, tmp_path / "model")
    config = DecoupleConfig(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"))
    stage = plan_stages(config)[0]
    former = {**as_json(stage.identity()), "number": 0, "from": 0, "to": 250, "base": {}}
    del former["ranges_of"]
    write_json(stage.directory / "stage.json", former)
    with pytest.raises(UserError, match="ranges_of"):
        plan_stages(config)

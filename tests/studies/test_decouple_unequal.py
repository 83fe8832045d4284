"""`stagepatch decouple --prune, --models`, and a p for each range: stages that are no copies of the model."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from stagepatch.analysis import Samples
from stagepatch.checkpoints import load_denoiser, save_denoiser
from stagepatch.cli import main
from stagepatch.core import read_json
from stagepatch.diffusion import TimestepSampler
from stagepatch.models import prune
from stagepatch.studies import DecoupleConfig, decouple_pruning, learned_architectures, plan_stages
from stagepatch.studies.decouple_pruning import learn_architectures, prune_for
from stagepatch.training import BalancingConfig, Run, TrainConfig, loop
from tests.runs import make_model
from tests.sampling.test_generate import sampled
from tests.studies.test_decouple import TRAINING, decouple, differs, small_unet, stage_of, weights

WIDTH, HEADS, TOKENS = 32, 4, 16
PRUNED = {"spectral": 0.1, "boundaries": [20], "prune": [0.5, 0.0], "training": {**TRAINING, "log_every": 1}}


def save_model(directory, model=None):
    model = model or make_model(0, 0.1, hidden_size=WIDTH, num_attention_heads=HEADS)
    save_denoiser(model, diffusers.DDPMScheduler(), directory)
    return directory


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder with a model, and what was decoupled from it."""
    folder = tmp_path_factory.mktemp("pruned")
    assert decouple(folder, save_model(folder / "model"), **PRUNED) == 0
    return folder


def flops(heads, hidden):
    """Of a forward of one sample, by hand: two for each multiplication and addition of a matrix product."""
    inner = heads * WIDTH // HEADS
    attention = 3 * TOKENS * WIDTH * inner + 2 * TOKENS * TOKENS * inner + TOKENS * inner * WIDTH
    block = attention + 2 * TOKENS * WIDTH * hidden + 6 * WIDTH * WIDTH
    embedding = TOKENS * 4 * WIDTH + 256 * WIDTH + WIDTH * WIDTH
    last = 2 * WIDTH * WIDTH + TOKENS * WIDTH * 4 * 2
    return 2 * (embedding + 2 * block + last)


def test_a_range_s_stage_is_narrower_and_its_cost_is_said(pruned):
    config = load_denoiser(stage_of(pruned, 0))[0].config
    assert (config.num_attention_heads, config.attention_head_dim, config.mlp_ratio) == (2, 8, 2.0)
    assert load_denoiser(stage_of(pruned, 1))[0].config.num_attention_heads == 4
    facts = [read_json(stage_of(pruned, number) / "stage.json") for number in (0, 1)]
    assert [each["prune"] for each in facts] == [0.5, 0.0]
    assert [each["cost"]["flops"] for each in facts] == [flops(2, 64), flops(4, 128)]
    base = sum(value.numel() for value in load_denoiser(pruned / "model")[0].parameters())
    assert [each["base_cost"] for each in facts] == [{"parameters": base, "flops": flops(4, 128)}] * 2
    assert facts[0]["cost"]["parameters"] < facts[1]["cost"]["parameters"] == base


def test_the_costs_are_shown_again_and_experts_sample_but_are_not_merged(pruned, tmp_path, capsys):
    assert decouple(pruned, pruned / "model", **PRUNED) == 0
    shown = capsys.readouterr().out
    assert f"{flops(2, 64):,}" in shown
    assert f"{0.02 * flops(2, 64) / flops(4, 128) + 0.98:.3f}" in shown
    schedule = f"--schedule={pruned / 'out' / 'experts.yaml'}"
    images = sampled(pruned / "model", tmp_path / "samples", schedule, "--sampling.num_images=2")
    assert images.isfinite().all()
    merge = ["merge", f"--stages=[{pruned / 'out'}]", "--weights=[1,1]", f"--output_dir={tmp_path / 'merged'}"]
    assert main(merge) == 2
    assert "has another architecture than the base" in capsys.readouterr().err


def test_consistency_is_to_the_model_before_it_was_pruned(pruned):
    first = [json.loads((stage_of(pruned, number) / "log.jsonl").read_text().splitlines()[0]) for number in (0, 1)]
    for name in ("consistency", "spectral"):
        assert first[0][name] > 1e-4
        assert first[1][name] == 0.0
    assert read_json(stage_of(pruned, 0) / "stage.json")["spectral"] == 0.1


def test_a_pruned_stage_goes_on_to_the_same_weights(pruned, tmp_path, monkeypatch):
    backward, calls = loop.backward, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("struck")
        return backward(*arguments)

    monkeypatch.setattr(loop, "backward", stopped)
    changes = {**PRUNED, "stage": 0}
    with pytest.raises(KeyError):
        decouple(tmp_path, pruned / "model", **changes)
    assert decouple(tmp_path, pruned / "model", **changes) == 0
    assert len(calls) == 6  # the checkpoint is of two steps
    assert not differs(weights(stage_of(tmp_path, 0)), weights(stage_of(pruned, 0)))


@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_gradients_are_of_the_range_s_timesteps_whose_loss_is_near_its_largest(pruned, tmp_path, threshold):
    run = Run(TrainConfig(model=str(pruned / "model"), output_dir=str(tmp_path), method="finetune"))
    run.config.training.batch_size = 4
    timesteps = TimestepSampler(1000, 0, 30)
    expected, scheduler = load_denoiser(pruned / "model")
    found = prune_for(run, timesteps, 0.5, threshold)
    expected.requires_grad_(True)
    losses, samples = [], Samples(run.dataset, range(30), 4, 4)
    for timestep in range(30):
        (draws,) = samples.at(timestep, expected, run.objective)
        noisy = scheduler.add_noise(draws.x_start, draws.noise, draws.timesteps)
        output = expected(noisy, draws.timesteps, draws.condition["class_labels"])[0]
        losses.append(run.objective.loss(output, draws.x_start, draws.noise, draws.timesteps).mean())
    kept = [loss for loss in losses if loss >= threshold * max(losses)]
    assert len(kept) == 1 if threshold == 1.0 else 1 < len(kept) < 30
    sum(kept).backward()
    assert not differs(found.state_dict(), prune(expected, 0.5).state_dict())


@pytest.fixture
def unlike(tmp_path):
    """Folders of a base, of a U-Net without attention, and of a DiT that is wider than the base."""
    facts = {"conditioning": "none", "learn_sigma": False}
    return (
        save_model(tmp_path / "base", make_model(0, 0.1, **facts)),
        save_model(tmp_path / "unet", small_unet()),
        save_model(tmp_path / "wide", make_model(1, 0.1, hidden_size=24, num_attention_heads=3, **facts)),
    )


def test_experts_of_other_architectures_each_by_its_range_and_its_p(tmp_path, unlike, seen):
    base, *models = unlike
    changes = {"num_stages": 2, "models": list(map(str, models)), "p": [0.0, 1.0], "consistency": 0.0}
    assert decouple(tmp_path, base, **changes) == 0
    timesteps = [torch.cat([draws.timesteps for draws in half]) for half in (seen[:4], seen[4:])]
    assert int(timesteps[0].max()) < 500
    assert int(timesteps[1].min()) < 500 <= int(timesteps[1].max())
    for number, model in enumerate(models):
        facts = read_json(stage_of(tmp_path, number) / "stage.json")
        assert (facts["base"]["source"], facts["p"]) == (str(model), changes["p"][number])
        own, trained = weights(model), weights(stage_of(tmp_path, number))
        distance = max(float((trained[name] - own[name]).abs().max()) for name in own)
        assert 0.0 < distance < 5e-3  # four steps of 1e-3
    schedule = f"--schedule={tmp_path / 'out' / 'experts.yaml'}"
    assert sampled(base, tmp_path / "samples", schedule, "--sampling.num_images=2").isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": 1.0}, "prune=1.0 must be a share"),
        ({"prune": [0.1, 0.2, 0.3]}, "prune has 3 values for 2 ranges"),
        ({"prune": 0.3, "prune_threshold": 2.0}, "prune_threshold=2.0"),
        ({"prune": 0.3, "method": "lora"}, "prune goes with method='finetune'"),
        ({"models": ["unet", "unet"], "prune": 0.3}, "not UNet2DModel"),
        ({"models": ["unet"]}, "models has 1 values for 2 ranges"),
        ({"models": ["unet", "none"]}, "No model at"),
        ({"models": ["unet", "digits"]}, "models: 'digits': it was trained on another noise schedule"),
        ({"p": [0.3]}, "p has 1 values for 2 ranges"),
        ({"p": []}, "p has 0 values for 2 ranges"),
    ],
    ids=str,
)
def test_mistakes_are_named(tmp_path, unlike, capsys, changes, message):
    if "models" in changes:
        places = [name if name == "digits" else str(tmp_path / name) for name in changes["models"]]
        changes = {**changes, "models": places}
    assert decouple(tmp_path, unlike[0], **{"num_stages": 2, **changes}) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages").exists()


BUDGET = {"boundaries": [400], "prune_budget": 0.6, "prune_steps": 3, "consistency": 0.0, "training": TRAINING}


@pytest.fixture
def few(monkeypatch):
    """Gradients at two timesteps a range."""
    monkeypatch.setattr(decouple_pruning, "_MOST", 2)


@pytest.mark.usefixtures("few")
def test_a_budget_is_kept_by_all_ranges_together(pruned, tmp_path, capsys, monkeypatch):
    assert decouple(tmp_path, pruned / "model", **BUDGET) == 0
    facts = [read_json(stage_of(tmp_path, number) / "stage.json") for number in (0, 1)]
    mean = sum(share * each["cost"]["flops"] for share, each in zip((0.4, 0.6), facts, strict=True))
    assert 0.57 < mean / facts[0]["base_cost"]["flops"] <= 0.6
    kept = load_file(tmp_path / "out" / "architectures" / "architectures.safetensors")
    for number in (0, 1):
        config = load_denoiser(stage_of(tmp_path, number))[0].config
        assert config.num_layers == int(kept[f"{number}.blocks"].sum())
        assert config.num_attention_heads == int(kept[f"{number}.heads"][0].sum())
    schedule = f"--schedule={tmp_path / 'out' / 'experts.yaml'}"
    assert sampled(pruned / "model", tmp_path / "samples", schedule, "--sampling.num_images=2").isfinite().all()
    # A stage alone learns the same, which is not learned twice.
    assert decouple(tmp_path / "alone", pruned / "model", **BUDGET, stage=1) == 0
    again = load_file(tmp_path / "alone" / "out" / "architectures" / "architectures.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in again.items())
    assert not differs(weights(stage_of(tmp_path / "alone", 1)), weights(stage_of(tmp_path, 1)))
    monkeypatch.setattr(learned_architectures, "learn_architectures", None)
    assert decouple(tmp_path / "alone", pruned / "model", **BUDGET, stage=0) == 0
    capsys.readouterr()
    assert decouple(tmp_path / "alone", pruned / "model", **{**BUDGET, "prune_steps": 4}, stage=0) == 2
    assert "prune_steps" in capsys.readouterr().err


@pytest.mark.usefixtures("few")
def test_what_does_nothing_goes_first(tmp_path, monkeypatch):
    """By a loss that is the distance to the whole model, whose second block is the identity."""
    model = make_model(0, 0.3, hidden_size=WIDTH, num_attention_heads=HEADS, num_layers=3)
    torch.nn.init.zeros_(model.blocks[1].adaLN_modulation[1].weight)
    torch.nn.init.zeros_(model.blocks[1].adaLN_modulation[1].bias)
    run = Run(TrainConfig(model=str(save_model(tmp_path / "model", model)), output_dir=str(tmp_path / "run")))
    run.config.training.batch_size = 8

    def distance(other, objective, draws):
        given = draws.x_start + draws.noise, draws.timesteps, draws.condition["class_labels"]
        return 10.0 * (other(*given)[0] - model(*given)[0].detach()).square().mean(dim=(1, 2, 3))

    monkeypatch.setattr(decouple_pruning, "sample_losses", distance)
    halves = [TimestepSampler(1000, 0, 500), TimestepSampler(1000, 500, 1000)]
    for kept in learn_architectures(run, halves, 0.68, 60, 0.05):
        assert kept.blocks.tolist() == [True, False, True]


def test_timesteps_whose_gradients_are_alike_make_a_range(tmp_path, unlike):
    cosine = [[1.0 if (row == 0) == (column == 0) else -0.5 for column in range(4)] for row in range(4)]
    found = {"gradients": {"timesteps": [125, 375, 625, 875], "cosine": {"matrix": cosine}}}
    (tmp_path / "analysis.json").write_text(json.dumps(found))
    balancing = BalancingConfig(similarity=str(tmp_path / "analysis.json"))
    config = DecoupleConfig(model=str(unlike[0]), split="gradient", num_stages=2, balancing=balancing)
    assert [(stage.first, stage.stop) for stage in plan_stages(config)] == [(0, 250), (250, 1000)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_budget": 1.5}, "prune_budget=1.5 must be a share"),
        ({"prune_budget": 0.5, "prune_steps": 0}, "prune_steps=0 at least 1"),
        ({"prune_budget": 0.5, "prune": 0.3}, "leave out prune and models"),
        ({"prune_budget": 0.5, "tree": [1, 1]}, "prune_budget goes with method='finetune'"),
        ({"prune_budget": 0.01}, "prune_budget=0.01 is less than the smallest architecture takes"),
        ({"split": "gradient"}, "Clustering by gradients needs balancing.similarity"),
    ],
    ids=str,
)
def test_mistakes_of_a_budget_are_named(tmp_path, unlike, capsys, changes, message):
    assert decouple(tmp_path, unlike[0], **{"num_stages": 2, "consistency": 0.0, **changes}) == 2
    assert message in capsys.readouterr().err

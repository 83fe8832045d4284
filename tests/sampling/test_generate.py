"""Samples: every diffusers sampler, guidance, and image i from (seed, i) alone."""

import inspect
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.core import UserError, read_tensors
from stagepatch.diffusion import ObjectiveConfig, make_sampler, make_scheduler
from stagepatch.families import predict
from stagepatch.models import DiT
from stagepatch.sampling import SamplingConfig, balanced_labels, generate, load_experts
from stagepatch.sampling.generation import in_batches, sampled_as_trained
from tests.tiny import FAMILIES

SCHEDULER = make_scheduler(ObjectiveConfig())
SAMPLERS = {"ddpm": "DDPM", "ddim": "DDIM", "pndm": "PNDM", "dpmsolver++": "DPMSolverMultistep"}


config = partial(SamplingConfig, num_inference_steps=3, num_images=5)


def noise(seed, count, shape=(1, 8, 8)):
    generators = [
        torch.Generator().manual_seed(int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] >> 1))
        for i in range(count)
    ]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]), generators


def sampler_of(kind, scheduler, steps):
    """A scheduler of diffusers, of the same betas, set to that number of steps or those timesteps."""
    spacing = {"timestep_spacing": "linspace"} if kind == "DDPM" else {}  # the papers'
    sampler = getattr(diffusers, f"{kind}Scheduler").from_config(scheduler.config, **spacing)
    sampler.set_timesteps(**{"timesteps" if isinstance(steps, list) else "num_inference_steps": steps})
    return sampler


def by_hand(sampler, output, count, seed=0, shape=(1, 8, 8)):
    """A loop with a scheduler of diffusers whose steps are set; output: sample, timesteps -> the model's output."""
    sample, generators = noise(seed, count, shape)
    sample = sample * getattr(sampler, "init_noise_sigma", 1.0)
    options = {"generator": generators} if "generator" in inspect.signature(sampler.step).parameters else {}
    with torch.no_grad():
        for timestep in sampler.timesteps:
            scaled = sampler.scale_model_input(sample, timestep) if hasattr(sampler, "scale_model_input") else sample
            predicted = output(scaled, timestep.expand(count))
            sample = sampler.step(predicted, timestep, sample, **options).prev_sample
    return sample


def sampled(model, output_dir, *arguments):
    """The images that `stagepatch sample` writes."""
    assert main(["sample", f"--model={model}", f"--output_dir={output_dir}", *arguments]) == 0
    return read_tensors(output_dir / "samples.safetensors")[0]["images"]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 50])
def test_batches_do_not_change_the_images(tiny_dit, name, batch_size):
    whole, split = (
        generate(tiny_dit(), SCHEDULER, config(scheduler=name, num_inference_steps=4, batch_size=size))
        for size in (5, batch_size)
    )
    torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-4)


def test_more_images_keep_the_first_and_seeds_differ(tiny_dit):
    few, many = (generate(tiny_dit(), SCHEDULER, config(num_images=count)) for count in (3, 7))
    torch.testing.assert_close(many[:3], few, atol=1e-5, rtol=1e-5)
    other = generate(tiny_dit(), SCHEDULER, config(num_images=3, seed=1))
    assert (other - few).abs().mean() > 0.1
    assert (few[0] - few[1]).abs().mean() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_a_loop_written_with_the_diffusers_scheduler(tiny_dit, name):
    model = tiny_dit(learn_sigma=False)
    scheduler = make_scheduler(ObjectiveConfig(beta_schedule="scaled_linear"))
    sampler = sampler_of(SAMPLERS[name], scheduler, 4)
    labels = torch.tensor([4, 7])
    expected = by_hand(sampler, lambda sample, timesteps: model(sample, timesteps, labels).sample, 2, seed=3)
    choice = config(scheduler=name, num_images=2, num_inference_steps=4, seed=3)
    torch.testing.assert_close(generate(model, scheduler, choice, labels), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variance", [True, False])
def test_learned_variance_is_used_by_ddpm_and_dropped_by_others(tiny_dit, variance):
    model = tiny_dit(learn_sigma=variance)
    scheduler = make_scheduler(ObjectiveConfig(), learn_sigma=variance)
    images = generate(model, scheduler, config(scheduler="ddpm"))
    sampler = sampler_of("DDPM", scheduler, 3)
    assert sampler.config.variance_type == ("learned_range" if variance else "fixed_small")
    expected = by_hand(sampler, lambda sample, timesteps: predict(model, sample, timesteps, torch.arange(5)), 5)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
    if variance:
        with torch.no_grad():  # the variance's half changes the images
            model.final_layer.linear.bias[1::2].add_(5.0)
        assert not torch.allclose(generate(model, scheduler, config(scheduler="ddpm")), images)


@pytest.mark.parametrize("kind", ["EDMEuler", "EDMDPMSolverMultistep"])
def test_models_of_edm_are_sampled_and_guided_as_by_diffusers(tiny_dit, kind, tmp_path):
    """They are told ¼ ln σ, below 0 at little noise: no level of 0 to 1."""
    model = tiny_dit(learn_sigma=False)
    scheduler = getattr(diffusers, f"{kind}Scheduler")(sigma_data=0.5)
    labels, none = torch.tensor([4, 7]), torch.full((2,), 10)
    choice = config(scheduler=f"{kind}Scheduler", num_images=2, num_inference_steps=4, guidance_scale=2.0)

    def output(sample, timesteps):
        own, without = (model(sample, timesteps, each).sample for each in (labels, none))
        return without + 2.0 * (own - without)

    images = generate(model, scheduler, choice, labels)
    torch.testing.assert_close(images, by_hand(sampler_of(kind, scheduler, 4), output, 2), atol=1e-4, rtol=1e-4)
    assert sampled_as_trained(config(), scheduler).scheduler == f"{kind}Scheduler"
    with pytest.raises(UserError, match=f"'ddim' does not fit a model trained with {kind}Scheduler"):
        generate(model, scheduler, config())
    with pytest.raises(UserError, match="'EDMEulerScheduler' does not fit a model trained with DDPM"):
        generate(model, SCHEDULER, config(scheduler="EDMEulerScheduler"))
    limited = replace(choice, guidance_interval=[0.0, 0.5])
    with pytest.raises(UserError, match=r"guidance_interval is by the timestep.*is told ¼ ln σ"):
        generate(model, scheduler, limited, labels)
    path = tmp_path / "experts.yaml"
    path.write_text("experts: [{from: 0, to: 1000}]")
    with pytest.raises(UserError, match=r"experts\.yaml' is by the timestep"):
        load_experts(path, model, scheduler)


def test_guidance_of_all_and_of_the_first_channels(tiny_dit):
    model = tiny_dit(in_channels=4, learn_sigma=False)
    start, _ = noise(0, 2, (4, 8, 8))
    sampler = sampler_of("DDIM", SCHEDULER, 1)
    timestep = sampler.timesteps[0]
    with torch.no_grad():
        conditional = model(start, timestep.expand(2), torch.tensor([0, 1])).sample
        unconditional = model(start, timestep.expand(2), torch.tensor([10, 10])).sample
    guided = unconditional + 2.5 * (conditional - unconditional)
    first_three = torch.cat([guided[:, :3], conditional[:, 3:]], dim=1)
    for channels, output in ((0, guided), (3, first_three)):
        choice = config(num_inference_steps=1, num_images=2, guidance_scale=2.5, guidance_channels=channels)
        expected = sampler.step(output, timestep, start).prev_sample
        torch.testing.assert_close(generate(model, SCHEDULER, choice), expected, atol=1e-4, rtol=1e-4)


def test_guidance_in_an_interval_of_noise_levels(tiny_dit):
    model = tiny_dit(learn_sigma=False)
    sampler, guided_at = sampler_of("DDIM", SCHEDULER, 4), []

    def sometimes_guided(sample, timesteps):
        conditional, unconditional = (
            model(sample, timesteps, torch.tensor(classes)).sample for classes in ([0, 1], [10, 10])
        )
        if not 0.2 <= float(timesteps[0]) / 1000 <= 0.6:
            return conditional
        guided_at.append(int(timesteps[0]))
        return unconditional + 3.0 * (conditional - unconditional)

    expected = by_hand(sampler, sometimes_guided, 2)
    assert 0 < len(guided_at) < 4
    choice = config(num_inference_steps=4, num_images=2, guidance_scale=3.0, guidance_interval=[0.2, 0.6])
    torch.testing.assert_close(generate(model, SCHEDULER, choice), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("interval", [[0.6, 0.2], [0.1], [-0.1, 0.5], [0.0, 2.0]])
def test_an_interval_that_is_none_is_refused(tiny_dit, interval):
    with pytest.raises(UserError, match="two noise levels from 0 to 1"):
        generate(tiny_dit(), SCHEDULER, config(guidance_scale=2.0, guidance_interval=interval))


def test_converted_model_samples_as_the_diffusers_model():
    torch.manual_seed(0)
    theirs = FAMILIES["DiTTransformer2DModel"].build(num_embeds_ada_norm=1000).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for block in theirs.transformer_blocks[1:]:  # a DiT has one embedder for all blocks
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    ours = DiT.from_diffusers(theirs)
    scheduler = DDIMScheduler(clip_sample=False)
    labels, null = torch.tensor([3, 900]), torch.tensor([1000, 1000])

    def guided(sample, timesteps):
        conditional, unconditional = (theirs(sample, timesteps, classes).sample for classes in (labels, null))
        return unconditional + 4.0 * (conditional - unconditional)

    expected = by_hand(sampler_of("DDIM", scheduler, 3), guided, 2, shape=(4, 8, 8))
    images = generate(ours, scheduler, config(num_images=2, guidance_scale=4.0), labels)
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=1e-4)


def test_flow_models_sample_with_their_scheduler(tiny_dit):
    model, scheduler = tiny_dit(learn_sigma=False), FlowMatchEulerDiscreteScheduler()
    images = generate(model, scheduler, config(scheduler="flow_euler", num_images=2))
    sampler = sampler_of("FlowMatchEulerDiscrete", scheduler, 3)
    expected = by_hand(sampler, lambda sample, timesteps: model(sample, timesteps, torch.arange(2)).sample, 2)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


def test_labels_are_balanced_by_default_and_progress_is_reported(tiny_dit):
    counts = []
    images = generate(tiny_dit(), SCHEDULER, config(num_images=12, batch_size=5), on_batch=counts.append)
    assert counts == [5, 5, 2]
    given = generate(tiny_dit(), SCHEDULER, config(num_images=12), torch.tensor([*range(10), 0, 1]))
    torch.testing.assert_close(images, given, atol=1e-5, rtol=1e-5)


def test_more_processes_than_images_share_them(monkeypatch):
    module, parts = in_batches.__globals__, []
    monkeypatch.setitem(module, "gather_object", lambda own: parts.extend(own) or parts)
    for index in range(3):
        state = SimpleNamespace(process_index=index, num_processes=3)
        monkeypatch.setitem(module, "processes", lambda state=state: state)
        images = in_batches(lambda indices: torch.tensor(indices).view(-1, 1, 1, 1), config(num_images=2), None)
    assert images.flatten().tolist() == [0, 1]
    with pytest.raises(UserError, match="num_images=0 must be at least 1"):
        in_batches(None, config(num_images=0), None)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"scheduler": "dimm"}, "no scheduler 'dimm'"),
        ({"scheduler": "DiT"}, "no scheduler 'DiT'"),
        ({"scheduler": "pndm"}, "'pndm' cannot sample in 3 steps"),
        ({"scheduler": "ddim", "num_inference_steps": 2000}, "'ddim' cannot sample in 2000 steps"),
        ({"scheduler": "flow_euler"}, "does not fit a model trained with DDPMScheduler"),
    ],
)
def test_samplers_that_cannot_be(tiny_dit, choices, message):
    with pytest.raises(UserError, match=message):
        generate(tiny_dit(), SCHEDULER, config(**choices))


def test_guidance_without_classes_and_a_wrong_number_of_labels(tiny_dit):
    with pytest.raises(UserError, match="label for no class"):
        generate(tiny_dit(conditioning="none", num_classes=None), SCHEDULER, config(guidance_scale=2.0))
    with pytest.raises(UserError, match="3 labels for num_images=5"):
        generate(tiny_dit(), SCHEDULER, config(), torch.zeros(3, dtype=torch.long))


def test_chosen_classes_are_sampled_in_turn(tmp_path, capsys):
    options = ["--sampling.num_images=5", "--sampling.num_inference_steps=2", f"--output_dir={tmp_path}"]
    assert main(["sample", "--classes=[7, 1]", *options]) == 0
    found = read_tensors(tmp_path / "samples.safetensors")[0]["images"]
    model, scheduler = load_denoiser("digits")
    choice = config(num_images=5, num_inference_steps=2, scheduler="ddim")
    torch.testing.assert_close(found, generate(model, scheduler, choice, torch.tensor([7, 1, 7, 1, 7])))
    assert main(["sample", "--classes=[3, 10]", *options]) == 2
    assert "classes=[3, 10]: the model knows classes 0 to 9" in capsys.readouterr().err
    with pytest.raises(UserError, match="takes no classes"):
        balanced_labels(FAMILIES["UNet2DModel"].model(), 3, [1])


@pytest.mark.parametrize("count", [5, 25, 250, 1000])
def test_ddpm_takes_the_timesteps_of_improved_diffusion(count):
    """arXiv 2102.09672, Section 4: evenly spaced real numbers from 1 to T, rounded."""
    sampler = make_sampler("ddpm", SCHEDULER)
    sampler.set_timesteps(count)
    stride = 999 / (count - 1)
    assert sampler.timesteps.tolist() == [round(index * stride) for index in reversed(range(count))]
    kept = make_sampler("DDPMScheduler", SCHEDULER)
    kept.set_timesteps(250)
    assert int(kept.timesteps[0]) == 996


# arXiv 2305.08891, Table 2: T = 1000 in 10 steps, timesteps from 1 there, from 0 here
SPACINGS = {
    "leading": [901, 801, 701, 601, 501, 401, 301, 201, 101, 1],
    "trailing": [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100],
    "linspace": [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1],
}


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_lie_where_the_spacing_has_them(name, spacing, tiny_dit):
    model = tiny_dit(learn_sigma=False)
    asked = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(int(kwargs.get("timestep", args[-1])[0])), with_kwargs=True
    )
    choice = config(scheduler=name, num_inference_steps=10, timestep_spacing=spacing)
    images = generate(model, SCHEDULER, choice)
    assert asked == [timestep - 1 for timestep in SPACINGS[spacing]]
    own = getattr(diffusers, SAMPLERS[name] + "Scheduler").from_config(SCHEDULER.config, timestep_spacing=spacing)
    own.set_timesteps(10)
    labels = balanced_labels(model, 5)
    shape = tuple(images.shape[1:])
    expected = by_hand(
        own, lambda sample, timestep: predict(model, sample, timestep, {"class_labels": labels}), 5, 0, shape
    )
    torch.testing.assert_close(images, expected)


def test_a_sampler_without_spacings_refuses_one(capsys):
    with pytest.raises(UserError, match="'flow_euler' knows no timestep_spacing: leave 'trailing' out"):
        make_sampler("flow_euler", FlowMatchEulerDiscreteScheduler(), "trailing")
    assert main(["sample", "--sampling.timestep_spacing=trailling"]) == 2
    assert "trailing" in capsys.readouterr().err

"""Samples: every diffusers sampler, guidance, and image i from (seed, i) alone."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from stagepatch.core.errors import UserError
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.families import predict
from stagepatch.models import DiT
from stagepatch.sampling import SamplingConfig, generate

SAMPLERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
}


def config(**choices):
    return SamplingConfig(**{"num_inference_steps": 3, "num_images": 5, **choices})


def noise(seed, count, shape=(1, 8, 8)):
    generators = [
        torch.Generator().manual_seed(int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] >> 1))
        for i in range(count)
    ]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]), generators


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("batch_size", [1, 2, 5, 50])
def test_batches_do_not_change_the_images(tiny_dit, name, batch_size):
    model, scheduler = tiny_dit(), make_scheduler(ObjectiveConfig())
    whole = generate(model, scheduler, config(scheduler=name, num_inference_steps=4, batch_size=5))
    split = generate(model, scheduler, config(scheduler=name, num_inference_steps=4, batch_size=batch_size))
    torch.testing.assert_close(split, whole, atol=1e-4, rtol=1e-4)


def test_more_images_keep_the_first_and_seeds_differ(tiny_dit):
    model, scheduler = tiny_dit(), make_scheduler(ObjectiveConfig())
    few, many = (generate(model, scheduler, config(num_images=count)) for count in (3, 7))
    torch.testing.assert_close(many[:3], few, atol=1e-5, rtol=1e-5)
    other = generate(model, scheduler, config(num_images=3, seed=1))
    assert (other - few).abs().mean() > 0.1
    assert (few[0] - few[1]).abs().mean() > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_a_loop_written_with_the_diffusers_scheduler(tiny_dit, name):
    model = tiny_dit(learn_sigma=False)
    scheduler = make_scheduler(ObjectiveConfig(beta_schedule="scaled_linear"))
    sampler = SAMPLERS[name].from_config(scheduler.config)
    sampler.set_timesteps(4)
    sample, generators = noise(3, 2)
    labels = torch.tensor([4, 7])
    with torch.no_grad():
        for timestep in sampler.timesteps:
            output = model(sample, timestep.expand(2), labels).sample
            extra = {} if name == "pndm" else {"generator": generators}
            sample = sampler.step(output, timestep, sample, **extra).prev_sample
    images = generate(
        model, scheduler, config(scheduler=name, num_images=2, num_inference_steps=4, seed=3), torch.tensor([4, 7])
    )
    torch.testing.assert_close(images, sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variance", [True, False])
def test_learned_variance_is_used_by_ddpm_and_dropped_by_others(tiny_dit, variance):
    model = tiny_dit(learn_sigma=variance)
    scheduler = make_scheduler(ObjectiveConfig(), learn_sigma=variance)
    images = generate(model, scheduler, config(scheduler="ddpm"))
    sampler = DDPMScheduler.from_config(scheduler.config)
    assert sampler.config.variance_type == ("learned_range" if variance else "fixed_small")
    sampler.set_timesteps(3)
    sample, generators = noise(0, 5)
    with torch.no_grad():
        for timestep in sampler.timesteps:
            output = predict(model, sample, timestep.expand(5), torch.arange(5))
            sample = sampler.step(output, timestep, sample, generator=generators).prev_sample
    torch.testing.assert_close(images, sample, atol=1e-5, rtol=1e-5)
    if variance:
        with torch.no_grad():  # the variance's half changes the images
            model.final_layer.linear.bias[1::2].add_(5.0)
        assert not torch.allclose(generate(model, scheduler, config(scheduler="ddpm")), images)


def test_guidance_of_all_and_of_the_first_channels(tiny_dit):
    model = tiny_dit(in_channels=4, learn_sigma=False)
    scheduler = make_scheduler(ObjectiveConfig())

    def outputs(scale, channels):
        choice = config(num_inference_steps=1, num_images=2, guidance_scale=scale, guidance_channels=channels)
        return generate(model, scheduler, choice)

    start, _ = noise(0, 2, (4, 8, 8))
    sampler = DDIMScheduler.from_config(scheduler.config)
    sampler.set_timesteps(1)
    timestep = sampler.timesteps[0]
    with torch.no_grad():
        conditional = model(start, timestep.expand(2), torch.tensor([0, 1])).sample
        unconditional = model(start, timestep.expand(2), torch.tensor([10, 10])).sample
    guided = unconditional + 2.5 * (conditional - unconditional)
    everywhere = sampler.step(guided, timestep, start).prev_sample
    mixed = torch.cat([guided[:, :3], conditional[:, 3:]], dim=1)
    first_three = sampler.step(mixed, timestep, start).prev_sample
    torch.testing.assert_close(outputs(2.5, 0), everywhere, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs(2.5, 3), first_three, atol=1e-4, rtol=1e-4)


def test_converted_model_samples_as_the_diffusers_model():
    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for block in theirs.transformer_blocks[1:]:  # a DiT has one embedder for all blocks
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    ours = DiT.from_diffusers(theirs)
    scheduler = DDIMScheduler(clip_sample=False)
    start, _ = noise(0, 2, (4, 8, 8))
    sampler = DDIMScheduler.from_config(scheduler.config)
    sampler.set_timesteps(3)
    sample = start
    labels, null = torch.tensor([3, 900]), torch.tensor([1000, 1000])
    with torch.no_grad():
        for timestep in sampler.timesteps:
            conditional = theirs(sample, timestep.expand(2), labels).sample
            unconditional = theirs(sample, timestep.expand(2), null).sample
            guided = unconditional + 4.0 * (conditional - unconditional)
            sample = sampler.step(guided, timestep, sample).prev_sample
    images = generate(ours, scheduler, config(num_images=2, guidance_scale=4.0), labels)
    torch.testing.assert_close(images, sample, atol=1e-4, rtol=1e-4)


def test_flow_models_sample_with_their_scheduler(tiny_dit):
    model, scheduler = tiny_dit(learn_sigma=False), FlowMatchEulerDiscreteScheduler()
    images = generate(model, scheduler, config(scheduler="flow_euler", num_images=2))
    sampler = FlowMatchEulerDiscreteScheduler()
    sampler.set_timesteps(3)
    sample, _ = noise(0, 2)
    with torch.no_grad():
        for timestep in sampler.timesteps:
            sample = sampler.step(
                model(sample, timestep.expand(2), torch.arange(2)).sample, timestep, sample
            ).prev_sample
    torch.testing.assert_close(images, sample, atol=1e-5, rtol=1e-5)


def test_labels_are_balanced_by_default_and_progress_is_told(tiny_dit):
    model, scheduler, told = tiny_dit(), make_scheduler(ObjectiveConfig()), []
    images = generate(model, scheduler, config(num_images=12, batch_size=5), on_batch=told.append)
    assert told == [5, 5, 2]
    given = generate(model, scheduler, config(num_images=12), torch.tensor([*range(10), 0, 1]))
    torch.testing.assert_close(images, given, atol=1e-5, rtol=1e-5)


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
        generate(tiny_dit(), make_scheduler(ObjectiveConfig()), config(**choices))


def test_guidance_without_classes_and_a_wrong_number_of_labels(tiny_dit):
    scheduler = make_scheduler(ObjectiveConfig())
    with pytest.raises(UserError, match="label for no class"):
        generate(tiny_dit(conditioning="none", num_classes=None), scheduler, config(guidance_scale=2.0))
    with pytest.raises(UserError, match="3 labels for num_images=5"):
        generate(tiny_dit(), scheduler, config(), torch.zeros(3, dtype=torch.long))

"""Experts by range of timesteps: which is called when, and that the model comes back unchanged."""

import copy
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from stagepatch.core import UserError
from stagepatch.diffusion import make_sampler, pin_timesteps
from stagepatch.families import predict
from stagepatch.methods import LoRAConfig, MethodConfig, make_method
from stagepatch.patch import Patch
from stagepatch.sampling import (
    ExpertRange,
    Experts,
    SamplingConfig,
    experts_on,
    generate,
    generate_with_pipeline,
)
from tests.runs import assert_same, draw_weights
from tests.sampling.test_generate import SCHEDULER, by_hand, noise, sampler_of
from tests.tiny import FAMILIES, Family
from tests.tiny_pipelines import PIPELINES

config = partial(SamplingConfig, num_inference_steps=4, num_images=4)


def at(*bounds):
    """Ranges from 0 on: (end, denoiser), …"""
    starts = [0, *(end for end, _ in bounds)]
    return Experts([ExpertRange(start, end, model) for start, (end, model) in zip(starts, bounds, strict=False)])


def drawn_patch(model):
    patch = Patch.create(model)
    draw_weights(patch.parameters(), 2.0)
    return patch


def drawn_method(name, model, **lora):
    """A method prepared on the model, what it learns drawn."""
    method = make_method(MethodConfig(name, lora=LoRAConfig(**lora)))
    method.prepare(model)
    draw_weights([parameter for parameter in model.parameters() if parameter.requires_grad], 0.2)
    return method


def answer(model, batch, timestep):
    sample, _, labels = batch
    return model(sample, timestep, labels).sample


def steps_of(timesteps, name=""):
    """The base alone, at these timesteps."""
    return Experts.at_steps([(timestep, None, "base") for timestep in timesteps], 1000, name)


def test_two_experts_equal_two_models_in_a_loop_by_hand(tiny_dit):
    base, other = tiny_dit(0, learn_sigma=False), tiny_dit(1, learn_sigma=False)
    sampler = sampler_of("DDIM", SCHEDULER, 4)
    assert sampler.timesteps.tolist() == [750, 500, 250, 0]
    labels = torch.arange(4)
    expected = by_hand(sampler, lambda x, t: (other if t[0] < 500 else base)(x, t, labels).sample, 4)
    with at((500, other), (1000, None)).attach(base):
        images = generate(base, SCHEDULER, config())
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(images, generate(base, SCHEDULER, config()), atol=1e-2)
    assert not torch.allclose(images, generate(other, SCHEDULER, config()), atol=1e-2)


def test_one_expert_of_the_same_weights_is_the_base_bit_for_bit(tiny_dit):
    base = tiny_dit()
    expected = generate(base, SCHEDULER, config())
    for expert in (copy.deepcopy(base), base, None):
        with at((1000, expert)).attach(base):
            assert torch.equal(generate(base, SCHEDULER, config()), expected)


@pytest.mark.parametrize("timestep", [0, 1, 249, 250, 499.9, 500, 999, 1000])
def test_a_range_has_its_start_and_not_its_end(tiny_dit, batch, timestep):
    first, second, third, base = (tiny_dit(seed) for seed in range(4))
    sample, _, labels = batch
    expected = answer(first if timestep < 250 else second if timestep < 500 else third, batch, timestep)
    with at((250, first), (500, second), (1000, third)).attach(base):
        assert torch.equal(answer(base, batch, timestep), expected)
        assert torch.equal(base(sample=sample, timestep=timestep, class_labels=labels).sample, expected)
        assert torch.equal(base(sample, torch.full((4,), timestep), labels, return_dict=False)[0], expected)


FROM_NOISE = [f"{kind}Transformer2DModel" for kind in ("Lumina2", "ZImage", "Ideogram4", "OmniGen")]
FROM_NOISE.append("MochiTransformer3DModel")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_dispatched_by_the_noise_that_its_timestep_means(name):
    """Also those that count time in 0…1, or from noise to image."""
    family: Family = FAMILIES[name]
    base, clean, noisy = (family.model(seed) for seed in range(3))
    time = family.inputs(base, 2, *family.size)[family.timestep]
    is_ones = float(time.max()) <= 1
    for level, expert in ((0.4999, clean), (0.5, noisy)):
        told = 1 - level if name in FROM_NOISE else level
        timestep = {family.timestep: torch.full((2,), told if is_ones else told * 1000 - name.startswith("GlmImage"))}
        expected = family.call(expert, **timestep)
        with at((500, clean), (1000, noisy)).attach(base):
            assert torch.equal(family.call(base, **timestep), expected)


def test_borders_survive_the_division_by_1000_in_float32():
    family = FAMILIES["FluxTransformer2DModel"]
    base, low, high = (family.model(seed) for seed in range(3))
    for border in range(7, 1000, 31):
        at_border = {**family.inputs(base, 1, 8, 8), "timestep": torch.tensor([float(border)]) / 1000}
        with at((border, low), (1000, high)).attach(base):
            assert torch.equal(base(**at_border)[0], high(**at_border)[0])


def test_a_batch_of_several_experts_is_split_and_put_together(tiny_dit):
    base, other, third = (tiny_dit(seed) for seed in range(3))
    sample = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps, labels = torch.tensor([900, 3, 400, 999, 0, 300, 620]), torch.arange(7)

    def one_by_one(models):
        rows = zip(models, *(value.split(1) for value in (sample, timesteps, labels)), strict=True)
        return torch.cat([model(*row).sample for model, *row in rows])

    with at((300, other), (600, None), (1000, third)).attach(base):
        together = base(sample, timesteps, labels).sample
        alone = one_by_one([base] * 7)
        (tuple_output,) = base(sample, timesteps, labels, return_dict=False)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(tuple_output, together)
    apart = one_by_one([third, other, base, third, other, base, third])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_arguments_in_dicts_are_split_and_what_cannot_be_is_named():
    family = FAMILIES["UNet2DConditionModel of SDXL"]
    base, other = family.model(0), family.model(1)
    timestep = torch.tensor([900, 100])
    expected = torch.cat([family.call(base, timestep=timestep)[:1], family.call(other, timestep=timestep)[1:]])
    with at((500, other), (1000, None)).attach(base):
        torch.testing.assert_close(family.call(base, timestep=timestep), expected, atol=1e-5, rtol=1e-5)
    family = FAMILIES["ZImageTransformer2DModel"]  # takes and gives lists
    base, other = family.model(0), family.model(1)
    timestep = torch.tensor([0.9, 0.1, 0.8])
    own, others = family.call(base, 3, t=timestep), family.call(other, 3, t=timestep)
    with at((500, other), (1000, None)).attach(base):
        together = family.call(base, 3, t=timestep)
    torch.testing.assert_close(together, torch.stack([others[0], own[1], others[2]]), atol=1e-5, rtol=1e-5)
    family = FAMILIES["FluxTransformer2DModel"]
    base, other = family.model(0), family.model(1)
    with at((500, other), (1000, None)).attach(base), pytest.raises(UserError, match=r"img_ids .* cannot be split"):
        family.call(base, timestep=torch.tensor([0.9, 0.1]))


@pytest.mark.parametrize(
    "learn",
    [
        lambda base: drawn_patch(base).attach(base),
        # Hooks that go by the sample: ranks of a LoRA that are masked by each sample's timestep (T-LoRA).
        lambda base: drawn_method("lora", base, rank=4, min_rank=1),
    ],
)
def test_a_base_with_hooks_takes_its_own_part_of_a_batch_with_them(tiny_dit, learn):
    base, other = tiny_dit(0), tiny_dit(1)
    learn(base)
    sample, timesteps, labels = torch.randn(4, 1, 8, 8), torch.tensor([900, 10, 510, 20]), torch.arange(4)
    expected = base(sample, timesteps, labels).sample
    with at((500, other), (1000, None)).attach(base):
        mixed = base(sample, timesteps, labels).sample
    torch.testing.assert_close(mixed[::2], expected[::2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1::2], other(sample, timesteps, labels).sample[1::2], atol=1e-5, rtol=1e-5)


def test_experts_are_put_in_eval_mode(tiny_dit, batch):
    """A DiT in train mode drops labels."""
    base, other = tiny_dit(0), tiny_dit(1, class_dropout_prob=1.0).train()
    with at((1000, other)).attach(base):
        assert torch.equal(base(*batch).sample, tiny_dit(1)(*batch).sample)


def test_experts_of_another_architecture(tiny_dit):
    unet = FAMILIES["UNet2DModel"].model()
    channels = unet.config.in_channels
    base = tiny_dit(in_channels=channels, learn_sigma=False, conditioning="none", num_classes=1)
    sample = torch.randn(2, channels, 8, 8)
    with at((500, unet), (1000, None)).attach(base):
        torch.testing.assert_close(predict(base, sample, torch.tensor([100, 100]), {}), unet(sample, 100).sample)


def test_detached_the_model_is_what_it_was(tiny_dit, batch):
    base = tiny_dit()
    before, attributes = base(*batch).sample, set(vars(base))
    weights = copy.deepcopy(base.state_dict())
    handle = at((500, tiny_dit(1)), (1000, None)).attach(base)
    assert experts_on(base) is not None
    assert_same(base.state_dict(), weights)
    assert sum(1 for _ in base.modules()) == sum(1 for _ in tiny_dit().modules())
    handle.detach()
    handle.detach()
    assert experts_on(base) is None
    assert set(vars(base)) == attributes
    assert torch.equal(base(*batch).sample, before)
    assert_same(base.state_dict(), weights)


def test_an_instance_s_own_forward_comes_back(tiny_dit):
    base = tiny_dit()
    own = base.forward
    base.forward = replaced = lambda *args, **kwargs: own(*args, **kwargs)
    handle = at((1000, tiny_dit(1))).attach(base)
    handle.detach()
    assert base.forward is replaced
    handle = at((1000, tiny_dit(1))).attach(base)
    base.forward = own
    with pytest.raises(UserError, match="replaced the model's forward"):
        handle.detach()


def test_a_copy_of_the_model_has_copies_of_the_experts(tiny_dit, batch):
    base, other = tiny_dit(0), tiny_dit(1)
    handle = at((500, other), (1000, None)).attach(base)
    copied = copy.deepcopy(base)
    handle.detach()
    with torch.no_grad():
        for parameter in (*base.parameters(), *other.parameters()):
            parameter.zero_()
    assert torch.equal(answer(copied, batch, 100), answer(tiny_dit(1), batch, 100))
    assert torch.equal(answer(copied, batch, 900), answer(tiny_dit(0), batch, 900))


def test_a_compiled_model_meets_the_experts(tiny_dit, batch):
    base, other = tiny_dit(0), tiny_dit(1)
    timesteps = torch.full((4,), 100)
    compiled = torch.compile(base, backend="eager")
    before = answer(compiled, batch, timesteps)
    with at((500, other), (1000, None)).attach(compiled):
        during = answer(compiled, batch, timesteps)
    torch.testing.assert_close(during, answer(other, batch, timesteps))
    assert torch.equal(answer(compiled, batch, timesteps), before)


def test_patches_go_on_a_model_with_experts_and_see_its_arguments(tiny_dit, batch):
    base, other = tiny_dit(0), tiny_dit(1)
    patch = drawn_patch(base)
    with patch.attach(base):
        expected = answer(base, batch, 900)
    with at((500, other), (1000, None)).attach(base), patch.attach(base):
        assert torch.equal(answer(base, batch, 900), expected)
        assert torch.equal(answer(base, batch, 100), answer(other, batch, 100))


@pytest.mark.parametrize(
    ("name", "kind"), [("ddpm", "DDPM"), ("dpmsolver++", "DPMSolverMultistep"), ("euler", "EulerDiscrete")]
)
def test_steps_equal_a_loop_by_hand_over_the_same_timesteps(tiny_dit, name, kind):
    base, other = tiny_dit(0, learn_sigma=False), tiny_dit(1, learn_sigma=False)
    steps = [(990, None, "base"), (700, other, "other"), (300, None, "base"), (290, other, "other")]
    models = {float(timestep): model or base for timestep, model, _ in steps}
    sampler = sampler_of(kind, SCHEDULER, [timestep for timestep, _, _ in steps])
    assert sampler.timesteps.tolist() == list(models)
    expected = by_hand(sampler, lambda x, t: models[float(t[0])](x, t, torch.arange(4)).sample, 4)
    experts = Experts.at_steps(steps, 1000, name)
    with experts.attach(base):
        images = generate(base, SCHEDULER, experts.sampling(config(scheduler="ddim", num_inference_steps=9)))
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpmsolver++", "euler", "UniPCMultistepScheduler"])
def test_the_sampler_s_own_timesteps_change_nothing(tiny_dit, name):
    """Even of samplers that take no others."""
    base, plain = tiny_dit(), config(scheduler=name, num_inference_steps=5)
    expected = generate(base, SCHEDULER, plain)
    sampler = make_sampler(name, SCHEDULER)
    sampler.set_timesteps(5)
    timesteps = sorted({float(timestep) for timestep in sampler.timesteps}, reverse=True)
    if len(timesteps) < len(sampler.timesteps):
        pytest.skip("the sampler repeats a timestep")
    experts = steps_of(timesteps, name)
    with experts.attach(base):
        assert torch.equal(generate(base, SCHEDULER, experts.sampling(plain)), expected)


def test_flow_samplers_take_timesteps_as_they_are(tiny_dit):
    """diffusers would shift the sigmas of given timesteps a second time."""
    base = tiny_dit(learn_sigma=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = [1000.0, 900.0, 612.5, 200.0]
    sample, _ = noise(0, 4)
    with torch.no_grad():
        for timestep, after in zip(timesteps, [*timesteps[1:], 0.0], strict=True):
            velocity = base(sample, torch.full((4,), timestep), torch.arange(4)).sample
            sample = sample + (after - timestep) / 1000 * velocity
    experts = steps_of(timesteps, "flow_euler")
    with experts.attach(base):
        images = generate(base, scheduler, experts.sampling(config()))
    torch.testing.assert_close(images, sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"), [("ddim", {}), ("pndm", {}), ("dpmsolver++", {"use_karras_sigmas": True})]
)
def test_samplers_that_take_no_timesteps(name, options):
    plain = make_sampler(name, SCHEDULER)
    sampler = type(plain).from_config(plain.config, **options)
    pin_timesteps(sampler, [900, 500, 499, 20])
    with pytest.raises(UserError, match=r"dpmsolver\+\+|cannot take the timesteps"):
        sampler.set_timesteps(4)


@pytest.mark.parametrize("timesteps", [[], [5, 5], [5, 9]])
def test_steps_that_do_not_fall(timesteps):
    with pytest.raises(UserError, match="each lower than the one before"):
        steps_of(timesteps)


def time_of(args, kwargs):
    """The timestep that a denoiser is called with."""
    return float(torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else None)).max())


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel"])
def test_pipelines_take_experts(name, monkeypatch):
    tiny = PIPELINES[name]
    pipe, other = tiny.build(0), tiny.build(1)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    prompts = ["a cat", "a red house"] if tiny.is_prompted else []
    plain = config(num_images=2, num_inference_steps=3)
    base = generate_with_pipeline(pipe, plain, prompts)
    expert = getattr(other, part)
    with at((1000, copy.deepcopy(getattr(pipe, part)))).attach(pipe):
        assert torch.equal(generate_with_pipeline(pipe, plain, prompts), base)
    # The pipeline's own loop, its denoiser exchanged by hand at the border.
    own, called = getattr(pipe, part).forward, []

    def exchanged(*args, **kwargs):
        called.append(time_of(args, kwargs) < 600)
        return (expert if called[-1] else own)(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(getattr(pipe, part), "forward", exchanged)
        expected = generate_with_pipeline(pipe, plain, prompts)
    assert {True, False} == set(called)
    with at((600, expert), (1000, None)).attach(pipe):
        assert torch.equal(generate_with_pipeline(pipe, plain, prompts), expected)
    assert torch.equal(generate_with_pipeline(pipe, plain, prompts), base)
    assert not torch.equal(base, expected)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "SanaTransformer2DModel"])
def test_pipelines_take_steps_whatever_their_arguments(name):
    tiny, seen = PIPELINES[name], []
    pipe = tiny.build()
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    denoiser.register_forward_pre_hook(lambda _, *call: seen.append(time_of(*call)), with_kwargs=True)
    if name == "UNet2DConditionModel":
        pipe.scheduler = make_sampler("dpmsolver++", pipe.scheduler)
    pin_timesteps(pipe.scheduler, [950.0, 300.0, 290.0])
    tiny.call(pipe, steps=3)
    scale = 1000 if name.startswith("Flux") else 1
    assert [timestep * scale for timestep in seen] == pytest.approx([950.0, 300.0, 290.0])


def test_models_that_cannot_be_attached(tiny_dit):
    base, flux = tiny_dit(), FAMILIES["FluxTransformer2DModel"].model()
    for expert, message in ((flux, "counts time otherwise"), (tiny_dit().half(), "dtype")):
        with pytest.raises(UserError, match=message):
            at((1000, expert)).attach(base)
    with at((1000, None)).attach(base), pytest.raises(UserError, match="already"):
        at((1000, None)).attach(base)
    assert experts_on(base) is None

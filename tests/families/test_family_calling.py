import inspect
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.cogview4 import pipeline_cogview4
from diffusers.pipelines.ideogram4 import pipeline_ideogram4

from stagepatch.core.errors import UserError
from stagepatch.data import encode_images
from stagepatch.diffusion import TimestepsConfig, make_timesteps
from stagepatch.families import learns_sigma, null_label, num_classes, predict, sample_shape, takes_text, with_density
from stagepatch.families.cogview import before_shift, schedule_shift
from stagepatch.families.packing import pack, unpack
from stagepatch.families.registry import family_of
from stagepatch.patch import Patch, PatchConfig
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES


@pytest.mark.parametrize("conditioning", ["class", "none"])
def test_only_a_class_conditional_model_gets_its_labels(tiny_dit, batch, conditioning):
    model = tiny_dit(conditioning=conditioning)
    sample, timesteps, labels = batch
    is_conditional = conditioning == "class"
    assert bool(num_classes(model)) == is_conditional
    more = {"class_labels": labels} if is_conditional else {}
    output = predict(model, *batch)
    assert torch.equal(output, model(sample, timesteps, **more).sample)
    assert torch.equal(output, predict(model, sample, timesteps, labels.flip(0))) != is_conditional


def test_text_model_is_not_called_without_its_text(tiny_dit, batch):
    model = tiny_dit(conditioning="text", pooled_projection_dim=6)
    assert not num_classes(model)
    with pytest.raises(UserError, match="pooled_projections"):
        predict(model, *batch)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_learned_variance_doubles_the_channels(tiny_dit, batch, learn_sigma):
    model = tiny_dit(learn_sigma=learn_sigma)
    assert learns_sigma(model) == learn_sigma
    assert predict(model, *batch).shape == (4, 1 + learn_sigma, 8, 8)


def test_null_label_and_sample_shape_are_the_models(tiny_dit):
    model = tiny_dit(num_classes=7, in_channels=3, sample_size=16)
    assert null_label(model) == 7
    assert sample_shape(model) == (3, 16, 16)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("FluxTransformer2DModel", (4, 128, 128)),
        ("QwenImageTransformer2DModel", (4, 128, 128)),
        ("Flux2Transformer2DModel", (4, 128, 128)),
        ("NucleusMoEImageTransformer2DModel", (4, 128, 128)),
        ("WanTransformer3DModel", (4, 60, 104)),
        ("MotifVideoTransformer3DModel", (4, 92, 160)),
        ("SanaTransformer2DModel", (4, 4, 4)),
        ("UNet2DConditionModel", (4, 8, 8)),
    ],
)
def test_models_without_a_sample_size_have_their_familys(name, shape):
    """Flux and Qwen-Image make images of 1024×1024, of latents smaller by 8, as their pipelines do."""
    assert sample_shape(FAMILIES[name].build()) == shape


def test_a_u_net_without_a_sample_size_has_stable_diffusions():
    family = FAMILIES["UNet2DConditionModel"]
    assert sample_shape(family.build(sample_size=None)) == (4, 64, 64)


@pytest.mark.parametrize(
    ("name", "changes", "classes", "null"),
    [
        ("DiTTransformer2DModel", {}, 10, 10),
        ("UNet2DModel", {}, 0, None),
        ("PixArtTransformer2DModel", {}, 0, None),
        ("UNet2DModel", {"num_class_embeds": 5}, 5, None),  # a U-Net with classes has no label for none
    ],
)
def test_classes_of_diffusers_models(name, changes, classes, null):
    model = FAMILIES[name].model_class(**FAMILIES[name].config, **changes)
    assert (num_classes(model), null_label(model)) == (classes, null)


def test_learned_variance_of_diffusers_models_shows_in_their_channels():
    learned = {name for name, family in FAMILIES.items() if learns_sigma(family.build())}
    unets = {"UNet2DModel of ADM", "UNet2DConditionModel of Kandinsky 2.2", "UNet2DConditionModel of DeepFloyd IF"}
    assert learned == {"DiT", "PixArtTransformer2DModel", *unets}


def test_packing_is_the_pipelines():
    latents = torch.randn(2, 4, 6, 8)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, 6, 8), latents)


def test_gradients_pass_through_the_experts_of_hidream():
    """Against finite differences, in float64."""
    family = FAMILIES["HiDreamImageTransformer2DModel"]
    model = family.model().double().eval()
    sample = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    condition = {
        "encoder_hidden_states_t5": torch.randn(1, 5, 24),
        "encoder_hidden_states_llama3": torch.randn(1, 2, 5, 24),
        "pooled_embeds": torch.randn(1, 12),
    }
    condition = {name: value.double() for name, value in condition.items()}
    timesteps = torch.tensor([300.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda sample: predict(model, sample, timesteps, condition), sample.requires_grad_(), atol=1e-4, fast_mode=True
    )


# Told to the pipeline where its default is not what training does.
CALLS = {
    "UNet2DConditionModel of SDXL": {"original_size": (64, 64), "target_size": (64, 64)},
    "FluxTransformer2DModel": {"guidance_scale": 1.0},
    "Flux2Transformer2DModel": {"guidance_scale": 1.0},
    "QwenImageTransformer2DModel": {"true_cfg_scale": 1.0},
    "SanaTransformer2DModel": {"use_resolution_binning": False},
    "PixArtTransformer2DModel": {"use_resolution_binning": False},
    "ZImageTransformer2DModel": {"guidance_scale": 0.0},
    "Krea2Transformer2DModel": {"guidance_scale": 0.0},
    "HunyuanVideoTransformer3DModel": {"guidance_scale": 1.0},
    "HunyuanImageTransformer2DModel": {"distilled_guidance_scale": 1.0},
    "OmniGenTransformer2DModel": {"img_guidance_scale": 1.0},
    # Guided away from its sound as far as to be the pass without it.
    "LTX2VideoTransformer3DModel": {"modality_scale": 0.0, "audio_modality_scale": 3.0, "guidance_rescale": 0.0},
}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, tiny in PIPELINES.items()
        if tiny.is_trained and not tiny.references and tiny.vae_name == "vae"
        if name not in ("DiTTransformer2DModel", "UNet2DModel", "GlmImageTransformer2DModel")
    ],
)
def test_model_is_called_as_its_own_pipeline_calls_it(name, monkeypatch):
    """What the pipeline's scheduler is given, from the sample and the timestep that it was given with."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    seen, step = [], type(pipe.scheduler).step

    def noted(self, output, timestep, sample, *args, **kwargs):
        seen.append((output, timestep, sample.clone()))
        return step(self, output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", noted)
    defaults = inspect.signature(type(pipe).__call__).parameters
    length = {key: defaults[key].default for key in ("max_sequence_length",) if key in tiny.arguments}
    unguided = {"guidance_scale": 1.0} if "guidance_scale" in defaults else {}
    tiny.call(pipe, steps=2, **{**unguided, **length, **CALLS.get(name, {})})
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    condition = family_of(type(model)).encode_captions(pipe, [tiny.arguments["prompt"]])
    if name.startswith("WanVACE"):
        nothing = torch.zeros(1, 3, tiny.arguments["num_frames"], *tiny.pixels)
        condition["reference_latents"] = encode_images(pipe.vae, nothing)[0][:, None]
    assert len(seen) >= 2
    output, timestep, sample = seen[0]
    if "Euler" in type(pipe.scheduler).__name__ and hasattr(pipe.scheduler, "scale_model_input"):
        sample = sample / (pipe.scheduler.sigmas[0] ** 2 + 1) ** 0.5
    if name.startswith("LTX"):
        sample, output = (pipe._unpack_latents(tokens, *tiny.sample_size) for tokens in (sample, output))
    if name.startswith(("Mochi", "OmniGen")):  # their schedulers count from noise to image, OmniGen's up to 1
        timestep, output = 1000 - timestep * (1000 if name.startswith("OmniGen") else 1), -output
    if name.startswith("BriaFibo"):
        sample, output = (tokens.transpose(1, 2).unflatten(2, (8, 8)) for tokens in (sample, output))
    if name.startswith("QwenImage21"):
        sample, output = (tokens.transpose(1, 2).unflatten(2, (4, 4)) for tokens in (sample, output))
    if name == "Ideogram4Transformer2DModel":  # channels last
        cells = (tokens.view(1, 4, 4, 2, 2, 4) for tokens in (sample, output))
        sample, output = (each.permute(0, 5, 1, 3, 2, 4).reshape(1, 4, 8, 8) for each in cells)
    elif sample.ndim == 3:
        sample, output = (unpack(tokens, 8, 8) for tokens in (sample, output))
    elif name == "ErnieImageTransformer2DModel":
        sample, output = (pipe._unpatchify_latents(cells) for cells in (sample, output))
    if name.startswith("Cosmos"):  # EDM's: the sample is x_start + σ noise, the output (sample − denoised) / σ
        sigma = pipe.scheduler.sigmas[0]
        sample, output, timestep = sample / (sigma + 1), output * (sigma + 1) - sample, 1000 * sigma / (sigma + 1)
    if name.startswith("CogVideoX"):  # frames before channels
        sample, output = sample.transpose(1, 2), output.transpose(1, 2)
    if name.startswith("Kandinsky5"):  # channels last
        sample, output = (each.permute(0, 4, 1, 2, 3) for each in (sample, output))
    ours = predict(model, sample.float(), timestep.float().expand(len(sample)), condition)
    if ours.shape[1] == 2 * output.shape[1]:
        ours = ours.chunk(2, dim=1)[0]
    torch.testing.assert_close(ours, output.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", [f"{kind}Transformer2DModel" for kind in ("ZImage", "Krea2", "ErnieImage", "Ideogram4", "OmniGen")]
)
def test_captions_of_different_lengths_are_told_side_by_side_as_alone(name):
    pipe = PIPELINES[name].build()
    encode = family_of(type(pipe.transformer)).encode_captions
    captions = ["a cat", "an old painting of three small dogs"]
    sample, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([300.0, 800.0])
    condition = encode(pipe, captions)
    assert len(set(condition["encoder_attention_mask"].sum(dim=1).tolist())) == 2
    together = predict(pipe.transformer, sample, timesteps, condition)
    for row, caption in enumerate(captions):
        rows = slice(row, row + 1)
        alone = predict(pipe.transformer, sample[rows], timesteps[rows], encode(pipe, [caption]))
        torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (64, 128)])
def test_cogview4_is_told_the_timestep_before_its_schedules_shift(size):
    """As the pipeline's steps have them: timesteps as they are, and levels that are shifted by the image's tokens."""
    pipe = PIPELINES["CogView4Transformer2DModel"].build()
    shift = pipeline_cogview4.calculate_shift(size[0] * size[1] // 4)
    timesteps = np.linspace(1000, 1, 7).astype(np.int64).astype(np.float32)
    pipe.scheduler.set_timesteps(timesteps=timesteps, sigmas=timesteps / 1000, mu=shift)
    levels = 1000 * pipe.scheduler.sigmas[:-1]
    assert size == (8, 8) or levels[3] > timesteps[3] + 100
    told = before_shift(levels, schedule_shift(pipe.transformer, torch.zeros(1, 4, *size)))
    torch.testing.assert_close(told, torch.from_numpy(timesteps), rtol=1e-3, atol=1e-2)
    seen = {}
    pipe.transformer.register_forward_pre_hook(lambda m, a, kwargs: seen.update(kwargs), with_kwargs=True)
    condition = family_of(type(pipe.transformer)).encode_captions(pipe, ["a cat"])
    predict(pipe.transformer, torch.zeros(1, 4, 8, 8), torch.tensor([500.0]), condition)
    expected = before_shift(torch.tensor([500.0]), schedule_shift(pipe.transformer, torch.zeros(1, 4, 8, 8)))
    assert torch.equal(seen["timestep"], expected)
    assert expected != 500.0


def test_kandinsky_is_called_as_its_own_pipeline_calls_it():
    tiny = PIPELINES["UNet2DConditionModel of Kandinsky 2.2"]
    pipe = tiny.build()
    seen = []
    pipe.unet.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output)), with_kwargs=True
    )
    tiny.call(pipe)
    kwargs, output = seen[0]
    assert not takes_text(pipe.unet)
    embeds = kwargs["added_cond_kwargs"]["image_embeds"]
    assert embeds.shape == (2, 12)
    ours = predict(pipe.unet, kwargs["sample"], kwargs["timestep"].float().expand(2), {"image_embeds": embeds})
    assert torch.equal(ours, output[0])


def test_kandinsky_without_an_image_is_refused():
    model = FAMILIES["UNet2DConditionModel of Kandinsky 2.2"].model()
    arguments = torch.zeros(1, 4, 8, 8), torch.ones(1)
    with pytest.raises(UserError, match="takes image_embeds, which a prior makes"):
        predict(model, *arguments, {"encoder_hidden_states": torch.zeros(1, 5, 16)})
    with pytest.raises(UserError, match="takes none"):
        Patch.create(model, PatchConfig(condition="t+text"))


def test_classes_of_adm_reach_it_and_its_variances_are_learned():
    model = FAMILIES["UNet2DModel of ADM"].model()
    sample, timesteps, labels = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 10.0]), torch.tensor([3, 4])
    expected = model(sample, timesteps, class_labels=labels, return_dict=False)[0]
    assert expected.shape == (2, 8, 8, 8)
    assert torch.equal(predict(model, sample, timesteps, labels), expected)
    assert (num_classes(model), null_label(model), learns_sigma(model)) == (10, None, True)


def test_a_u_net_that_is_told_noise_levels_is_not_told_timesteps():
    model = FAMILIES["UNet2DModel of Fourier features"].model()
    with pytest.raises(UserError, match=r"time_embedding_type='fourier'.*it is told a noise level"):
        predict(model, torch.zeros(1, 4, 8, 8), torch.ones(1), torch.zeros(1).long())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SD3Transformer2DModel", TimestepsConfig([0.2, 1.0], "logit_normal")),
        ("Ideogram4Transformer2DModel", TimestepsConfig([0.2, 1.0], "logit_normal", logit_std=1.5)),
        ("FluxTransformer2DModel", TimestepsConfig([0.2, 1.0], "uniform")),
    ],
)
def test_published_density_is_the_one_of_diffusers_script(name, expected):
    model = FAMILIES[name].build()
    assert with_density(TimestepsConfig([0.2, 1.0], "published"), model) == expected
    given = TimestepsConfig(density="mode")
    assert with_density(given, model) is given


def test_ideograms_density_is_its_pipelines_schedule():
    """The quantiles of what is drawn are the noise levels that the pipeline steps through, at 1024×1024."""
    mean = pipeline_ideogram4._resolution_aware_mu(1024, 1024, base_mu=0.0)
    levels = pipeline_ideogram4._logit_normal_sigmas(1000, mean, std=1.5)[1:].flip(0)
    model = FAMILIES["Ideogram4Transformer2DModel"].build()
    config = replace(with_density(TimestepsConfig(density="published"), model), shift=2.0)
    drawn = make_timesteps(config, torch.arange(1000) / 1000).draw(200_000, torch.Generator().manual_seed(0)) / 1000
    middle = torch.quantile(drawn, torch.arange(1, 1000) / 1000)
    torch.testing.assert_close(middle, levels, rtol=0, atol=1e-2)

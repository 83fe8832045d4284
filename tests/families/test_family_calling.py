import inspect

import diffusers
import pytest
import torch

from stagepatch.core.errors import UserError
from stagepatch.families import learns_sigma, null_label, num_classes, predict, sample_shape
from stagepatch.families.packing import pack, unpack
from stagepatch.families.registry import family_of
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
        ("WanTransformer3DModel", (4, 60, 104)),
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
    assert learned == {"DiT", "PixArtTransformer2DModel"}


def test_packing_is_the_pipelines():
    latents = torch.randn(2, 4, 6, 8)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, 6, 8), latents)


# Told to the pipeline where its default is not what training does.
CALLS = {
    "UNet2DConditionModel of SDXL": {"original_size": (64, 64), "target_size": (64, 64)},
    "FluxTransformer2DModel": {"guidance_scale": 1.0},
    "QwenImageTransformer2DModel": {"true_cfg_scale": 1.0},
    "SanaTransformer2DModel": {"use_resolution_binning": False},
    "PixArtTransformer2DModel": {"use_resolution_binning": False},
    "HunyuanVideoTransformer3DModel": {"guidance_scale": 1.0},
    "HunyuanImageTransformer2DModel": {"distilled_guidance_scale": 1.0},
}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, tiny in PIPELINES.items()
        if tiny.is_trained and name not in ("DiTTransformer2DModel", "UNet2DModel")
    ],
)
def test_model_is_called_as_its_own_pipeline_calls_it(name, monkeypatch):
    """What the pipeline's scheduler is given, from the sample and the timestep that it was given with."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    seen, step = [], type(pipe.scheduler).step

    def noted(self, output, timestep, sample, *args, **kwargs):
        seen.append((output, timestep, sample))
        return step(self, output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", noted)
    defaults = inspect.signature(type(pipe).__call__).parameters
    length = {key: defaults[key].default for key in ("max_sequence_length",) if key in tiny.arguments}
    unguided = {"guidance_scale": 1.0} if "guidance_scale" in defaults else {}
    tiny.call(pipe, **{**unguided, **length, **CALLS.get(name, {})})
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    condition = family_of(type(model)).encode_captions(pipe, [tiny.arguments["prompt"]])
    assert len(seen) >= 2
    output, timestep, sample = seen[0]
    if "Euler" in type(pipe.scheduler).__name__ and hasattr(pipe.scheduler, "scale_model_input"):
        sample = sample / (pipe.scheduler.sigmas[0] ** 2 + 1) ** 0.5
    if name.startswith("LTX"):
        sample, output = (pipe._unpack_latents(tokens, *tiny.sample_size) for tokens in (sample, output))
    if name.startswith("Mochi"):  # its scheduler counts from noise to image, and its model the other way
        timestep, output = 1000 - timestep, -output
    if sample.ndim == 3:
        sample, output = (unpack(tokens, 8, 8) for tokens in (sample, output))
    if name.startswith("CogVideoX"):  # frames before channels
        sample, output = sample.transpose(1, 2), output.transpose(1, 2)
    ours = predict(model, sample.float(), timestep.float().expand(len(sample)), condition)
    if ours.shape[1] == 2 * output.shape[1]:
        ours = ours.chunk(2, dim=1)[0]
    torch.testing.assert_close(ours, output.float(), rtol=1e-4, atol=1e-5)

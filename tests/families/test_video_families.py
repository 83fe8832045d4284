"""What differs among families of videos, beside what test_family_families holds for all."""

import diffusers
import pytest
import torch
from torch.nn import functional as F

from stagepatch.core.errors import UserError
from stagepatch.data.latents import decode_latents, encode_images
from stagepatch.diffusion import make_sampler
from stagepatch.families import describe, predict
from stagepatch.families.registry import family_of
from stagepatch.patch import Patch, PatchConfig
from tests.families.test_family_families import drawn
from tests.tiny import FAMILIES, FRAMES, TEXT, TEXT_CHANNELS
from tests.tiny_pipelines import PIPELINES


def patched(name, **changes):
    """A family, a model of it, and a patch on it whose every weight is drawn."""
    family = FAMILIES[name]
    model = family.model(**changes)
    patch = drawn(Patch.create(model, PatchConfig(sample_size=[FRAMES, 8, 8], condition="t")))
    patch.attach(model)
    return family, model, patch.train()


# Timesteps of two samples as each model takes those of their frames, or of their tokens: the first frame's are zero.
def by_frame(timesteps):
    frames = timesteps[:, None].repeat(1, FRAMES)
    frames[:, 0] = 0.0
    return frames


SEVERAL = {
    "LTXVideoTransformer3DModel": lambda timesteps: by_frame(timesteps).repeat_interleave(64, dim=1),
    "LTX2VideoTransformer3DModel": lambda timesteps: by_frame(timesteps).repeat_interleave(64, dim=1),
    "CosmosTransformer3DModel": lambda timesteps: by_frame(timesteps).view(2, 1, FRAMES, 1, 1),
    "SkyReelsV2Transformer3DModel": by_frame,
}


@pytest.mark.parametrize("name", list(SEVERAL))
def test_a_gate_hears_a_samples_last_timestep_of_those_of_its_frames_or_tokens(name):
    family, model, patch = patched(name)
    timesteps = torch.tensor([300.0, 700.0])
    family.call(model, timestep=timesteps)
    expected = patch.last.logits
    more = {
        "SkyReelsV2Transformer3DModel": {"enable_diffusion_forcing": True},
        "LTX2VideoTransformer3DModel": {"audio_timestep": timesteps},
    }
    forcing = more.get(name, {})
    several = SEVERAL[name](timesteps)
    output = family.call(model, timestep=several, **forcing)
    torch.testing.assert_close(patch.last.logits, expected, rtol=1e-4, atol=1e-4)
    patch.enabled = False
    assert not torch.allclose(family.call(model, timestep=several, **forcing), output, atol=1e-3)


def test_a_first_frame_in_place_of_tokens_does_not_change_what_a_gate_hears():
    """HunyuanVideo's image-to-video embeds zero between its timestep and the others of t+c."""
    family = FAMILIES["HunyuanVideoTransformer3DModel"]
    logits = []
    for kind in (None, "token_replace"):
        model = family.model(image_condition_type=kind)
        patch = drawn(Patch.create(model, PatchConfig(sample_size=[FRAMES, 8, 8], condition="t+c"))).train()
        assert len(patch.backbone.condition_taps) == 2
        with patch.attach(model):
            family.call(model)
        logits.append(patch.last.logits)
    torch.testing.assert_close(*logits)


def test_cogvideox_of_several_frames_a_token():
    """As CogVideoX 1.5: its tokens span 2 frames of latents, so that a picture alone cannot train it."""
    changes = {"patch_size_t": 2, "use_rotary_positional_embeddings": True}
    family = FAMILIES["CogVideoXTransformer3DModel"]
    model = family.model(**changes)
    sites = describe(model).sites
    assert sites[0].grid == (2, 4, 4)  # 3 frames fill up to 4
    text = {"encoder_hidden_states": torch.randn(2, TEXT, TEXT_CHANNELS)}
    with pytest.raises(UserError, match="2 frames of latents as one token, so 1 cannot"):
        predict(model, torch.randn(2, 4, 8, 8), torch.tensor([300.0, 700.0]), text)
    video, timesteps = torch.randn(2, 4, 4, 8, 8), torch.tensor([300.0, 700.0])
    base = predict(model, video, timesteps, text)
    patch = Patch.create(model)
    with patch.attach(model):
        assert torch.equal(predict(model, video, timesteps, text), base)
        assert patch.extent.grid == (2, 4, 4)


def test_hunyuanvideo15_without_a_picture_is_told_none_as_its_pipeline_does():
    """The pipeline's 729 tokens of no picture are masked, so that one stands for them."""
    family = FAMILIES["HunyuanVideo15Transformer3DModel"]
    model = family.model()
    inputs = family.inputs(model, 2, 8, 8)
    sample, timesteps = torch.randn(2, 4, FRAMES, 8, 8), inputs["timestep"]
    zeros = torch.zeros_like(sample)
    names = ("encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2")
    condition = {name: inputs[name] for name in names}
    whole = torch.cat([sample, zeros, zeros[:, :1]], dim=1)
    expected = model(whole, timestep=timesteps, image_embeds=torch.zeros(2, 729, 12), **condition).sample
    torch.testing.assert_close(predict(model, sample, timesteps, condition), expected, rtol=1e-4, atol=1e-5)


def test_hunyuanimage_of_mean_flow_is_asked_for_the_velocity():
    family = FAMILIES["HunyuanImageTransformer2DModel"]
    model = family.model(use_meanflow=True)
    inputs = family.inputs(model, 2, 8, 8)
    sample, timesteps = inputs.pop("hidden_states"), inputs.pop("timestep")
    inputs["guidance"] = torch.full((2,), 1000.0)
    expected = model(sample, timesteps, timestep_r=timesteps, **inputs).sample
    other = model(sample, timesteps, timestep_r=timesteps / 2, **inputs).sample
    inputs.pop("guidance")
    output = predict(model, sample, timesteps, inputs)
    assert torch.equal(output, expected)
    assert not torch.allclose(output, other, atol=1e-3)


def test_ltx_that_is_told_positions_alone_is_refused():
    family, model, _ = patched("LTXVideoTransformer3DModel")
    positions = torch.zeros(2, 3, FRAMES * 64)
    with pytest.raises(UserError, match="not told frames, height and width"):
        family.call(model, num_frames=None, height=None, width=None, video_coords=positions)


def test_kandinsky5_with_tokens_in_another_order_is_refused():
    family, model, _ = patched("Kandinsky5Transformer3DModel")
    with pytest.raises(UserError, match="blocks of 8×8"):
        family.call(model, sparse_params={"to_fractal": True})


@pytest.mark.parametrize("is_later", [False, True], ids=["2.0", "2.3"])
def test_ltx2_is_trained_as_if_there_were_no_sound(is_later):
    """As its pipeline's forward without attention between video and sound, whatever sound there is."""
    family = FAMILIES["LTX2VideoTransformer3DModel"]
    later = {"use_prompt_embeddings": False, "cross_attn_mod": True, "audio_cross_attn_mod": True}
    model = family.model(**(later if is_later else {}))
    inputs = family.inputs(model, 2, 8, 8)
    condition = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    if is_later:  # text comes as wide as the streams
        condition["encoder_hidden_states"] = torch.randn(2, TEXT, 32)
        inputs |= condition | {"audio_encoder_hidden_states": torch.randn(2, TEXT, 16)}
    condition["encoder_attention_mask"] = torch.tensor([[1] * TEXT, [1] * 2 + [0] * (TEXT - 2)])
    inputs |= condition | {"sigma": inputs["timestep"], "isolate_modalities": True}
    expected = model(**inputs, return_dict=False)[0].transpose(1, 2).unflatten(2, (FRAMES, 8, 8))
    sample = inputs["hidden_states"].transpose(1, 2).unflatten(2, (FRAMES, 8, 8))
    torch.testing.assert_close(predict(model, sample, inputs["timestep"], condition), expected)
    patch = Patch.create(model, PatchConfig(sample_size=[FRAMES, 8, 8], condition="t+text"))
    assert patch.backbone.condition_channels == 32 + condition["encoder_hidden_states"].shape[-1]


def test_kandinsky5_is_told_captions_one_by_one_without_padding_and_sizes_as_its_pipeline_scales_them():
    pipe = PIPELINES["Kandinsky5Transformer3DModel"].build()
    encode, model = family_of(type(pipe.transformer)).encode_captions, pipe.transformer
    captions = ["a cat", "an old painting of three small dogs"]
    condition, alone = encode(pipe, captions), encode(pipe, captions[:1])
    length = alone["encoder_hidden_states"].shape[1]
    assert torch.equal(condition["encoder_hidden_states"][:1, :length], alone["encoder_hidden_states"])
    sample, timesteps = torch.randn(2, 4, FRAMES, 60, 64), torch.tensor([300.0, 700.0])
    with pytest.raises(UserError, match=r"no mask for text, and captions of \d+ and \d+ tokens"):
        predict(model, sample, timesteps, condition)
    first = {name: value[:1] for name, value in condition.items()}
    told = []
    model.register_forward_pre_hook(lambda module, args, given: told.append(given), with_kwargs=True)
    outputs = [predict(model, sample[:1], timesteps[:1], each) for each in (first, alone)]
    torch.testing.assert_close(*outputs)
    predict(model, sample[:1, :, :, :32], timesteps[:1], alone)
    predict(model, sample[:1, :, 0], timesteps[:1], alone | {"of_pictures": torch.ones(1, 1, dtype=torch.bool)})
    assert [given["scale_factor"] for given in told[1:]] == [
        pipe._get_scale_factor(8 * 60, 8 * 64),
        pipe._get_scale_factor(8 * 32, 8 * 64),
        (1.0, 1.0, 1.0),  # of Kandinsky5T2IPipeline
    ]
    with_first = FAMILIES["Kandinsky5Transformer3DModel"].model(visual_cond=True, in_text_dim2=12)
    zeros = torch.zeros(1, FRAMES, 8, 8, 5)
    given = {**told[0], "visual_rope_pos": [torch.arange(length) for length in (FRAMES, 4, 4)]}
    given |= {"scale_factor": (1.0, 3.16, 3.16)}
    video = sample[:1, :, :, :8, :8]
    expected = with_first(torch.cat([video.permute(0, 2, 3, 4, 1), zeros], dim=-1), **given)
    assert torch.equal(predict(with_first, video, timesteps[:1], alone), expected.permute(0, 4, 1, 2, 3))


def test_latents_of_ltx_are_normalised_as_its_pipelines_do():
    """Its VAE's means are among its weights, not in its config."""
    pipe = PIPELINES["LTXVideoTransformer3DModel"].build()
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = encode_images(pipe.vae, images)
    posterior = pipe.vae.encode(images.unsqueeze(2)).latent_dist
    statistics = pipe.vae.latents_mean, pipe.vae.latents_std, pipe.vae.config.scaling_factor
    normalise = diffusers.LTXImageToVideoPipeline._normalize_latents
    torch.testing.assert_close(mean, normalise(posterior.mean, *statistics).squeeze(2))
    torch.testing.assert_close(std, posterior.std.squeeze(2) / pipe.vae.latents_std.view(1, -1, 1, 1))
    expected = pipe.vae.decode(posterior.mean, return_dict=False)[0].squeeze(2).clamp(-1, 1)
    torch.testing.assert_close(decode_latents(pipe.vae, mean), expected, rtol=1e-4, atol=1e-5)


def test_skyreels_that_is_told_frames_a_second_hears_24():
    family = FAMILIES["SkyReelsV2Transformer3DModel"]
    model = family.model(inject_sample_info=True)
    inputs = family.inputs(model, 2, 8, 8)
    sample, timesteps = inputs.pop("hidden_states"), inputs.pop("timestep")
    output = predict(model, sample, timesteps, inputs)
    assert torch.equal(output, model(sample, timesteps, fps=[1, 1], **inputs).sample)
    assert not torch.allclose(output, model(sample, timesteps, fps=[0, 0], **inputs).sample, atol=1e-4)


def test_mochi_is_asked_the_other_way_round():
    """Its time runs from noise (0) to image (1000), and it predicts x_start − noise."""
    family = FAMILIES["MochiTransformer3DModel"]
    model = family.model()
    inputs = family.inputs(model, 2, 8, 8)
    sample = inputs.pop("hidden_states")
    inputs.pop("timestep")
    output = predict(model, sample, torch.tensor([900.0, 300.0]), inputs)
    assert torch.equal(output, -model(sample, timestep=torch.tensor([100.0, 700.0]), **inputs).sample)


def test_mochi_is_sampled_as_its_own_scheduler_does():
    """Whose sigmas run the other way round; ours are noise levels, as everywhere."""
    family = FAMILIES["MochiTransformer3DModel"]
    model = family.model()
    text = family.inputs(model, 2, 8, 8)
    noise = text.pop("hidden_states")
    text.pop("timestep")
    own = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    sampler = make_sampler("FlowMatchEulerDiscreteScheduler", own)
    expected = output = noise
    own.set_timesteps(4)
    for timestep in own.timesteps:
        velocity = model(expected, timestep=timestep.expand(2), **text).sample
        expected = own.step(velocity, timestep, expected).prev_sample
    sampler.set_timesteps(4)
    for timestep in sampler.timesteps:
        output = sampler.step(predict(model, output, timestep.expand(2), text), timestep, output).prev_sample
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(output, noise, atol=0.1)


def test_conditions_of_text_are_as_wide_as_the_text():
    for name in ("CogVideoX", "HunyuanVideo", "HunyuanVideo15", "LTXVideo", "Mochi", "SkyReelsV2", "SanaVideo"):
        model = FAMILIES[f"{name}Transformer3DModel"].model()
        patch = Patch.create(model, PatchConfig(sample_size=[FRAMES, 8, 8], condition="t+text"))
        assert patch.backbone.condition_channels == describe(model).condition_channels + TEXT_CHANNELS
        patch.attach(model)
        FAMILIES[f"{name}Transformer3DModel"].call(model)
        assert F.softmax(patch.last.logits, dim=-1).isfinite().all()

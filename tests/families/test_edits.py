"""Models that edit: what training gives them is what diffusers' own pipelines give them, and what their pairs are."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.core.errors import UserError
from stagepatch.data import encode_images, to_tensor
from stagepatch.families import predict
from stagepatch.families.registry import family_of
from stagepatch.patch import Patch, PatchConfig
from tests.tiny_pipelines import PIPELINES, PROMPT


def picture(seed, size=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8))


def flux2(kind="Flux2Transformer2DModel"):
    return PIPELINES[kind], PIPELINES[kind].build(), [picture(0), picture(1)], {}


def klein():
    return flux2("Flux2Transformer2DModel of klein")


def kontext():
    tiny = PIPELINES["FluxTransformer2DModel"]
    pipe = diffusers.FluxKontextPipeline(**tiny.build().components)
    return tiny, pipe, [picture(0, 32)], {"max_area": 32 * 32, "_auto_resize": False}


def qwen_plus():
    tiny = PIPELINES["QwenImageTransformer2DModel of edits"]
    return tiny, tiny.build(), [picture(0, 32), picture(1, 32)], {}


def qwen(monkeypatch):
    """The first Qwen-Image-Edit; its pixels of a picture are 1024×1024, whatever is asked."""
    tiny = PIPELINES["QwenImageTransformer2DModel of edits"]
    module = diffusers.pipelines.qwenimage.pipeline_qwenimage_edit
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (32, 32, None))
    return tiny, diffusers.QwenImageEditPipeline(**tiny.build().components), [picture(0, 32)], {}


@pytest.mark.parametrize("make", [flux2, klein, kontext, qwen, qwen_plus])
def test_pictures_to_edit_are_told_as_the_pipeline_tells_them(make, monkeypatch):
    """The very inputs of the transformer, of the same latents, and its output for what is made."""
    tiny, pipe, pictures, more = make(monkeypatch) if make is qwen else make()
    calls, steps, step = [], [], type(pipe.scheduler).step

    def note(model, args, given, output):
        calls.append((given | dict(zip(["hidden_states"], args, strict=False)), output))

    pipe.transformer.register_forward_hook(note, with_kwargs=True)
    monkeypatch.setattr(type(pipe.scheduler), "step", lambda *args, **more: steps.append(args) or step(*args, **more))
    height, width = pictures[0].height, pictures[0].width
    given = pictures if len(pictures) > 1 or make is qwen_plus else pictures[0]
    guidance = {} if "Qwen" in type(pipe).__name__ else {"guidance_scale": 1.0}
    length = {"max_sequence_length": 512} if "max_sequence_length" in tiny.arguments and guidance else {}
    tiny.call(pipe, image=given, height=height, width=width, **guidance, **length, **more)

    family = family_of(type(pipe.transformer))
    pixels = torch.stack([to_tensor(each) for each in pictures])
    if "Qwen" in type(pipe).__name__:
        condition = family.encode_edits(pipe, [PROMPT], [pixels])
    else:
        condition = family.encode_captions(pipe, [PROMPT])
    condition["reference_latents"] = encode_images(pipe.vae, pixels)[0][None]
    _, _, timestep, sample = steps[0]
    side = condition["reference_latents"].shape[-1]
    tokens = sample.view(1, side // 2, side // 2, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, side, side)
    if "Flux2" in type(pipe).__name__:
        cells = sample.transpose(1, 2).unflatten(2, (side // 2, side // 2))
        tokens = pipe._unpatchify_latents(cells)
    ours = predict(pipe.transformer, tokens, timestep.expand(1), condition)
    (expected, output), (told, made) = calls[0], calls[-1]
    assert len(told["hidden_states"][0]) == (1 + len(pictures)) * (side // 2) ** 2
    for name in ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections"):
        if name in expected:
            torch.testing.assert_close(told[name], expected[name], rtol=1e-5, atol=1e-5)
    if "img_ids" in expected:
        for name in ("img_ids", "txt_ids"):
            torch.testing.assert_close(told[name].expand_as(expected[name]), expected[name], check_dtype=False)
    else:
        assert told["img_shapes"] == expected["img_shapes"]
    torch.testing.assert_close(made[0], output[0], rtol=1e-4, atol=1e-5)
    assert ours.shape == tokens.shape
    alone = {name: value for name, value in condition.items() if name != "reference_latents"}
    assert not torch.allclose(predict(pipe.transformer, tokens, timestep.expand(1), alone), ours, atol=1e-4)


def test_a_video_controls_vace_as_its_pipeline_has_it():
    tiny = PIPELINES["WanVACETransformer3DModel"]
    pipe = tiny.build()
    video = [picture(seed, 32) for seed in range(5)]
    calls, steps, step = [], [], pipe.scheduler.step
    pipe.transformer.register_forward_hook(lambda *call: calls.append((call[2], call[3])), with_kwargs=True)
    pipe.scheduler.step = lambda *args, **more: steps.append(args) or step(*args, **more)
    tiny.call(pipe, video=video, guidance_scale=1.0, max_sequence_length=512)
    pixels = torch.stack([to_tensor(each) for each in video], dim=1)[None]
    given = torch.stack([encode_images(pipe.vae, each)[0] for each in (torch.zeros_like(pixels), pixels)], dim=1)
    condition = family_of(type(pipe.transformer)).encode_captions(pipe, [PROMPT])
    _, timestep, sample = steps[0]
    ours = predict(pipe.transformer, sample, timestep.expand(1), {**condition, "reference_latents": given})
    (expected, output), (told, _) = calls[0], calls[-1]
    torch.testing.assert_close(told["control_hidden_states"], expected["control_hidden_states"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, output[0], rtol=1e-4, atol=1e-5)
    blank = {**condition, "reference_latents": given[:, :1]}
    assert not torch.allclose(predict(pipe.transformer, sample, timestep.expand(1), blank), ours, atol=1e-4)


def test_captions_are_read_with_the_pictures_to_edit():
    _, pipe, pictures, _ = qwen_plus()
    encode = family_of(type(pipe.transformer)).encode_edits
    first, second = (to_tensor(each)[None] for each in pictures)
    condition = encode(pipe, ["a cat", "an old house on a red tree"], [first, second])
    for row, (caption, given) in enumerate((("a cat", first), ("an old house on a red tree", second))):
        alone = encode(pipe, [caption], [given])["encoder_hidden_states"][0]
        mask = condition["encoder_hidden_states_mask"][row]
        assert torch.equal(condition["encoder_hidden_states"][row][mask], alone)
    other = encode(pipe, ["a cat"], [second])["encoder_hidden_states"]
    assert not torch.allclose(condition["encoder_hidden_states"][:1, : other.shape[1]], other, atol=1e-2)
    plain = PIPELINES["QwenImageTransformer2DModel"].build()
    with pytest.raises(UserError, match=r"QwenImagePipeline does not edit 1 picture\(s\)"):
        encode(plain, ["a cat"], [first])


def test_kontext_edits_one_picture_and_a_patch_leaves_it_alone():
    tiny, pipe, _, _ = kontext()
    condition = family_of(type(pipe.transformer)).encode_captions(pipe, [PROMPT])
    sample = torch.randn(1, 4, 8, 8)
    with pytest.raises(UserError, match="edits one picture, not 2"):
        predict(
            pipe.transformer, sample, torch.ones(1), {**condition, "reference_latents": torch.randn(1, 2, 4, 8, 8)}
        )
    patch = Patch.create(pipe.transformer, PatchConfig(sample_size=tiny.sample_size))
    with patch.attach(pipe.transformer):
        predict(pipe.transformer, sample, torch.ones(1), {**condition, "reference_latents": sample[None]})
        assert patch.extent.grid == (4, 4)

"""GLM-Image: what training tells it is what its own pipeline tells it, but for tokens, which are the picture's own."""

import inspect

import pytest
import torch

from stagepatch.checkpoints import load_captioner, load_vae
from stagepatch.core import UserError
from stagepatch.data import CachedLatents, DataConfig, Images, decode_latents, open_source
from stagepatch.data.model_cache import make_cache
from stagepatch.families import predict
from stagepatch.families.glmimage import encode_captions, picture_tokens
from stagepatch.sampling import SamplingConfig
from stagepatch.sampling.pipeline import generate_with_pipeline
from tests.tiny_pipelines import PIPELINES

TINY = PIPELINES["GlmImageTransformer2DModel"]
CAPTIONS = ["a sign that says “old dog” and 'eight'", "a red house", "a small cat", ""]


@pytest.fixture(scope="module")
def pipe():
    pipe = TINY.build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pipe):
    directory = tmp_path_factory.mktemp("glm")
    pipe.save_pretrained(directory)
    return directory


def picture(height, width, seed=0):
    pixels = torch.randint(0, 256, (1, 3, height // 16, width // 16), generator=torch.Generator().manual_seed(seed))
    return pixels.repeat_interleave(16, dim=2).repeat_interleave(16, dim=3) / 127.5 - 1


def test_tokens_of_a_picture_are_those_that_the_language_model_reads(pipe):
    """In its own forward, of a message with the picture; within the bounds that it leaves pictures in."""
    given = picture(512, 768)
    (shown,) = pipe.image_processor.postprocess(given)
    content = [{"type": "image", "image": shown}, {"type": "text", "text": "a cat"}]
    options = {"target_h": 64, "target_w": 64, "return_dict": True, "return_tensors": "pt"}
    inputs = pipe.processor.apply_chat_template([[{"role": "user", "content": content}]], tokenize=True, **options)
    read = []
    hook = pipe.vision_language_encoder.model.vqmodel.quantize.register_forward_hook(
        lambda module, args, output: read.append(output[2].view(16, 24))
    )
    with torch.no_grad():
        pipe.vision_language_encoder(**inputs)
    tokens = picture_tokens(pipe, given).view(32, 48)
    hook.remove()
    assert torch.equal(tokens, read[0].repeat_interleave(2, dim=0).repeat_interleave(2, dim=1))
    assert len(tokens.unique()) > 4
    assert not torch.equal(tokens, picture_tokens(pipe, picture(512, 768, seed=1)).view(32, 48))
    assert picture_tokens(pipe, picture(64, 96)).shape == (4 * 6,)


@pytest.mark.parametrize("shift", ["exponential", "linear"])
def test_it_is_told_what_its_own_pipeline_tells_it(pipe, shift):
    """All but the tokens, in every step of a guided call, at a size that is not square."""
    pipe.scheduler.register_to_config(time_shift_type=shift)
    told = []
    names = list(inspect.signature(pipe.transformer.forward).parameters)
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: told.append({**dict(zip(names, args, strict=False)), **given}), with_kwargs=True
    )
    TINY.call(pipe, height=64, width=96, steps=3, prompt=CAPTIONS[0], guidance_scale=2.0)
    of_pipeline, levels = list(told), 1000 * pipe.scheduler.sigmas
    told.clear()
    given = picture(64, 96)
    for step in range(3):
        for caption, expected in zip((CAPTIONS[0], ""), of_pipeline[2 * step :], strict=False):
            with torch.no_grad():
                condition = encode_captions(pipe, [caption], [given])
                tokens = condition["prior_token_id"]
                predict(pipe.transformer, expected["hidden_states"], levels[step : step + 1], condition)
            ours = told.pop()
            assert torch.equal(ours["prior_token_id"], tokens)
            assert tokens.shape == expected["prior_token_id"].shape
            for name in ("encoder_hidden_states", "target_size", "crop_coords", "prior_token_drop", "hidden_states"):
                torch.testing.assert_close(ours[name], expected[name], msg=name)
            torch.testing.assert_close(ours["timestep"], expected["timestep"], rtol=1e-3, atol=0.01)
            others = {"kv_caches", "attention_kwargs", "return_dict"}
            assert set(ours) - others == set(expected) - others
    hook.remove()
    pipe.scheduler.register_to_config(time_shift_type="exponential")
    assert len({float(each["timestep"]) for each in of_pipeline}) == 3
    assert abs(float(of_pipeline[2]["timestep"] - levels[1])) > 20  # the schedule's shift


def test_captions_side_by_side_are_filled_up_as_the_pipeline_does(pipe):
    """With zeros in front there; text has no positions."""
    told = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args, given: told.append(given), with_kwargs=True)
    sample, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([300.0, 900.0])
    with torch.no_grad():
        condition = encode_captions(pipe, CAPTIONS[:2], [picture(64, 64), picture(64, 96)])
        left, _ = pipe.encode_prompt(CAPTIONS[:2], do_classifier_free_guidance=False)
        ours = predict(pipe.transformer, sample, timesteps, condition)
        hook.remove()
        expected = pipe.transformer(sample, **told[0] | {"encoder_hidden_states": left})[0]
    right = told[0]["encoder_hidden_states"]
    fill = right.shape[1] - int(condition["encoder_attention_mask"][1].sum())
    assert fill > 0
    assert torch.equal(right[0], left[0])
    assert torch.equal(right[1].roll(fill, 0), left[1])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_each_image_is_made_of_its_own_seed_whatever_the_batch(pipe):
    """The pipeline draws the tokens of a batch by the first image's generator."""
    prompts = [CAPTIONS[0], CAPTIONS[1]]
    two, one = (SamplingConfig(num_images=2, batch_size=size, num_inference_steps=1) for size in (2, 1))
    size = {"height": 64, "width": 64}
    assert torch.equal(*(generate_with_pipeline(pipe, config, prompts, call=size) for config in (two, one)))


def test_its_cache_has_tokens_of_each_picture_and_none_for_the_empty_caption(pipe, saved, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        size = (64, 96) if number % 2 else (64, 64)
        pipe.image_processor.postprocess(picture(*size, seed=number))[0].save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    config = DataConfig(source=str(folder), image_size=80, crop="buckets", bucket_step=32)
    make_cache(tmp_path / "cache", str(saved), config, 2, torch.float32)
    cached, images = CachedLatents(tmp_path / "cache"), Images(open_source(config), config)
    assert len({tuple(item["image"].shape) for item in cached}) == 2
    for index, caption in enumerate(CAPTIONS):
        item, pixels = cached[index], images[index]["image"][None]
        with torch.no_grad():
            expected = {"condition": encode_captions(pipe, [caption], [pixels])}
            expected["null_condition"] = encode_captions(pipe, [""], [pixels])
        for which, of_pipe in expected.items():
            for name, value in of_pipe.items():
                stored = item[which][name][: value.shape[1]]
                torch.testing.assert_close(stored.to(value.dtype), value[0], rtol=1e-3, atol=1e-3)
            assert bool(item[which]["is_dropped"]) == (not caption or which == "null_condition")
        mean, std = (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, 4, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():  # as the pipeline decodes, which does not ask for the scaling factor
            decoded = pipe.vae.decode(item["image"][None].float() * std + mean).sample
            reconstructed = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
        torch.testing.assert_close(decoded, reconstructed, rtol=2e-2, atol=2e-2)
        ours = decode_latents(load_vae(saved), item["image"][None].float())
        torch.testing.assert_close(ours, decoded.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    config.horizontal_flip = True
    with pytest.raises(UserError, match=r"leave out data\.horizontal_flip"):
        make_cache(tmp_path / "mirrored", str(saved), config)


def test_what_has_no_picture_or_no_whole_tokens_is_refused(pipe, saved):
    with pytest.raises(UserError, match="together with what is read off the picture"):
        load_captioner(saved)
    for size in ((64, 48), (32, 160)):
        with pytest.raises(UserError, match=rf"multiples of 32 pixels and at most 4 : 1, not {size[0]}×{size[1]}"):
            picture_tokens(pipe, torch.zeros(1, 3, *size))

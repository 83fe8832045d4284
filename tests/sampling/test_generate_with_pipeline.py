"""`stagepatch sample` on whole pipelines."""

import shutil

import diffusers
import pytest
import torch
import transformers

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.core import read_json
from stagepatch.models import DiT
from stagepatch.patch import Patch
from stagepatch.sampling import SamplingConfig, generate, generate_with_pipeline, prompted_latents
from stagepatch.sampling.generation import image_generator
from tests.runs import draw_weights
from tests.sampling.test_generate import by_hand, sampled, sampler_of
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES, clip, clip_tokenizer
from tests.training.test_train_on_pipelines import draw_images

SD, DIT = PIPELINES["UNet2DConditionModel"], PIPELINES["DiTTransformer2DModel"]
PROMPTS = ["a red house", "a cat"]


def sample(pipe, prompts=PROMPTS, **changes):
    config = SamplingConfig(**{"num_images": 4, "num_inference_steps": 2, "batch_size": 4, **changes})
    return generate_with_pipeline(pipe, config, prompts)


def save_model_and_patch(directory):
    pipe = SD.build()
    pipe.save_pretrained(directory / "model")
    patch = Patch.create(pipe)
    draw_weights(patch.prompts, 20.0)
    patch.save_pretrained(directory / "patch")


def test_image_depends_on_its_seed_and_number_and_prompt_alone():
    pipe = SD.build()
    images = sample(pipe)
    assert images.shape == (4, 3, 32, 32)
    assert -1 <= images.min() <= images.max() <= 1
    torch.testing.assert_close(sample(pipe, batch_size=3), images, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sample(pipe, seed=1), images, atol=1e-3)
    assert not torch.allclose(images[0], images[2], atol=1e-3)
    other = sample(pipe, prompts=["a red house", "a blue tree"])
    torch.testing.assert_close(other[0], images[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[1], images[1], atol=1e-4)


def test_classes_take_turns():
    assert sample(DIT.build(), [], guidance_scale=4.0).shape == (4, 3, 32, 32)


def test_command_samples_base_and_patched_pipeline(tmp_path, capsys):
    save_model_and_patch(tmp_path)
    model, given = tmp_path / "model", ["--sampling.num_images=2", "--sampling.num_inference_steps=2"]
    assert main(["sample", f"--model={model}", *given, f"--output_dir={tmp_path / 'none'}"]) == 2
    assert "give --prompts" in capsys.readouterr().err
    given.append("--prompts=['a red house']")
    base = sampled(model, tmp_path / "base", *given)
    patched = sampled(model, tmp_path / "patched", *given, f"--patch={tmp_path / 'patch'}")
    assert base.shape == patched.shape == (2, 3, 32, 32)
    assert not torch.allclose(base, patched, atol=1e-3)
    assert (tmp_path / "base" / "grid.png").exists()


@pytest.mark.parametrize("kind", ["DeepFloyd IF", "Kandinsky 2.2"])
def test_pipelines_whose_tensors_are_not_images_are_sampled_as_their_arrays(kind, tmp_path):
    tiny = PIPELINES[f"UNet2DConditionModel of {kind}"]
    pipe = tiny.build()
    pipe.save_pretrained(tmp_path / "model")
    patch = Patch.create(pipe)
    draw_weights(patch.prompts, 20.0)
    patch.save_pretrained(tmp_path / "patch")
    own = dict(zip(("height", "width"), tiny.pixels, strict=True))
    own |= {key: value for key, value in tiny.arguments.items() if key == "prior_num_inference_steps"}
    given = ["--sampling.num_images=2", "--sampling.num_inference_steps=2", f"--prompts={PROMPTS}", f"--call={own}"]
    images = sampled(tmp_path / "model", tmp_path / "base", *given)
    call = {**own, "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np", "return_dict": False}
    expected = pipe(PROMPTS, generator=[image_generator(0, number) for number in range(2)], **call)[0]
    torch.testing.assert_close(images, torch.from_numpy(expected).movedim(-1, 1) * 2 - 1)
    patched = sampled(tmp_path / "model", tmp_path / "patched", *given, f"--patch={tmp_path / 'patch'}")
    assert not torch.allclose(patched, images, atol=1e-3)
    assert patched.abs().max() <= 1


def test_captions_of_a_model_in_pixels_are_told_it(tmp_path):
    tiny = PIPELINES["UNet2DConditionModel of DeepFloyd IF"]
    pipe = tiny.build()
    pipe.save_pretrained(tmp_path / "model")
    parts = prompted_latents(str(tmp_path / "model"), pipe.unet, PROMPTS)
    assert parts.shape == (3, 16, 16)
    images = generate(pipe.unet, pipe.scheduler, SamplingConfig(num_images=2, num_inference_steps=2), **vars(parts))
    expected = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(parts.captions.of([0, 1])["encoder_hidden_states"], expected)
    swapped = prompted_latents(str(tmp_path / "model"), pipe.unet, PROMPTS[::-1])
    others = generate(pipe.unet, pipe.scheduler, SamplingConfig(num_images=2, num_inference_steps=2), **vars(swapped))
    assert images.shape == (2, 3, 16, 16)
    assert not torch.allclose(others, images, atol=1e-4)


def test_model_of_latents_is_measured_by_its_images_against_the_training_images(tmp_path, pixels):
    """Captions of the training images in turn; images out of the model's own VAE."""
    save_model_and_patch(tmp_path)
    images = draw_images(tmp_path / "images", count=6, size=(32, 32))
    given = ["--data.image_size=32", "--sampling.num_images=6", "--sampling.num_inference_steps=5"]
    given += [f"--data.source={images}", f"--patch={tmp_path / 'patch'}", "--sampling.guidance_scale=3"]
    assert main(["evaluate", f"--model={tmp_path / 'model'}", *given, f"--output_dir={tmp_path / 'out'}"]) == 0
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert metrics["base"] != metrics["patched"]
    assert all(batch.shape == (6, 3, 32, 32) and batch.abs().max() <= 1 for batch in pixels)


def test_pipeline_that_is_not_whole_is_named(tmp_path, capsys):
    SD.build().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "scheduler").rename(tmp_path / "away")
    assert main(["sample", f"--model={tmp_path / 'model'}", "--prompts=['a cat']", f"--output_dir={tmp_path}"]) == 2
    assert "pipeline" in capsys.readouterr().err


@pytest.fixture
def text_dit(tmp_path):
    """The layout that configs/paper asks for: transformer/, scheduler/, vae/, and for text those two."""
    torch.manual_seed(0)
    model = DiT(**FAMILIES["DiT"].config, conditioning="text", pooled_projection_dim=16)
    draw_weights(model.parameters(), 0.2)
    directory, tokenizer = tmp_path / "parts", clip_tokenizer()
    model.save_pretrained(directory / "transformer")
    diffusers.DDPMScheduler(variance_type="learned_range").save_pretrained(directory / "scheduler")
    DIT.build().vae.save_pretrained(directory / "vae")
    tokenizer.save_pretrained(directory / "tokenizer")
    clip(tokenizer, hidden_size=16, projection=16).save_pretrained(directory / "text_encoder")
    return directory


def test_parts_beside_each_other_are_sampled_with_any_scheduler(text_dit, tmp_path, capsys):
    given = ["--sampling.num_images=3", "--sampling.num_inference_steps=2", "--sampling.scheduler=dpmsolver++"]
    assert main(["sample", f"--model={text_dit}", *given, f"--output_dir={tmp_path / 'none'}"]) == 2
    assert "give --prompts" in capsys.readouterr().err
    given += ["--sampling.guidance_scale=2"]
    images = sampled(text_dit, tmp_path / "out", *given, "--prompts=['a red house', 'a cat']")
    assert images.shape == (3, 3, 32, 32)
    # The same by hand, out of the parts themselves.
    model, scheduler = load_denoiser(text_dit)
    scheduler = diffusers.DDPMScheduler.from_config(scheduler.config, variance_type="fixed_small")
    vae = diffusers.AutoencoderKL.from_pretrained(text_dit / "vae")
    tokenizer = transformers.AutoTokenizer.from_pretrained(text_dit / "tokenizer")
    encoder = transformers.CLIPTextModelWithProjection.from_pretrained(text_dit / "text_encoder").eval()
    texts = ["a red house", "a cat", "a red house", "", "", ""]
    with torch.no_grad():
        pooled = encoder(tokenizer(texts, padding="max_length", return_tensors="pt").input_ids).text_embeds

        def output(sample, timesteps):
            both = model(torch.cat([sample] * 2), timesteps.repeat(2), pooled_projections=pooled).sample
            conditional, none = both[:, : sample.shape[1]].chunk(2)
            return none + 2.0 * (conditional - none)

        latents = by_hand(sampler_of("DPMSolverMultistep", scheduler, 2), output, 3, shape=(4, 8, 8))
        expected = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder"])
def test_a_model_of_text_without_what_encodes_it_is_refused(text_dit, tmp_path, capsys, part):
    shutil.rmtree(text_dit / part)
    images = draw_images(tmp_path / "images", size=(32, 32))
    train = ["train", f"--data.source={images}", "--data.image_size=32", f"--output_dir={tmp_path / 'run'}"]
    for command in (train, ["sample", "--prompts=['a cat']", f"--output_dir={tmp_path / 'out'}"]):
        assert main([*command, f"--model={text_dit}"]) == 2
        assert "takes text, but has no tokenizer/ and text_encoder/" in capsys.readouterr().err

"""`stagepatch sample` on whole pipelines."""

import pytest
import torch

from stagepatch.cli import main
from stagepatch.core import read_json
from stagepatch.patch import Patch
from stagepatch.sampling import SamplingConfig, generate_with_pipeline
from tests.runs import draw_weights
from tests.sampling.test_generate import sampled
from tests.tiny_pipelines import PIPELINES
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


@pytest.mark.parametrize("part", ["model_index.json", "scheduler"])
def test_pipeline_that_is_not_whole_is_named(tmp_path, capsys, part):
    SD.build().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / part).rename(tmp_path / "away")
    assert main(["sample", f"--model={tmp_path / 'model'}", "--prompts=['a cat']", f"--output_dir={tmp_path}"]) == 2
    assert "pipeline" in capsys.readouterr().err

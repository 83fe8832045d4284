"""`stagepatch sample` on whole pipelines."""

import pytest
import torch

from stagepatch.cli import main
from stagepatch.files import read_tensors
from stagepatch.patch import Patch
from stagepatch.sampling import SamplingConfig, generate_with_pipeline
from tests.tiny_pipelines import PIPELINES

SD, DIT = PIPELINES["UNet2DConditionModel"], PIPELINES["DiTTransformer2DModel"]
PROMPTS = ["a red house", "a cat"]


def sample(pipe, prompts=PROMPTS, **changes):
    config = SamplingConfig(**{"num_images": 4, "num_inference_steps": 2, "batch_size": 4, **changes})
    return generate_with_pipeline(pipe, config, prompts)


def test_image_depends_on_its_seed_and_number_and_prompt_alone():
    pipe = SD.build()
    images = sample(pipe)
    assert images.shape == (4, 3, 32, 32)
    assert images.min() >= -1
    assert images.max() <= 1
    torch.testing.assert_close(sample(pipe, batch_size=3), images, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sample(pipe, seed=1), images, atol=1e-3)
    assert not torch.allclose(images[0], images[2], atol=1e-3)
    other = sample(pipe, prompts=["a red house", "a blue tree"])
    torch.testing.assert_close(other[0], images[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[1], images[1], atol=1e-4)


def test_classes_take_turns():
    images = sample(DIT.build(), [], guidance_scale=4.0)
    assert images.shape == (4, 3, 32, 32)


def test_command_samples_base_and_patched_pipeline(tmp_path, capsys):
    pipe = SD.build()
    pipe.save_pretrained(tmp_path / "model")
    patch = Patch.create(pipe)
    with torch.no_grad():
        for prompts in patch.prompts:
            prompts.normal_(std=20.0)
    patch.save_pretrained(tmp_path / "patch")
    given = [f"--model={tmp_path / 'model'}", "--sampling.num_images=2", "--sampling.num_inference_steps=2"]
    assert main(["sample", *given, f"--output_dir={tmp_path / 'none'}"]) == 2
    assert "give --prompts" in capsys.readouterr().err
    given.append("--prompts=['a red house']")
    assert main(["sample", *given, f"--output_dir={tmp_path / 'base'}"]) == 0
    assert main(["sample", *given, f"--patch={tmp_path / 'patch'}", f"--output_dir={tmp_path / 'patched'}"]) == 0
    base, patched = (
        read_tensors(tmp_path / name / "samples.safetensors")[0]["images"] for name in ("base", "patched")
    )
    assert base.shape == patched.shape == (2, 3, 32, 32)
    assert not torch.allclose(base, patched, atol=1e-3)
    assert (tmp_path / "base" / "grid.png").exists()


def test_evaluate_says_that_it_measures_pixels(tmp_path, capsys):
    SD.build().save_pretrained(tmp_path / "model")
    assert main(["evaluate", f"--model={tmp_path / 'model'}"]) == 2
    assert "measures models of pixels alone" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["model_index.json", "scheduler"])
def test_pipeline_that_is_not_whole_is_named(tmp_path, capsys, part):
    SD.build().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / part
    path.rename(tmp_path / "away")
    assert main(["sample", f"--model={tmp_path / 'model'}", "--prompts=['a cat']", f"--output_dir={tmp_path}"]) == 2
    assert "pipeline" in capsys.readouterr().err

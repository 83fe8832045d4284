"""`stagepatch pretrain --parts`: a DiT or a U-Net from scratch in the latents of a VAE, of captions."""

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextModel

from stagepatch.checkpoints import load_captioner, load_denoiser
from stagepatch.cli import main
from stagepatch.training.checkpoint import TrainingState
from tests.runs import options
from tests.tiny_pipelines import PIPELINES, clip, clip_tokenizer
from tests.training.test_train_on_pipelines import draw_images


@pytest.fixture
def parts(tmp_path):
    """A directory with a VAE, and a CLIP with its projection."""
    directory = tmp_path / "parts"
    PIPELINES["DiTTransformer2DModel"].build().vae.save_pretrained(directory / "vae")
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(directory / "tokenizer")
    clip(tokenizer, hidden_size=16, projection=12).save_pretrained(directory / "text_encoder")
    draw_images(tmp_path / "images", size=(32, 32))
    return directory


def pretrain(parts, *more, output="model", **model):
    sizes = {"sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "conditioning": "text"}
    training = {"steps": 4, "batch_size": 2, "label_dropout": 0.5, "checkpoint_every": 2, "tensorboard": False}
    given = [f"--parts={parts}", f"--output_dir={parts.parent / output}", f"--data.source={parts.parent / 'images'}"]
    given += [*options("model", sizes | model), *options("training", training)]
    return main(["pretrain", *given, "--data.image_size=32", *more])


def test_result_has_its_vae_and_text_encoder_beside_it_and_samples_prompts(parts, tmp_path):
    assert pretrain(parts) == 0
    model, _ = load_denoiser(tmp_path / "model")
    assert model.config["pooled_projection_dim"] == 12  # of the text encoder
    for path in parts.rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "model" / path.relative_to(parts)).read_bytes()
    AutoencoderKL.from_pretrained(tmp_path / "model" / "vae")
    out = ["--sampling.num_images=2", "--sampling.num_inference_steps=2", f"--output_dir={tmp_path / 'samples'}"]
    assert main(["sample", f"--model={tmp_path / 'model'}", "--prompts", '["a cat"]', *out]) == 0
    (images,) = load_file(tmp_path / "samples" / "samples.safetensors").values()
    assert images.shape == (2, 3, 32, 32)
    assert pretrain(parts, output="plain", conditioning="none") == 0  # without text there is no text encoder
    assert sorted(path.name for path in (tmp_path / "plain").iterdir() if path.is_dir()) == NAMES


def test_a_unet_of_text_learns_its_variance_and_is_what_other_commands_take(parts, tmp_path):
    """It attends to tokens as Stable Diffusion's does, of the captions that its text encoder encodes."""
    clip(clip_tokenizer(), hidden_size=16).save_pretrained(parts / "text_encoder")
    unet = [
        "--model.block_out_channels=[16, 32]",
        "--model.layers_per_block=1",
        "--objective.beta_schedule=squaredcos_cap_v2",
    ]
    assert pretrain(parts, *unet, "--training.ema_decay=0.9") == 0
    model, scheduler = load_denoiser(tmp_path / "model")
    assert type(model).__name__ == "UNet2DConditionModel"
    assert (model.config.cross_attention_dim, model.config.in_channels, model.config.out_channels) == (16, 4, 8)
    assert scheduler.config.variance_type == "learned_range"
    tokenizer = AutoTokenizer.from_pretrained(parts / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(parts / "text_encoder")
    tokens = tokenizer(["a cat"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    encoded = load_captioner(tmp_path / "model")(["a cat"])["encoder_hidden_states"]
    torch.testing.assert_close(encoded, encoder(tokens).last_hidden_state)
    few = ["--sampling.num_images=2", "--sampling.num_inference_steps=2", f"--model={tmp_path / 'model'}"]
    out = ["--sampling.guidance_scale=2", f"--output_dir={tmp_path / 'samples'}"]
    assert main(["sample", "--prompts", '["a cat"]', *few, *out]) == 0
    (images,) = load_file(tmp_path / "samples" / "samples.safetensors").values()
    assert images.shape == (2, 3, 32, 32)
    data = [
        f"--data.source={tmp_path / 'images'}",
        "--data.image_size=32",
        "--training.steps=1",
        "--training.batch_size=2",
    ]
    assert main(["train", few[-1], *data, f"--output_dir={tmp_path / 'patch'}"]) == 0
    assert (tmp_path / "patch" / "model.safetensors").exists()


def test_it_goes_on_where_it_stopped(parts, tmp_path, monkeypatch):
    assert pretrain(parts, output="whole") == 0
    save = TrainingState.save

    def save_and_break(state, done):
        save(state, done)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", save_and_break)
        assert pretrain(parts) == 130
    assert pretrain(parts) == 0
    whole, again = (load_file(tmp_path / name / "transformer" / WEIGHTS) for name in ("whole", "model"))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


NAMES = ["cache", "scheduler", "transformer", "vae"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_what_does_not_fit_is_told(parts, tmp_path, capsys):
    assert pretrain(parts, sample_size=16, output="size") == 2
    told = capsys.readouterr().err
    assert "gives samples of [4, 8, 8], but the model is of [4, 16, 16]" in told
    assert "model.sample_size=8" in told
    assert pretrain(tmp_path / "images", conditioning="none", output="none") == 2
    assert "has no vae/" in capsys.readouterr().err
    clip(clip_tokenizer(), hidden_size=16).save_pretrained(parts / "text_encoder")
    assert pretrain(parts, output="plain") == 2
    assert "['CLIPTextModel']: a DiT of text needs CLIPTextModelWithProjection" in capsys.readouterr().err

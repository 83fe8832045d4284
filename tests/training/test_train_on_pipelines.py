"""`stagepatch train` on whole pipelines: images and captions in, a patch for the pipeline out."""

import json
import math
import weakref

import diffusers
import pytest
import torch
from PIL import Image

import stagepatch.training.run as run
from stagepatch.checkpoints import save_denoiser
from stagepatch.cli import main
from stagepatch.data import model_cache
from stagepatch.patch import Patch, PatchConfig
from stagepatch.training import read_log
from stagepatch.training.checkpoint import TrainingState
from tests.runs import options
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES


def draw_images(directory, count=4, size=(48, 48), captions=True, references=0):
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        name = f"{size[0]}-{number}.png"
        for ending in ["", "-source", "-source2"][: 1 + references]:
            pixels = torch.randint(0, 255, (*size, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(directory / f"{size[0]}-{number}{ending}.png")
        rows.append({"file_name": name, "text": f"photo of {['a cat', 'a red house'][number % 2]}"})
    if captions:
        with open(directory / "metadata.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return directory


def train(directory, *more, output="run", size=32):
    """The command on the model and the images that lie in the directory; its exit code."""
    paths = [f"--model={directory / 'model'}", f"--data.source={directory / 'images'}"]
    training = {"steps": 2, "batch_size": 2, "log_every": 1, "learning_rate": 0.1, "tensorboard": False}
    output = [f"--output_dir={directory / output}", f"--data.image_size={size}"]
    return main(["train", *paths, *output, *options("training", training), *more])


@pytest.fixture
def sd(tmp_path):
    """The directory of a pipeline and of images for it."""
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "model")
    draw_images(tmp_path / "images")
    return tmp_path


ALSO_AT_ANOTHER_SIZE = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
)


@pytest.mark.parametrize("name", [name for name, tiny in PIPELINES.items() if tiny.is_trained])
def test_patch_is_trained_on_every_pipeline_and_changes_its_images(name, tmp_path, shows):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    pipe.save_pretrained(tmp_path / "model")
    draw_images(tmp_path / "images", size=tiny.pixels, references=tiny.references)
    sample_size = [f"--patch.sample_size={tiny.sample_size}"] if tiny.sample_size else []
    given = ["--patch.initialization=normal", f"--training.gradient_accumulation_steps={tiny.accumulates}"]
    assert train(tmp_path, *given, *sample_size, size=tiny.pixels[0]) == 0
    log = read_log(tmp_path / "run")
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in log)
    base = tiny.call(pipe)
    patch = Patch.from_pretrained(tmp_path / "run")
    patch.scale = 1000.0
    with patch.attach(pipe):
        assert not torch.allclose(tiny.call(pipe), base, atol=1e-4)
    assert torch.equal(tiny.call(pipe), base)
    assert patch.facts["steps"] == "2"
    if name in ALSO_AT_ANOTHER_SIZE:  # not square; patches that are drawn are tried so on every pipeline
        height, width = tiny.other_pixels
        base = tiny.call(pipe, height=height, width=width)
        with patch.attach(pipe):
            patched = tiny.call(pipe, height=height, width=width)
        assert patched.isfinite().all()
        assert not torch.allclose(patched, base, atol=1e-4)
    shows("training", name)


def test_training_goes_on_and_ends_the_same_and_loads_no_encoders_again(sd, monkeypatch):
    given = [f"--cache={sd / 'cache'}", "--training.steps=4"]
    assert train(sd, *given, output="whole") == 0
    for loader in ("load_vae", "load_captioner", "Images"):
        monkeypatch.setattr(f"stagepatch.data.model_cache.{loader}", None)
    saved, save = [], TrainingState.save

    def save_and_break(state, done):
        save(state, done)
        saved.append(done)
        if saved == [2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", save_and_break)
    for code in (130, 0):
        assert train(sd, *given, "--training.checkpoint_every=2") == code
    assert saved == [2, 4]
    assert (sd / "run" / "model.safetensors").read_bytes() == (sd / "whole" / "model.safetensors").read_bytes()


def test_encoders_are_freed_before_the_denoiser_is_loaded(sd, monkeypatch):
    alive = []

    def watched(load):
        def loader(*args):
            loaded = load(*args)
            alive.append(weakref.ref(loaded))
            return loaded

        return loader

    load_denoiser = run.load_denoiser

    def load_last(*args):
        assert [reference() for reference in alive] == [None, None]
        return load_denoiser(*args)

    monkeypatch.setattr(model_cache, "load_vae", watched(model_cache.load_vae))
    monkeypatch.setattr(model_cache, "load_captioner", watched(model_cache.load_captioner))
    monkeypatch.setattr(run, "load_denoiser", load_last)
    assert train(sd) == 0


def test_one_run_takes_images_of_several_sizes_and_the_patch_serves_others(tmp_path):
    tiny = PIPELINES["SD3Transformer2DModel"]
    pipe = tiny.build()
    pipe.save_pretrained(tmp_path / "model")
    for size in ((32, 32), (32, 64), (64, 32)):
        draw_images(tmp_path / "images", size=size)
    assert train(tmp_path, "--data.crop=buckets", "--data.bucket_step=16", "--training.steps=6", size=48) == 0
    patch = Patch.from_pretrained(tmp_path / "run")
    for height, width in ((32, 32), (48, 32), (64, 64)):
        base = tiny.call(pipe, height=height, width=width)
        with patch.attach(pipe):
            assert not torch.equal(tiny.call(pipe, height=height, width=width), base)


@pytest.mark.parametrize("name", ["DiT", "UNet2DModel", "FluxTransformer2DModel"])
def test_what_is_learned_at_one_size_helps_at_others(name):
    """A patch fitted at 8×8 latents to a shift of the output shifts it at 16×16 and 8×12 too."""
    family = FAMILIES[name]
    model = family.model()
    patch = Patch.create(model, PatchConfig(sample_size=8, gate="none")).train()
    patch.attach(model)
    torch.manual_seed(0)

    def error(size, batch=8):
        """Mean squared distance to an output that is 0.1 higher than the base model's: 0.01 for the base itself."""
        inputs = family.inputs(model, batch, *size)
        patch.enabled = False
        goal = model(**inputs, return_dict=False)[0] + 0.1
        patch.enabled = True
        return (model(**inputs, return_dict=False)[0] - goal).square().mean()

    optimizer = torch.optim.Adam(patch.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        error((8, 8)).backward()
        optimizer.step()
    with torch.no_grad():
        for size in ((8, 8), (16, 16), (8, 12)):
            assert error(size, 32) < 0.8 * 0.01, size


def test_half_precision_backbone_and_the_digits_are_refused_for_a_vae(sd, capsys):
    assert train(sd, "--dtype=bfloat16") == 0
    assert all(parameter.dtype == torch.float32 for parameter in Patch.from_pretrained(sd / "run").parameters())
    assert train(sd, "--data.source=digits", output="other") == 2
    assert "need no VAE" in capsys.readouterr().err


def test_classes_and_variances_of_adm_are_trained_on_in_pixels(tmp_path, shows):
    model = FAMILIES["UNet2DModel of ADM"].model(in_channels=1, out_channels=2)
    save_denoiser(model, diffusers.DDPMScheduler(variance_type="learned_range"), tmp_path / "model")
    digits = ["--data.source=digits", "--patch.initialization=normal", "--patch.condition=t+c"]
    assert train(tmp_path, *digits, size=8) == 0
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in read_log(tmp_path / "run"))
    patch = Patch.from_pretrained(tmp_path / "run")
    assert patch.backbone.condition_taps == ("class_embedding",)
    shows("training", "UNet2DModel of ADM")


def test_a_model_of_edm_is_trained_by_its_own_scheduler(tmp_path, monkeypatch, capsys):
    """As Playground 2.5 and CosXL are: an SDXL that is told ¼ ln σ."""
    tiny = PIPELINES["UNet2DConditionModel of SDXL"]
    pipe = tiny.build()
    pipe.scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5)
    pipe.save_pretrained(tmp_path / "model")
    draw_images(tmp_path / "images", size=tiny.pixels)
    told, forward = [], diffusers.UNet2DConditionModel.forward

    def watched(model, sample, timestep, *args, **kwargs):
        told.extend(torch.as_tensor(timestep).flatten().tolist())
        return forward(model, sample, timestep, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", watched)
    assert train(tmp_path, "--patch.initialization=normal", size=tiny.pixels[0]) == 0
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in read_log(tmp_path / "run"))
    assert all(math.log(0.002) / 4 <= each <= math.log(80.0) / 4 and each % 1 for each in told)
    base = tiny.call(pipe)
    with Patch.from_pretrained(tmp_path / "run").attach(pipe):
        assert not torch.allclose(tiny.call(pipe), base, atol=1e-4)
    stages = ["--method=lora", "--lora.num_stages=2"]
    assert train(tmp_path, *stages, output="stages", size=tiny.pixels[0]) == 2
    assert "is by the timestep, 0 to 1000, that the model is told" in capsys.readouterr().err

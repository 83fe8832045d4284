"""`stagepatch train` on whole pipelines: images and captions in, a patch for the pipeline out."""

import json
import math
import weakref

import pytest
import torch
from PIL import Image

from stagepatch.cli import main
from stagepatch.patch import Patch, PatchConfig
from stagepatch.training import read_log
from stagepatch.training.checkpoint import TrainingState
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES

TEXT = [name for name in PIPELINES if name not in ("UNet2DModel", "DiTTransformer2DModel")]


def draw_images(directory, count=4, size=(48, 48), captions=True):
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        pixels = torch.randint(0, 255, (*size, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(directory / f"{size[0]}-{number}.png")
        rows.append(
            {"file_name": f"{size[0]}-{number}.png", "text": f"photo of {['a cat', 'a red house'][number % 2]}"}
        )
    if captions:
        with open(directory / "metadata.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return directory


def train(model, images, output, *more):
    given = [
        f"--model={model}",
        f"--data.source={images}",
        f"--output_dir={output}",
        "--training.steps=2",
        "--training.batch_size=2",
        "--training.log_every=1",
        "--training.learning_rate=0.1",
        "--training.tensorboard=false",
        *more,
    ]
    return main(["train", *given])


@pytest.mark.parametrize("name", list(PIPELINES))
def test_patch_is_trained_on_every_pipeline_and_changes_its_images(name, tmp_path):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    pipe.save_pretrained(tmp_path / "model")
    images = draw_images(tmp_path / "images", size=tiny.pixels)
    size = [f"--patch.sample_size={tiny.sample_size}"] if tiny.sample_size else []
    more = [f"--data.image_size={tiny.pixels[0]}", "--patch.initialization=normal", *size]
    assert train(tmp_path / "model", images, tmp_path / "run", *more) == 0
    log = read_log(tmp_path / "run")
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in log)
    base = tiny.call(pipe)
    patch = Patch.from_pretrained(tmp_path / "run")
    patch.scale = 1000.0
    with patch.attach(pipe):
        assert not torch.allclose(tiny.call(pipe), base, atol=1e-4)
    assert torch.equal(tiny.call(pipe), base)
    assert patch.facts["steps"] == "2"
    if tiny.other_pixels is not None:  # trained at one size, sampled at another, not square
        height, width = tiny.other_pixels
        base = tiny.call(pipe, height=height, width=width)
        with patch.attach(pipe):
            patched = tiny.call(pipe, height=height, width=width)
        assert patched.isfinite().all()
        assert not torch.allclose(patched, base, atol=1e-4)


def test_training_goes_on_and_ends_the_same_and_loads_no_encoders_again(tmp_path, monkeypatch):
    tiny = PIPELINES["UNet2DConditionModel"]
    tiny.build().save_pretrained(tmp_path / "model")
    images = draw_images(tmp_path / "images")
    size = "--data.image_size=32"
    cache = f"--cache={tmp_path / 'cache'}"
    assert train(tmp_path / "model", images, tmp_path / "whole", size, cache, "--training.steps=4") == 0
    for loader in ("load_vae", "load_captioner", "Images"):
        monkeypatch.setattr(f"stagepatch.data.model_cache.{loader}", None)
    run = tmp_path / "run"
    stopping = [size, cache, "--training.steps=4", "--training.checkpoint_every=2"]
    saved = []
    save = TrainingState.save

    def save_and_break(state, done):
        save(state, done)
        saved.append(done)
        if saved == [2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", save_and_break)
    assert train(tmp_path / "model", images, run, *stopping) == 130
    assert train(tmp_path / "model", images, run, *stopping) == 0
    assert saved == [2, 4]
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_encoders_are_freed_before_the_denoiser_is_loaded(tmp_path, monkeypatch):
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "model")
    images = draw_images(tmp_path / "images")
    alive = []
    import stagepatch.training.run as run
    from stagepatch.data import model_cache

    def watched(load):
        def loader(*args):
            loaded = load(*args)
            alive.append(weakref.ref(loaded))
            return loaded

        return loader

    load_denoiser = run.load_denoiser

    def load_last(*args):
        assert len(alive) == 2
        assert [reference() for reference in alive] == [None, None]
        return load_denoiser(*args)

    monkeypatch.setattr(model_cache, "load_vae", watched(model_cache.load_vae))
    monkeypatch.setattr(model_cache, "load_captioner", watched(model_cache.load_captioner))
    monkeypatch.setattr(run, "load_denoiser", load_last)
    assert train(tmp_path / "model", images, tmp_path / "run", "--data.image_size=32") == 0


def test_one_run_takes_images_of_several_sizes_and_the_patch_serves_others(tmp_path):
    tiny = PIPELINES["SD3Transformer2DModel"]
    pipe = tiny.build()
    pipe.save_pretrained(tmp_path / "model")
    images = tmp_path / "images"
    for size in ((32, 32), (32, 64), (64, 32)):
        draw_images(images, size=size)
    buckets = ["--data.image_size=48", "--data.crop=buckets", "--data.bucket_step=16", "--training.steps=6"]
    assert train(tmp_path / "model", images, tmp_path / "run", *buckets) == 0
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


def test_half_precision_backbone_and_the_digits_are_refused_for_a_vae(tmp_path, capsys):
    tiny = PIPELINES["UNet2DConditionModel"]
    tiny.build().save_pretrained(tmp_path / "model")
    images = draw_images(tmp_path / "images")
    assert train(tmp_path / "model", images, tmp_path / "run", "--data.image_size=32", "--dtype=bfloat16") == 0
    assert all(parameter.dtype == torch.float32 for parameter in Patch.from_pretrained(tmp_path / "run").parameters())
    assert train(tmp_path / "model", "digits", tmp_path / "other") == 2
    assert "need no VAE" in capsys.readouterr().err

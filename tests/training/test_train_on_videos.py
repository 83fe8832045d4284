"""Videos through a VAE, the cache of their latents, and `stagepatch train` on them."""

import math

import diffusers
import pytest
import torch
from PIL import Image

from stagepatch.checkpoints import temporal_factor
from stagepatch.cli import main
from stagepatch.core.errors import UserError
from stagepatch.data import CachedLatents, Clips, DataConfig, cache_writer, decode_latents, encode_images, open_source
from stagepatch.data.model_cache import make_cache
from stagepatch.patch import Patch
from stagepatch.sampling import latent_sampling
from stagepatch.training import read_log
from tests.data.filming import film
from tests.runs import options
from tests.tiny_pipelines import PIPELINES

WAN = PIPELINES["WanTransformer3DModel"]
OF_VIDEOS = ["Wan", "CogVideoX", "HunyuanVideo", "HunyuanVideo15", "LTXVideo", "Mochi", "SanaVideo"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """Of Wan, whose VAE is smaller by 2 over time, saved as `pipe.directory`."""
    pipe = WAN.build()
    pipe.directory = tmp_path_factory.mktemp("wan")
    pipe.save_pretrained(pipe.directory)
    return pipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four videos of noise that fades, with captions, and a picture, which is left alone."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "0.png").touch()
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        noise = torch.randint(0, 255, (32, 40, 3), dtype=torch.uint8, generator=generator).numpy()
        frames = [Image.fromarray((noise * share).astype("uint8")) for share in (1.0, 0.9, 0.7, 0.6, 0.4, 0.2)]
        film(folder / f"{number}.mkv", frames)
        (folder / f"{number}.txt").write_text(f"photo of {['a cat', 'a red house'][number % 2]}")
    return DataConfig(source=str(folder), image_size=32, num_frames=5)


@pytest.fixture(scope="module")
def cached(pipe, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    make_cache(directory, str(pipe.directory), data)
    return CachedLatents(directory)


@pytest.mark.parametrize("name", OF_VIDEOS)
def test_videos_of_every_vae_are_as_long_as_its_factor_says_and_come_back(name, tmp_path):
    vae = PIPELINES[f"{name}Transformer3DModel"].vae().eval()
    vae.save_config(tmp_path / "vae")
    video = torch.rand(1, 3, 2 * temporal_factor(tmp_path) + 1, 32, 32) * 2 - 1
    mean, std = encode_images(vae, video)
    assert mean.shape == std.shape
    assert mean.shape[:3] == (1, 4, 3)
    with torch.no_grad():
        expected = vae.decode(vae.encode(video).latent_dist.mean, return_dict=False)[0]
    torch.testing.assert_close(decode_latents(vae, mean), expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_cached_latents_are_those_that_the_pipeline_makes_of_a_video(pipe, data, cached):
    clips = Clips(open_source(data), data)
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "transformer", "vae")}
    of_videos = diffusers.WanVideoToVideoPipeline(**parts, scheduler=diffusers.DDIMScheduler())
    of_videos.scheduler.add_noise = lambda latents, noise, timestep: latents
    for index in range(4):
        video = clips[index]["image"].unsqueeze(0)
        for name, shown in (("image", video), ("image_flipped", video.flip(-1))):
            latents = of_videos.prepare_latents(shown, 1, 4, 32, 32, torch.float32)
            assert latents.shape == (1, 4, 3, 8, 8)
            torch.testing.assert_close(cached[index][name].float(), latents[0], rtol=2e-3, atol=2e-3)
    texts = [cached[index]["condition"]["encoder_hidden_states"] for index in range(3)]
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[1])


def test_a_cache_of_videos_goes_on_where_it_was_stopped(pipe, data, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer, "IMAGES_PER_FILE", 9)  # of 5 frames: one video
    encode, encoded = cache_writer._encode_images, []

    def stop_at_third(*args):
        encoded.append(args[-1])
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(cache_writer, "_encode_images", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        make_cache(tmp_path / "cache", str(pipe.directory), data)
    make_cache(tmp_path / "cache", str(pipe.directory), data)
    assert encoded == [[0], [1], [2], [2], [3]]
    resumed = CachedLatents(tmp_path / "cache")
    assert all(torch.equal(cached[index]["image"], resumed[index]["image"]) for index in range(4))
    for choices, reason in (
        ({"fps": 12}, "fps .0.0 then, 12 now"),
        ({"num_frames": 1}, "num_frames .5 then, None now"),
    ):
        with pytest.raises(UserError, match=reason):
            make_cache(tmp_path / "cache", str(pipe.directory), DataConfig(**{**vars(data), **choices}))


def test_a_patch_is_trained_on_videos_and_changes_those_of_the_pipeline(pipe, data, cached, tmp_path, seen):
    given = [f"--model={pipe.directory}", f"--output_dir={tmp_path / 'run'}", f"--cache={cached.directory}"]
    training = {"steps": 2, "batch_size": 2, "log_every": 1, "learning_rate": 0.1, "tensorboard": False}
    chosen = {name: value for name, value in vars(data).items() if value != getattr(DataConfig(), name)}
    given += [*options("data", chosen), *options("training", training), "--patch.initialization=normal"]
    assert main(["train", *given]) == 0
    assert [draws.x_start.shape for draws in seen] == [(2, 4, 3, 8, 8)] * 2
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in read_log(tmp_path / "run"))
    base, pictures = WAN.call(pipe), WAN.call(pipe, num_frames=1)
    patch = Patch.from_pretrained(tmp_path / "run")
    assert patch.backbone.grid == (3, 4, 4)  # of 3×8×8 latents: those that it was trained on
    patch.scale = 1000.0
    with patch.attach(pipe):
        assert not torch.allclose(WAN.call(pipe), base, atol=1e-4)
        assert not torch.allclose(WAN.call(pipe, num_frames=1), pictures, atol=1e-4)
    assert torch.equal(WAN.call(pipe), base)
    assert base.shape[1] == 5


def test_frames_that_a_model_does_not_take_are_refused(pipe, data, tmp_path, monkeypatch):
    def make(model, **choices):
        make_cache(tmp_path / "cache", str(model), DataConfig(**{**vars(data), **choices}))

    with pytest.raises(UserError, match=r"num_frames=6, but the VAE of .* takes 2·k \+ 1 frames: give 5 or 7\."):
        make(pipe.directory, num_frames=6)
    with pytest.raises(UserError, match=r"takes 2·k \+ 1 frames: give 3\."):
        make(pipe.directory, num_frames=2)
    with pytest.raises(UserError, match=r"num_frames=5: here images are sampled"):
        latent_sampling(str(pipe.directory), data, tmp_path / "cache")
    PIPELINES["SD3Transformer2DModel"].build().save_pretrained(tmp_path / "sd3")
    with pytest.raises(UserError, match=r"num_frames=5, but .*sd3' is no model of videos: leave it at 1"):
        make(tmp_path / "sd3")
    assert not (tmp_path / "cache").exists()

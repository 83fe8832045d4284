"""Images and captions encoded once, against the VAE and the encoders themselves."""

import json
import pickle
import shutil
import signal
from inspect import signature

import diffusers
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from stagepatch.checkpoints import load_captioner, load_vae
from stagepatch.cli import main
from stagepatch.core.errors import UserError
from stagepatch.core.tensors import read_tensors
from stagepatch.data import (
    CachedLatents,
    DataConfig,
    Images,
    cache_writer,
    decode_latents,
    encode_images,
    open_source,
)
from stagepatch.data.model_cache import make_cache
from tests.runs import Strike
from tests.tiny_pipelines import PIPELINES

CAPTIONS = ["a red house", "a blue tree on the old house", "", "a red house"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    for number in range(4):
        pixels = torch.randint(0, 255, (32, 48 if number % 2 else 32, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(directory / f"{number}.png")
    rows = [json.dumps({"file_name": f"{number}.png", "text": caption}) for number, caption in enumerate(CAPTIONS)]
    (directory / "metadata.jsonl").write_text("\n".join(rows))
    return directory


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sd")
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def cached_by_sd(tmp_path_factory, folder, sd):
    """The directory of a whole cache."""
    directory = tmp_path_factory.mktemp("cached")
    cache(directory, sd, data(folder))
    return directory


@pytest.fixture
def changeable(tmp_path, folder, sd, cached_by_sd):
    """A directory of images, model and whole cache, to change."""
    for name, directory in (("images", folder), ("sd", sd), ("cache", cached_by_sd)):
        shutil.copytree(directory, tmp_path / name)
    return tmp_path


def data(folder, **changes):
    return DataConfig(**{"source": str(folder), "image_size": 32, **changes})


def cache(directory, model, config):
    make_cache(directory, str(model), config, 3, torch.float32)
    return CachedLatents(directory)


OF_LATENTS = [
    name
    for name, tiny in PIPELINES.items()
    if tiny.is_prompted and tiny.is_trained and tiny.vae_name == "vae" and tiny.vae and not tiny.references
    if name != "GlmImageTransformer2DModel"  # reads captions with their pictures: see its own tests
]


@pytest.fixture(scope="module", params=OF_LATENTS)
def of_pipeline(request, tmp_path_factory, folder):
    """A pipeline of latents, where it is saved, and its cache of the folder's images."""
    tiny, directory = PIPELINES[request.param], tmp_path_factory.mktemp("of_pipeline")
    pipe = tiny.build()
    pipe.save_pretrained(directory / "model")
    config = data(folder, image_size=tiny.pixels[0])
    cached = cache(directory / "cache", directory / "model", config)
    return pipe, directory / "model", cached, Images(open_source(config), config)


def test_cached_latents_decode_to_the_images_as_the_pipeline_decodes_them(of_pipeline):
    """The mean of the posterior, through the pipeline's own decoding, is the VAE's own reconstruction."""
    pipe, _, cached, images = of_pipeline
    pixels, latents = images[1]["image"].unsqueeze(0), cached[1]["image"].float().unsqueeze(0)
    vae = pipe.vae
    is_video = isinstance(vae, diffusers.AutoencoderKLQwenImage) or "num_frames" in signature(pipe.__call__).parameters
    is_video |= isinstance(vae, (diffusers.AutoencoderKLWan, diffusers.AutoencoderKLQwenImage21))
    if vae.config.get("in_channels") == 4:  # Qwen-Image 2.1's is of RGBA
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1)
    with torch.no_grad():
        encoded = vae.encode(pixels.unsqueeze(2) if is_video else pixels)
        raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        expected = vae.decode(raw, return_dict=False)[0]
        latents = latents.unsqueeze(2) if is_video else latents
        mean, std = (dict(vae.named_buffers()).get(f"latents_{name}") for name in ("mean", "std"))
        if vae.config.get("latents_mean") is not None:
            mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
        if mean is not None:  # as pipelines with means undo the scaling before they decode
            latents = latents * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)
        elif type(pipe).__name__.startswith(("Flux2", "Ernie")):  # as Flux2Pipeline does
            std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
            cells = pipe._patchify_latents(latents) * std + vae.bn.running_mean.view(1, -1, 1, 1)
            latents = pipe._unpatchify_latents(cells)
        elif type(pipe).__name__.startswith("Ideogram4"):  # as its pipeline does, channels last
            std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
            cells = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1)
            cells = (cells.flatten(3) * std + vae.bn.running_mean).view_as(cells)
            latents = cells.permute(0, 5, 1, 3, 2, 4).reshape(latents.shape)
        else:
            latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        decoded = vae.decode(latents, return_dict=False)[0]
    torch.testing.assert_close(decoded, expected, rtol=2e-2, atol=2e-2)
    assert expected.std() > 0.01


def test_cached_captions_are_the_encoders_own(of_pipeline):
    _, model, cached, _ = of_pipeline
    encode = load_captioner(model)
    for index, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            condition = encode([caption])
        for key, value in condition.items():
            stored = cached[index]["condition"][key][: value.shape[1]]
            torch.testing.assert_close(stored.to(value.dtype), value[0], rtol=1e-3, atol=1e-3)
    first, other, empty, again = (cached[index]["condition"] for index in range(4))
    for key, value in first.items():
        assert torch.equal(value, again[key])
        assert torch.equal(empty[key], cached.null_condition[key])
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_each_distinct_caption_is_encoded_once(cached_by_sd):
    tensors, _ = read_tensors(cached_by_sd / "captions-00000.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"0", "1", "2"}  # the empty one, and two


def test_both_flips_are_kept(cached_by_sd, folder, sd):
    config, cached = data(folder), CachedLatents(cached_by_sd)
    images = Images(open_source(config), config)
    vae = load_vae(sd)
    for index in range(4):
        mean, std = encode_images(vae, images[index]["image"].unsqueeze(0).flip(-1))
        for name, expected in (("image_flipped", mean[0]), ("std_flipped", std[0])):
            torch.testing.assert_close(cached[index][name].float(), expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(mean[0].flip(-1), cached[index]["image"].float(), atol=1e-2)


def test_buckets_are_groups_and_batches_come_out_of_loading_processes(tmp_path, folder, sd):
    cached = cache(tmp_path / "cache", sd, data(folder, image_size=48, crop="buckets", bucket_step=16))
    groups = cached.groups()
    assert sorted(map(sorted, groups)) == [[0, 2], [1, 3]]
    assert cached[0]["image"].shape != cached[1]["image"].shape
    batches = list(DataLoader(cached, batch_sampler=groups, num_workers=2))
    assert [len(batch["image"]) for batch in batches] == [2, 2]
    assert batches[0]["condition"]["encoder_hidden_states"].shape[0] == 2
    assert torch.equal(pickle.loads(pickle.dumps(cached))[3]["image"], cached[3]["image"])


def test_whole_cache_is_opened_without_images_or_encoders(cached_by_sd, folder, sd, monkeypatch):
    for name in ("load_vae", "load_captioner", "Images"):
        monkeypatch.setattr(f"stagepatch.data.model_cache.{name}", None)
    assert len(cache(cached_by_sd, sd, data(folder))) == 4


def flip_last_bit(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("file", "change", "choices", "reason"),
    [
        ("images/0.png", Image.new("RGB", (32, 32)).save, {}, "images"),
        ("images/metadata.jsonl", lambda path: path.write_text(""), {}, "images"),
        ("sd/vae/diffusion_pytorch_model.safetensors", flip_last_bit, {}, "vae"),
        ("sd/text_encoder/model.safetensors", lambda path: path.write_bytes(b"other"), {}, "text_encoder"),
        ("images/0.png", lambda path: None, {"image_size": 16}, r"image_size \(32 then, 16 now\)"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_stale_cache_is_refused_with_the_reason(changeable, file, change, choices, reason, whole):
    if not whole:
        (changeable / "cache" / "index.safetensors").unlink()
    change(changeable / file)
    with pytest.raises(UserError, match=f"of something else: changed since are {reason}"):
        cache(changeable / "cache", changeable / "sd", data(changeable / "images", **choices))


def test_pixels_are_cached_beside_captions_where_there_is_no_vae(tmp_path, folder):
    PIPELINES["UNet2DConditionModel of DeepFloyd IF"].build().save_pretrained(tmp_path / "model")
    config = data(folder, image_size=16)
    cached, images = cache(tmp_path / "cache", tmp_path / "model", config), Images(open_source(config), config)
    assert set(cached[1]) == {"image", "label", "condition"}
    torch.testing.assert_close(cached[1]["image"].float(), images[1]["image"], rtol=0, atol=1e-3)
    encode = load_captioner(tmp_path / "model")
    expected = encode([CAPTIONS[1]])["encoder_hidden_states"][0]
    torch.testing.assert_close(cached[1]["condition"]["encoder_hidden_states"], expected, rtol=1e-3, atol=1e-3)


def test_the_blank_that_vace_follows_is_the_vaes_of_zeros_as_its_pipeline_encodes_it(tmp_path, folder):
    pipe = PIPELINES["WanVACETransformer3DModel"].build()
    pipe.save_pretrained(tmp_path / "model")
    cached = cache(tmp_path / "cache", tmp_path / "model", data(folder))
    nothing, mask = torch.zeros(1, 3, 1, 32, 32), torch.ones(1, 3, 1, 32, 32)
    stays, changes = pipe.prepare_video_latents(nothing, mask, [[]])[0].chunk(2)
    for expected in (stays, changes):
        torch.testing.assert_close(cached[0]["references"][0].float(), expected.squeeze(1), rtol=1e-3, atol=1e-3)


def test_kandinsky_is_told_its_pictures_as_its_prior_would_tell_them(tmp_path, folder):
    pipe = PIPELINES["UNet2DConditionModel of Kandinsky 2.2"].build()
    pipe.save_pretrained(tmp_path / "model")
    config = data(folder)
    cached, images = cache(tmp_path / "cache", tmp_path / "model", config), Images(open_source(config), config)
    for index in (0, 1):
        picture = images[index]["image"]
        shown = Image.fromarray((127.5 * picture + 127.5).round().byte().permute(1, 2, 0).numpy())
        embeds = pipe.prior_pipe.interpolate([shown], [1.0], num_inference_steps=2).image_embeds[0]
        torch.testing.assert_close(cached[index]["condition"]["image_embeds"], embeds, rtol=1e-3, atol=1e-3)
        latents = pipe.movq.encode(picture[None]).latents
        torch.testing.assert_close(cached[index]["image"].float(), latents[0], rtol=1e-3, atol=1e-3)
        expected = pipe.movq.decode(latents, force_not_quantize=True).sample.clamp(-1, 1)
        assert torch.equal(decode_latents(pipe.movq, latents), expected)
    nothing = pipe.prior_pipe.get_zero_embed()[0]
    torch.testing.assert_close(cached.null_condition["image_embeds"], nothing, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(nothing, embeds, atol=1e-2)


def test_kandinsky_without_what_reads_pictures_is_refused_and_so_are_mirrored_ones(tmp_path, folder, capsys):
    pipe = PIPELINES["UNet2DConditionModel of Kandinsky 2.2"].build()
    pipe.decoder_pipe.save_pretrained(tmp_path / "decoder")
    with pytest.raises(UserError, match="image encoder of its prior, which is not beside it: save both as one"):
        cache(tmp_path / "cache", tmp_path / "decoder", data(folder))
    with pytest.raises(UserError, match=r"made once, as they are: leave out data.horizontal_flip"):
        cache(tmp_path / "cache", tmp_path / "decoder", data(folder, horizontal_flip=True))
    given = [f"--model={tmp_path / 'decoder'}", "--prompts=['a cat']", f"--output_dir={tmp_path / 'out'}"]
    assert main(["sample", *given]) == 2
    assert "which its prior makes of captions: save both as one" in capsys.readouterr().err


def test_model_without_captions_gets_none(tmp_path, folder):
    PIPELINES["DiTTransformer2DModel"].build().save_pretrained(tmp_path / "model")
    cached = cache(tmp_path / "cache", tmp_path / "model", data(folder))
    assert "condition" not in cached[0]
    assert cached.null_condition is None


def test_cache_that_is_not_whole_cannot_be_read(changeable):
    with pytest.raises(UserError, match="No whole cache at"):
        CachedLatents(changeable)
    cached = CachedLatents(changeable / "cache")
    path = changeable / "cache" / "latents-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"latents-00000.safetensors' cannot be read .* delete it and 'index"):
        cached[0]


def cache_job(model, folder, output):
    """The command with an image a file, which says when it encodes one."""
    encode = cache_writer._encode_images
    cache_writer.IMAGES_PER_FILE = 1
    cache_writer._encode_images = lambda *args: print("encodes a file") or encode(*args)
    return main(
        ["cache", f"--model={model}", f"--data.source={folder}", "--data.image_size=32", f"--output_dir={output}"]
    )


def assert_same(cached, expected, *names):
    for index in range(4):
        assert all(torch.equal(cached[index][name], expected[index][name]) for name in names)


def test_killed_while_caching_it_goes_on_and_ends_the_same(tmp_path, folder, sd, monkeypatch, processes):
    monkeypatch.setattr(cache_writer, "IMAGES_PER_FILE", 1)
    whole = cache(tmp_path / "whole", sd, data(folder))
    first = tmp_path / "cache" / "latents-00000.safetensors"
    strike = Strike("renamed", 1, first.name)
    paths = {"model": sd, "folder": folder, "output": first.parent}
    processes.call(cache_job, expected=-signal.SIGKILL, **paths, strike=strike)
    assert [path.name for path in first.parent.glob("*.safetensors")] == [first.name]
    written = first.stat().st_mtime_ns
    resumed = cache(tmp_path / "cache", sd, data(folder))
    assert first.stat().st_mtime_ns == written
    assert_same(resumed, whole, "image", "std", "image_flipped", "std_flipped")


def test_two_processes_share_the_work(tmp_path, folder, sd, monkeypatch, processes):
    monkeypatch.setattr(cache_writer, "IMAGES_PER_FILE", 1)
    alone = cache(tmp_path / "alone", sd, data(folder))
    outputs = processes.call_together(cache_job, 2, model=sd, folder=folder, output=tmp_path / "both")
    assert [output.count("encodes a file") for output in outputs] == [2, 2]
    assert_same(CachedLatents(tmp_path / "both"), alone, "image")


def test_commands_errors(tmp_path, folder, capsys):
    assert main(["cache", "--model=digits", f"--data.source={folder}", f"--output_dir={tmp_path}"]) == 2
    assert "model='digits' has no VAE" in capsys.readouterr().err
    assert main(["cache", f"--model={tmp_path}/nowhere", f"--output_dir={tmp_path}"]) == 2
    assert "No model at" in capsys.readouterr().err

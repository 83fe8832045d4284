"""Pictures that images are edits of: where they are found, how they are cached, and that training is told them."""

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.cli import main
from stagepatch.core import UserError
from stagepatch.data import (
    CachedLatents,
    Clips,
    DataConfig,
    FolderSource,
    SourceConfig,
    encode_images,
    load_training_data,
    make_cache,
    open_source,
)
from stagepatch.families.qwenimage import encode_edits
from stagepatch.training import Conditions, TrainingConfig, draw, load_batches
from tests.data.filming import film
from tests.data.reading import load
from tests.runs import make_objective, options
from tests.tiny_pipelines import PIPELINES


@pytest.fixture
def folder(tmp_path):
    """Two images, each the edit of two pictures, one of another size, and captions."""
    directory = tmp_path / "images"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for name in "ab":
        for ending, size in (("", 32), ("-source", 32), ("-source2", 64)):
            pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / f"{name}{ending}.png")
        (directory / f"{name}.txt").write_text(f"photo of {name}")
    return directory


def names(source, index=0):
    return [path.name for path in source.references(index)]


def test_pictures_beside_images_are_no_images_and_masks_stay_masks(folder):
    Image.new("L", (32, 32)).save(folder / "a-masklabel.png")
    Image.new("RGB", (32, 32)).save(folder / "open-source.png")  # beside no 'open.png'
    with pytest.raises(UserError, match=r"edit of 2 picture\(s\), and '.*open-source.png' of 0"):
        FolderSource(folder)
    (folder / "open-source.png").unlink()
    source = FolderSource(folder)
    assert source.names == ["a.png", "b.png"]
    assert names(source, 1) == ["b-source.png", "b-source2.png"]
    assert source.mask(0).name == "a-masklabel.png"
    first = source.stamp()
    Image.new("RGB", (32, 32)).save(folder / "b-source2.png")
    assert [one == other for one, other in zip(FolderSource(folder).stamp(), first, strict=True)] == [True, False]


def test_pictures_in_a_folder_of_their_own(folder):
    (folder / "before").mkdir()
    for name in "ab":
        (folder / f"{name}-source2.png").unlink()
        (folder / f"{name}-source.png").replace(folder / "before" / f"{name}.png")
    assert names(FolderSource(folder, references=str(folder / "before")), 1) == ["b.png"]
    (folder / "before" / "b.png").unlink()
    with pytest.raises(UserError, match="all images that are trained on together need as many"):
        FolderSource(folder, references=str(folder / "before"))
    with pytest.raises(UserError, match=r"No picture in data\.references="):
        FolderSource(folder, references=str(folder.parent / "nowhere"))


def test_they_are_cropped_to_their_images_size(folder):
    item = load(folder, image_size=16, channels=3)[0]
    assert item["references"].shape == (2, 3, 16, 16)
    with Image.open(folder / "a-source2.png") as file:
        small = np.asarray(file.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)
    assert abs(float(item["references"][1].mean()) - (small.mean() / 127.5 - 1)) < 0.02
    (folder / "a-source.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"Cannot read the picture '.*a-source.png', which an image is the edit of"):
        load(folder, image_size=16)


def test_clips_have_the_frames_of_the_video_beside_them(tmp_path):
    film(tmp_path / "a.mkv", [10, 20, 30, 40, 50, 60])
    film(tmp_path / "a-source.mkv", [110, 120, 130, 140, 150, 160])
    config = DataConfig(str(tmp_path), image_size=16, num_frames=3, num_clips=2)
    source = open_source(config)
    assert source.names == ["a.mkv"]
    item = Clips(source, config)[1]
    for name, values in (("image", (40, 50, 60)), ("references", (140, 150, 160))):
        means = item[name].reshape(3, 3, 16, 16).mean(dim=(0, 2, 3))
        torch.testing.assert_close((means + 1) * 127.5, torch.tensor(values, dtype=torch.float32))
    film(tmp_path / "a-source.mkv", [110, 120, 130])
    with pytest.raises(UserError, match=r"'.*a-source.mkv' does not go with the video beside it, frame by frame"):
        Clips(open_source(config), config)[1]


@pytest.fixture
def klein(tmp_path):
    pipe = PIPELINES["Flux2Transformer2DModel of klein"].build()
    pipe.save_pretrained(tmp_path / "model")
    return pipe


def test_their_latents_are_cached_and_mirrored_with_the_image(tmp_path, folder, klein):
    data = DataConfig(str(folder), image_size=32)
    make_cache(tmp_path / "cache", str(tmp_path / "model"), data, 2)
    cached, images = CachedLatents(tmp_path / "cache"), load(folder, image_size=32, channels=3)
    pixels = images[1]["references"]
    for name, shown in (("references", pixels), ("references_flipped", pixels.flip(-1))):
        expected = encode_images(klein.vae, shown)[0]
        torch.testing.assert_close(cached[1][name].float(), expected, rtol=1e-3, atol=1e-2)
    (batch,) = load_batches(cached, 2, 0, 1, 0, 0)
    batch |= {name: torch.zeros_like(batch[name]) for name in ("std", "std_flipped")}
    conditions, config = Conditions(klein.transformer, cached), TrainingConfig(batch_size=2, label_dropout=1.0)
    seen = set()
    for iteration in range(8):
        cpu = torch.device("cpu")
        drawn = draw(batch, config, make_objective(), conditions, iteration, True, cpu)
        assert torch.equal(drawn.condition["encoder_hidden_states"][0], cached.null_condition["encoder_hidden_states"])
        for row in range(2):
            given = drawn.condition["reference_latents"][row]
            mirrored = "" if torch.equal(drawn.x_start[row], batch["image"][row].float()) else "_flipped"
            seen.add(mirrored)
            assert torch.equal(given, batch[f"references{mirrored}"][row].float())
    assert seen == {"", "_flipped"}


def test_a_patch_is_trained_on_pairs(tmp_path, folder, klein, seen):
    given = [f"--model={tmp_path / 'model'}", f"--data.source={folder}", "--data.image_size=32"]
    training = {"steps": 2, "batch_size": 2, "log_every": 1, "tensorboard": False}
    given += [*options("training", training), "--patch.sample_size=[8,8]", f"--output_dir={tmp_path / 'run'}"]
    assert main(["train", *given, "--training.gradient_accumulation_steps=2"]) == 0
    assert [draws.condition["reference_latents"].shape for draws in seen] == [(2, 2, 4, 8, 8)] * 2


def test_read_with_pictures_a_dropped_caption_keeps_its_own(tmp_path, folder):
    pipe = PIPELINES["QwenImageTransformer2DModel of edits"].build()
    pipe.save_pretrained(tmp_path / "model")
    data = DataConfig(str(folder), image_size=32)
    make_cache(tmp_path / "cache", str(tmp_path / "model"), data, 2)
    cached, images = CachedLatents(tmp_path / "cache"), load(folder, image_size=32, channels=3)
    conditions = Conditions(pipe.transformer, cached)
    (batch,) = load_batches(cached, 2, 0, 1, 0, 0)
    condition = conditions.of(batch, torch.tensor([True, False]))
    order = [int(torch.equal(batch["image"][row], cached[1]["image"])) for row in range(2)]
    for row, caption in ((0, ""), (1, f"photo of {'ab'[order[1]]}")):
        text = encode_edits(pipe, [caption], [images[order[row]]["references"]])["encoder_hidden_states"][0]
        mask = condition["encoder_hidden_states_mask"][row]
        torch.testing.assert_close(condition["encoder_hidden_states"][row][mask], text, rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match=r"leave out data\.horizontal_flip"):
        make_cache(tmp_path / "other", str(tmp_path / "model"), DataConfig(str(folder), horizontal_flip=True), 2)


def test_what_takes_no_pictures_is_refused(tmp_path, folder, klein, capsys):
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "sd")
    with pytest.raises(UserError, match="which UNet2DConditionModel does not take in training"):
        make_cache(tmp_path / "cache", str(tmp_path / "sd"), DataConfig(str(folder), image_size=32))
    with pytest.raises(UserError, match="which no model in pixels takes here"):
        load_training_data("", DataConfig(str(folder), image_size=16))
    given = [f"--model={tmp_path / 'model'}", f"--data.source={folder}", "--data.image_size=32"]
    assert main(["train", *given, "--objective=samples", f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "train edits by objective='denoising'" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "plain" / "c.png")
    mixed = DataConfig(sources=[SourceConfig(str(folder)), SourceConfig(str(tmp_path / "plain"))], image_size=32)
    with pytest.raises(UserError, match=r"edits of as many pictures, which are 2 of '.*', 0 of '"):
        make_cache(tmp_path / "mixed", str(tmp_path / "model"), mixed)

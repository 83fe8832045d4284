"""Images that are kept out of training."""

import hashlib
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stagepatch.cli import main
from stagepatch.core import UserError
from stagepatch.data import DataConfig, load_dataset, load_held_out, load_training_data
from stagepatch.training import load_batches
from tests.runs import assert_same, options
from tests.tiny_pipelines import PIPELINES

SHARE = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 images, of two shapes, each of a grey of its own, some with two captions."""
    directory = tmp_path_factory.mktemp("images")
    rows = []
    for number in range(40):
        size = (16, 32) if number % 3 else (32, 16)
        Image.new("RGB", size, (6 * number,) * 3).save(directory / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": [f"{number} cats"] * (1 + number % 2)})
    (directory / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def config(folder, **choices):
    return DataConfig(**{"source": str(folder), "image_size": 32, "held_out": SHARE, **choices})


def greys(dataset):
    """Which images are in a dataset, by their grey."""
    return sorted(round(float((dataset[index]["image"].mean() + 1) * 127.5)) // 6 for index in range(len(dataset)))


def expected(names=range(40)):
    """Numbers whose file name's SHA-256 is in the lowest share."""
    return [n for n in names if int(hashlib.sha256(f"{n}.png".encode()).hexdigest()[:8], 16) < SHARE * 2**32]


def test_images_are_held_out_by_their_names_whatever_else_is_there(folder, tmp_path):
    trained = load_training_data("", config(folder))
    held_out = load_held_out(config(folder), trained)
    assert greys(held_out) == expected()
    assert 0 < len(held_out) < 20
    assert sorted(greys(held_out) + greys(trained)) == list(range(40))
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "moved" / "metadata.jsonl").unlink()
    for number in (0, 7, expected()[1]):
        (tmp_path / "moved" / f"{number}.png").unlink()
    Image.new("RGB", (32, 32)).save(tmp_path / "moved" / "-first.png")
    moved = load_held_out(config(tmp_path / "moved"), load_training_data("", config(tmp_path / "moved")))
    left = set(expected()) - {0, 7, expected()[1]}
    assert left <= set(greys(moved)) <= left | {0}  # 0 may be the new image, which is black


def test_shards_and_rows_have_keys_too(folder):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [str(folder / f"{n}.png") for n in range(40)]})
    rows.cast_column("image", datasets.Image()).save_to_disk(folder.parent / "rows")
    trained = load_training_data("", config(folder.parent / "rows"))
    rows = [n for n in range(40) if int(hashlib.sha256(str(n).encode()).hexdigest()[:8], 16) < SHARE * 2**32]
    assert greys(trained.held_out) == rows


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory):
    """The tiny Stable Diffusion's cache of the folder, in buckets: data config, model, and directory."""
    directory = tmp_path_factory.mktemp("cached")
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(directory / "model")
    data = config(folder, crop="buckets", bucket_step=16)
    load_training_data(str(directory / "model"), data, str(directory / "cache"))
    return data, str(directory / "model"), directory / "cache"


def test_a_cache_holds_all_and_gives_either_part(folder, cached):
    data, model, directory = cached
    trained = load_training_data(model, data, str(directory))
    everything = load_training_data(model, config(folder, crop="buckets", bucket_step=16, held_out=0), str(directory))
    files = sorted(folder.glob("*.png"))
    assert [int(files[place].stem) for place in trained.held_out.indices] == sorted(expected(), key=str)
    assert sorted(trained.indices + trained.held_out.indices) == list(range(40)) == list(range(len(everything)))
    for part in (trained, trained.held_out):
        groups = part.groups()
        assert sorted(index for group in groups for index in group) == list(range(len(part)))
        assert len(groups) == 2
        for group in groups:
            assert len({tuple(part[index]["image"].shape) for index in group}) == 1
        assert torch.equal(part.caption_counts, everything.caption_counts[part.indices])
    assert_same(trained[3], everything[trained.indices[3]])
    assert trained.null_condition.keys() == everything.null_condition.keys()
    batch = next(iter(load_batches(trained, 4, 0, 1, 0, 0)))  # asks for items with numbers of captions
    assert batch["image"].shape[0] == 4


def test_a_cache_from_before_there_were_keys(cached, tmp_path):
    data, model, directory = cached
    shutil.copytree(directory, tmp_path / "cache")
    index = tmp_path / "cache" / "index.safetensors"
    kept = {name: value for name, value in load_file(index).items() if name != "key"}
    save_file(kept, index, {"lengths": json.dumps({"encoder_hidden_states": 7})})
    with pytest.raises(UserError, match=r"does not know which images are held out: delete its 'index\.safetensors'"):
        load_training_data(model, data, str(tmp_path / "cache"))
    index.unlink()
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    again = load_training_data(model, data, str(tmp_path / "cache"))
    assert again.held_out.indices == load_training_data(model, data, str(directory)).held_out.indices
    latents = tmp_path / "cache" / "latents-00000.safetensors"
    assert latents.stat().st_mtime_ns == written[latents.name], "nothing is encoded again"


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (1.0, "must be a share"),
        (-0.1, "must be from 0 to 1"),
        (1e-9, "holds out 0 of 40"),
        (0.9999, "holds out 40 of 40"),
    ],
)
def test_shares_that_cannot_be(folder, share, message):
    with pytest.raises(UserError, match=message):
        load_training_data("", config(folder, held_out=share))


def test_bundled_data_have_their_own(folder):
    data = DataConfig(source="digits", held_out=0.5)
    trained = load_training_data("", data)
    assert torch.equal(trained.images, load_dataset(DataConfig()).images), "nothing is taken from it"
    assert torch.equal(load_held_out(data, trained).images, load_dataset(data, "held_out").images)
    with pytest.raises(UserError, match=r"are trained on: hold some out, as by data\.held_out=0\.02"):
        load_held_out(config(folder, held_out=0.0), load_training_data("", config(folder, held_out=0.0)))


def test_analyze_shows_the_loss_on_held_out_images_beside(cached, tmp_path):
    data, model, directory = cached
    given = [f"--model={model}", f"--cache={directory}", f"--output_dir={tmp_path}", "--gradients=false"]
    given += [*options("data", {"source": data.source, "image_size": 32, "crop": "buckets", "bucket_step": 16})]
    given += ["--data.held_out=0.3", "--timesteps=2", "--samples=2"]
    assert main(["analyze", *given]) == 0
    losses = json.loads((tmp_path / "analysis.json").read_text())["losses"]
    assert losses["held-out images"]["base"]["loss"]["mean"] != losses["training images"]["base"]["loss"]["mean"]

"""Masks of images: where they are found, that they are cropped and mirrored as their image, and what they weigh."""

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.cli import main
from stagepatch.core import UserError
from stagepatch.data import (
    CachedLatents,
    DataConfig,
    FolderSource,
    ImageDataset,
    decode_once,
    load_training_data,
    make_cache,
    normalized,
    open_source,
)
from stagepatch.training import Conditions, TrainingConfig, draw, load_batches
from stagepatch.training.losses import sample_losses
from tests.data.reading import load
from tests.runs import config_of, log_of, make_model, make_objective, run
from tests.tiny_pipelines import PIPELINES


def half_white(size=(16, 16), left=0):
    """A mask that is white on one side."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, 0, left + size[0] // 2, size[1]))
    return mask


@pytest.fixture
def folder(tmp_path):
    """Three images, of which two have masks beside them."""
    directory = tmp_path / "images"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(directory / f"{name}.png")
    half_white().save(directory / "a-masklabel.png")
    Image.new("L", (16, 16), 128).save(directory / "b-masklabel.png")
    return directory


def of_items(dataset):
    return [dataset[index]["mask"] for index in range(len(dataset))]


def test_masks_beside_images_are_no_images(folder):
    for dataset in (load(folder, image_size=16), decode_once([load(folder, image_size=16, channels=3)])[0]):
        left, grey, none = of_items(dataset)
        assert torch.equal(left, torch.cat([torch.ones(1, 16, 8), torch.zeros(1, 16, 8)], dim=2))
        torch.testing.assert_close(grey, torch.full((1, 16, 16), 128 / 255))
        assert torch.equal(none, torch.ones(1, 16, 16))


def test_masks_in_a_folder_of_their_own(folder, tmp_path):
    for masks in (folder / "masks", tmp_path / "elsewhere"):
        masks.mkdir()
        for name in "ab":
            (folder / f"{name}-masklabel.png").replace(masks / f"{name}.png")
        source = FolderSource(folder, masks=str(masks))
        assert [source.mask(index) for index in range(3)] == [masks / "a.png", masks / "b.png", None]
        assert set(source.labels) == {0}
        for name in "ab":
            (masks / f"{name}.png").replace(folder / f"{name}-masklabel.png")
        with pytest.raises(UserError, match=r"No mask in data\.masks="):
            FolderSource(folder, masks=str(masks))


def test_caches_and_stamps_go_by_the_mask_of_an_image_that_has_one(folder):
    first = FolderSource(folder).stamp()
    half_white(left=4).save(folder / "a-masklabel.png")
    assert [one == other for one, other in zip(FolderSource(folder).stamp(), first, strict=True)] == [
        False,
        True,
        True,
    ]
    assert ":mask:" not in first[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d-masklabel.png", half_white(), "is the mask of no image beside it"),
        ("a-masklabel.png", half_white((16, 8)), r"is 16×8 pixels, and its image 16×16"),
        ("a-masklabel.png", b"nonsense", "Cannot read the mask '.*a-masklabel.png'"),
    ],
)
def test_masks_that_fit_no_image_are_refused(folder, name, content, message):
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        content.save(folder / name)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_a_mask_is_cropped_as_its_image(tmp_path):
    for size, choices in (((48, 32), {"image_size": 16}), ((64, 32), {"crop": "buckets", "bucket_step": 8})):
        picture_of = half_white(size, left=size[0] // 2)
        picture_of.save(tmp_path / "a.png")
        picture_of.save(tmp_path / "a-masklabel.png")
        item = load(tmp_path, **{"image_size": 16, **choices})[0]
        assert item["mask"].shape == item["image"].shape
        torch.testing.assert_close(item["mask"], (item["image"] + 1) / 2)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_loss_is_the_mean_over_what_counts(learn_sigma):
    """Against the errors of each place, averaged by hand."""
    model, objective = make_model(learn_sigma=learn_sigma), make_objective(learn_sigma)
    x_start, noise = torch.randn(2, 3, 1, 8, 8).unbind(0)
    timesteps = torch.tensor([0, 500, 900])
    with torch.no_grad():
        x_t = objective.add_noise(x_start, noise, timesteps)
        output = model(x_t, timesteps, torch.zeros(3, dtype=torch.long)).sample
    masks = torch.zeros(3, 1, 8, 8)
    masks[0, :, :4], masks[1, :, 2, 3], masks[1, :, 5, 5] = 1.0, 1.0, 0.5
    found = objective.loss(output, x_start, noise, timesteps, normalized(masks))
    errors = (output[:, :1] - noise) ** 2
    expected = torch.stack([errors[0, :, :4].mean(), (errors[1, 0, 2, 3] + 0.5 * errors[1, 0, 5, 5]) / 1.5])
    if learn_sigma:  # the bound of the places alone, as of a smaller image
        rows = [tensor[:1, :, :4] for tensor in (output, x_start, noise)]
        expected = torch.stack([objective.loss(*rows, timesteps[:1])[0]])
    torch.testing.assert_close(found[: len(expected)], expected)
    assert found[2] == 0.0  # nothing counts
    white = objective.loss(output, x_start, noise, timesteps, normalized(torch.ones_like(masks)))
    torch.testing.assert_close(white, objective.loss(output, x_start, noise, timesteps))


class Masked(ImageDataset):
    """Images of which the left half counts."""

    def __getitem__(self, index):
        mask = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], dim=2)
        return super().__getitem__(index) | {"mask": mask}


def test_a_mask_is_mirrored_with_its_image():
    images = torch.rand(8, 1, 8, 8) + torch.tensor([2.0] * 4 + [-3.0] * 4)  # positive where it counts
    dataset, objective, model = Masked(images, torch.zeros(8, dtype=torch.long)), make_objective(), make_model()
    config, conditions = TrainingConfig(batch_size=8), Conditions(model, dataset)
    (batch,) = load_batches(dataset, 8, 0, 1, 0, 0)
    drawn = draw(batch, config, objective, conditions, 0, True, torch.device("cpu"))
    sides = drawn.weights[:, 0, 0, 0]
    assert set(sides.tolist()) == {0.0, 2.0}  # some are mirrored, some are not; means are 1
    assert torch.equal(drawn.weights, 2.0 * (drawn.x_start > 0))
    losses = sample_losses(model, objective, drawn)
    drawn.weights = None
    assert not torch.equal(sample_losses(model, objective, drawn), losses)


def test_training_minimises_the_masked_loss(tmp_path):
    dataset = Masked(torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))
    model, objective, config = make_model(), make_objective(), config_of(steps=1, gradient_accumulation_steps=2)
    (batch,) = load_batches(dataset, 8, 0, 1, 0, 0)
    drawn = draw(batch, config, objective, Conditions(model, dataset), 0, False, torch.device("cpu"))
    expected = sample_losses(model, objective, drawn).mean().item()
    run(tmp_path, dataset=dataset, steps=1, gradient_accumulation_steps=2)  # its patch adds nothing yet
    assert log_of(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_cache_has_masks_on_the_latents_grid(tmp_path, folder):
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "sd")
    data = DataConfig(str(folder), image_size=16)
    make_cache(tmp_path / "cache", str(tmp_path / "sd"), data, 2)
    cached = CachedLatents(tmp_path / "cache")
    left, grey, none = of_items(cached)
    size = cached[0]["image"].shape[1:]
    assert left.shape == (1, *size)
    assert size[1] < 16
    assert (left[..., : size[1] // 2] == 1).all()
    assert (left[..., size[1] // 2 :] == 0).all()
    torch.testing.assert_close(grey.float(), torch.full((1, *size), 128 / 255), rtol=1e-3, atol=0)
    assert (none == 1).all()


def test_masks_are_for_folders(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"data\.masks='masks' is for a folder of images"):
        load(tmp_path / "a.npy", masks="masks")
    with pytest.raises(UserError, match=r"data\.masks='masks' is for images"):
        open_source(DataConfig(str(tmp_path), masks="masks", num_frames=5))


def test_ddo_is_refused(tmp_path, folder, capsys):
    given = ["--model=fashion", f"--data.source={folder}", "--data.image_size=16", f"--output_dir={tmp_path / 'run'}"]
    assert main(["train", *given, "--objective=ddo"]) == 2
    assert "which have no masks" in capsys.readouterr().err
    assert "mask" in load_training_data("", DataConfig(str(folder), image_size=16))[0]

"""What goes wrong stops with a message, and what was saved before stays good."""

import errno
import itertools
import os
import stat

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stagepatch.checkpoints import save_denoiser
from stagepatch.cli import main
from stagepatch.core.errors import UserError
from stagepatch.data import ImageDataset
from stagepatch.methods import DMP
from stagepatch.patch import PatchConfig
from stagepatch.training.log import read_log
from tests.runs import (
    TRAINING,
    assert_same,
    iteration_of,
    log_of,
    make_dataset,
    make_model,
    make_objective,
    options,
    patch_of,
    run,
)
from tests.training.test_train_on_pipelines import draw_images


class BrokenFrom(ImageDataset):
    """Images that hold a NaN once so many have been read."""

    def __init__(self, good):
        whole = make_dataset()
        super().__init__(whole.images, whole.labels)
        self.good = good

    def __getitem__(self, index):
        self.good -= 1
        item = super().__getitem__(index)
        return item if self.good >= 0 else {**item, "image": item["image"] * torch.nan}


def assert_good(path):
    tensors = load_file(path)
    assert tensors
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(1, 2), (5, 2), (100, 2), (2, 1), (3, 4)])
def test_nan_in_the_data_stops_with_the_last_good_checkpoint(tmp_path, log_every, checkpoint_every):
    # Iterations 0 to 4 are good.
    choices = {"steps": 20, "ema_decay": 0.5, "log_every": log_every, "checkpoint_every": checkpoint_every}
    with pytest.raises(UserError, match=r"loss is nan .*last good checkpoint is '.*checkpoint\.safetensors'"):
        run(tmp_path, dataset=BrokenFrom(5 * 8), **choices)
    assert_good(tmp_path / "checkpoint.safetensors")
    assert iteration_of(tmp_path) == 5 // checkpoint_every * checkpoint_every
    assert not (tmp_path / "model.safetensors").exists()
    assert all(record["loss"] == record["loss"] for record in log_of(tmp_path))
    # With the data repaired, the run goes on to where a good one ends.
    run(tmp_path, **choices)
    run(tmp_path / "good", **choices)
    assert_same(patch_of(tmp_path), patch_of(tmp_path / "good"))


def test_nan_before_the_first_checkpoint(tmp_path):
    with pytest.raises(UserError, match="loss is nan near iteration 1; no checkpoint"):
        run(tmp_path, dataset=BrokenFrom(0))
    assert not list(tmp_path.glob("*.safetensors"))


def test_rate_that_is_far_too_high_saves_nothing_that_is_not_finite(tmp_path):
    with pytest.raises(UserError, match="learning_rate"):
        run(tmp_path, learning_rate=1e30, checkpoint_every=1, log_every=4)
    for path in tmp_path.rglob("*.safetensors"):
        assert_good(path)


@pytest.mark.parametrize("iteration", [3, TRAINING["steps"]])
def test_gradient_that_is_not_finite_under_a_finite_loss_is_not_saved(tmp_path, iteration):
    # The loss of that iteration is finite; the step that it asks for is not.
    method, counted = DMP(PatchConfig()), itertools.count(1)
    extra = method.extra_loss

    def extra_loss():
        loss, logged = extra()
        if next(counted) == iteration:
            loss.register_hook(lambda gradient: gradient * torch.nan)
        return loss, logged

    method.extra_loss = extra_loss
    with pytest.raises(UserError, match=f"iteration {iteration}"):
        run(tmp_path, method=method, checkpoint_every=1)
    assert_good(tmp_path / "checkpoint.safetensors")
    assert iteration_of(tmp_path) == iteration - 1
    assert not (tmp_path / "model.safetensors").exists()


def test_full_disk_keeps_the_former_checkpoint(tmp_path, monkeypatch):
    fsync, counted = os.fsync, itertools.count(1)

    def flush_or_fail(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and next(counted) > 2:  # the log's first lines, one checkpoint
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", flush_or_fail)
        with pytest.raises(UserError, match=r"Cannot write '.*checkpoint\.safetensors': No space left on device"):
            run(tmp_path, checkpoint_every=2, ema_decay=0.5)
    assert iteration_of(tmp_path) == 2
    assert not list(tmp_path.glob(".checkpoint*"))
    run(tmp_path, checkpoint_every=2, ema_decay=0.5)
    run(tmp_path / "good", checkpoint_every=2, ema_decay=0.5)
    assert_same(patch_of(tmp_path), patch_of(tmp_path / "good"))


def test_log_cut_short_is_read_to_its_last_whole_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n{"iteration": 2, "lo')
    assert read_log(tmp_path) == [{"iteration": 1, "loss": 2.0}]
    assert read_log(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"batch_size": 7, "gradient_accumulation_steps": 2}, "batch_size=7 does not divide by 1 processes × "),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"log_every": 0}, "log_every=0 must be at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"snapshot_every": -1}, "snapshot_every=-1 must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be at least 0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be at least 0"),
        ({"label_dropout": 1.5}, "label_dropout=1.5 must be from 0 to 1"),
        ({"ema_decay": 1.5}, "ema_decay=1.5 must be from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, choices, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, **choices)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_the_model_does_not_know(tmp_path):
    with pytest.raises(UserError, match=r"label 9, .* 5 classes"):
        run(tmp_path, model=make_model(num_classes=5), batch_size=30)


def test_images_of_other_channels(tmp_path):
    colour = ImageDataset(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))
    with pytest.raises(UserError, match=r"expected \[B, 1, H, W\]"):
        run(tmp_path, dataset=colour)


def test_images_of_another_size_are_taken(tmp_path):
    run(tmp_path, dataset=ImageDataset(torch.zeros(8, 1, 16, 16), torch.zeros(8, dtype=torch.long)))


@pytest.fixture
def grey(tmp_path):
    """Grey images, and a model of one channel."""
    images = draw_images(tmp_path / "images", size=(8, 8), captions=False)
    for path in images.glob("*.png"):
        Image.open(path).convert("L").save(path)
    save_denoiser(make_model(), make_objective().scheduler, tmp_path / "model")
    training = {"steps": 1, "batch_size": 2, "tensorboard": False}
    given = [f"--data.source={images}", "--data.image_size=8", f"--model={tmp_path / 'model'}"]
    return given + options("training", training)


def test_images_have_the_channels_that_the_model_takes(grey, tmp_path, capsys):
    assert main(["train", *grey, f"--output_dir={tmp_path / 'run'}"]) == 0
    assert main(["train", *grey, "--data.channels=1", f"--output_dir={tmp_path / 'run'}"]) == 0  # the same run
    capsys.readouterr()
    assert main(["train", *grey, "--data.channels=3", f"--output_dir={tmp_path / 'other'}"]) == 2
    assert "data.channels=3, but the model takes 1: leave it out." in capsys.readouterr().err
    assert main(["decouple", *grey, "--num_stages=2", "--stage=0", f"--output_dir={tmp_path / 'stages'}"]) == 0


def test_images_and_models_that_do_not_fit_are_refused_in_words(grey, tmp_path, capsys):
    wide = make_model(in_channels=4)
    save_denoiser(wide, make_objective().scheduler, tmp_path / "latent")
    given = [option for option in grey if not option.startswith("--model")] + [f"--output_dir={tmp_path / 'run'}"]
    for command in ("train", "evaluate"):
        options = [option for option in given if command == "train" or not option.startswith("--training")]
        assert main([command, *options, f"--model={tmp_path / 'latent'}"]) == 2
        assert "takes 4 channels, which are no image's" in capsys.readouterr().err
    save_denoiser(make_model(in_channels=3), make_objective().scheduler, tmp_path / "colour")
    few = ["--training.steps=1", "--training.tensorboard=false", f"--output_dir={tmp_path / 'digits'}"]
    assert main(["train", f"--model={tmp_path / 'colour'}", *few]) == 2
    assert "The images of 'digits' have 1 channel(s), but the model takes 3" in capsys.readouterr().err

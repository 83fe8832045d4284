"""Pictures while a run trains."""

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch import Patch, load_denoiser, open_artifact
from stagepatch.cli import main
from stagepatch.core.errors import UserError
from stagepatch.report import paired_grid
from stagepatch.sampling import SamplingConfig, balanced_labels, generate
from stagepatch.training import Run, TrainConfig, TrainingConfig, ValidationConfig
from tests.runs import patch_of
from tests.tiny_pipelines import PIPELINES

SAMPLING = SamplingConfig(num_images=8, num_inference_steps=3)


def config(directory, every=2, method="dmp", **training):
    rate = 1e-3 if method == "finetune" else 0.3
    settings = {"steps": 5, "batch_size": 8, "learning_rate": rate, "tensorboard": False, **training}
    return TrainConfig(
        output_dir=str(directory),
        method=method,
        training=TrainingConfig(**settings),
        validation=ValidationConfig(every=every, sampling=SAMPLING),
    )


def picture(directory, done):
    return np.asarray(Image.open(directory / "validation" / f"{done:07d}.png"))


@pytest.mark.parametrize("method", ["dmp", "lora", "finetune"])
@pytest.mark.parametrize("training", [{}, {"ema_decay": 0.6}], ids=str)
def test_pictures_are_of_the_base_and_of_what_is_learned_and_change_nothing(tmp_path, method, training):
    for every in (0, 2):
        Run(config(tmp_path / str(every), every, method, **training)).train(progress=False)
    assert not (tmp_path / "0" / "validation").exists()
    directory = tmp_path / "2"
    assert sorted(path.name for path in (directory / "validation").iterdir()) == [f"000000{n}.png" for n in (2, 4, 5)]
    weights = [path for path in directory.glob("*.safetensors") if path.name != "checkpoint.safetensors"]
    assert weights
    assert all(path.read_bytes() == (tmp_path / "0" / path.name).read_bytes() for path in weights), "bit for bit"
    model, scheduler = load_denoiser("digits")
    labels = balanced_labels(model, 8)
    base = generate(model, scheduler, SAMPLING, labels)
    open_artifact(directory).put_on(model)
    learned = generate(model, scheduler, SAMPLING, labels)
    assert not torch.allclose(learned, base, atol=1e-2)
    expected = np.asarray(paired_grid(base, learned, 4)).astype(int)
    assert np.abs(picture(directory, 5).astype(int) - expected).max() <= 1
    assert not np.array_equal(picture(directory, 2), picture(directory, 5))


def test_a_run_that_goes_on_shows_the_same_base(tmp_path):
    Run(config(tmp_path / "whole")).train(progress=False)
    run = Run(config(tmp_path / "stopped"))
    save = run.method.save
    run.method.save = lambda directory: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run.train(progress=False)
    run.method.save = save
    Run(config(tmp_path / "stopped")).train(progress=False)
    for done in (2, 4, 5):
        assert np.array_equal(picture(tmp_path / "stopped", done), picture(tmp_path / "whole", done))
    own, theirs = patch_of(tmp_path / "stopped"), patch_of(tmp_path / "whole")
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SD3Transformer2DModel"])
def test_prompts_of_a_text_model(tmp_path, name, capsys):
    tiny = PIPELINES[name]
    tiny.build().save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), (200, 40, 90)).save(tmp_path / "images" / "one.png")
    (tmp_path / "images" / "one.txt").write_text("a red square")
    given = [f"--model={tmp_path / 'model'}", f"--data.source={tmp_path / 'images'}", "--data.image_size=32"]
    given += [
        "--training.steps=2",
        "--training.batch_size=1",
        "--validation.every=1",
        f"--output_dir={tmp_path / 'out'}",
    ]
    given += ["--validation.sampling.num_images=2", "--validation.sampling.num_inference_steps=2"]
    assert main(["train", *given]) == 2
    assert "give --validation.prompts" in capsys.readouterr().err
    assert main(["train", *given, "--validation.prompts=['a cat']", "--validation.sampling.guidance_scale=2"]) == 0
    assert picture(tmp_path / "out", 1).shape == picture(tmp_path / "out", 2).shape
    assert Patch.from_pretrained(tmp_path / "out")


def test_a_negative_number_of_steps_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"validation\.every=-1 must be at least 0"):
        Run(config(tmp_path, every=-1)).train(progress=False)

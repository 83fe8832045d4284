"""What a script needs is at the top."""

import diffusers
import pytest
import torch

import stagepatch as sp
from stagepatch import UserError, load_denoiser, open_artifact
from stagepatch.checkpoints import save_denoiser
from tests.runs import make_model


def test_every_name_is_there():
    for name in sp.__all__:
        assert getattr(sp, name) is not None


def test_a_run_in_three_lines_and_what_it_made(tmp_path):
    training = sp.TrainingConfig(steps=2, batch_size=4, tensorboard=False)
    patch = sp.PatchConfig(sites="first")
    run = sp.Run(sp.TrainConfig(output_dir=str(tmp_path / "run"), patch=patch, training=training))
    patch = run.train().patch
    assert (tmp_path / "run" / "run.yaml").exists()
    artifact = open_artifact(tmp_path / "run")
    assert artifact.kind == "patch"
    model, scheduler = load_denoiser("digits")
    loaded = artifact.put_on(model).patch
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(patch.prompts, loaded.prompts, strict=True))
    images = sp.generate(model, scheduler, sp.SamplingConfig(num_images=60, num_inference_steps=2))
    evaluator = sp.Evaluator.load("digits", sp.DataConfig(), "digits", tmp_path)
    assert sp.evaluate(images, evaluator.references, evaluator.extractor)["fid_train"] > 0
    with pytest.raises(UserError, match="does not hold a model, but a patch"):
        open_artifact(tmp_path / "run", "model")


def test_two_models_are_merged(tmp_path):
    models = [make_model(seed) for seed in range(3)]
    for name, model in zip("abc", models, strict=True):
        save_denoiser(model, diffusers.DDPMScheduler(), tmp_path / name)
    sp.merge([tmp_path / "b", tmp_path / "c"], [0.5, 0.25], tmp_path / "merged", base=str(tmp_path / "a"))
    base, first, second = (model.state_dict()["blocks.0.attn.qkv.weight"] for model in models)
    merged = load_denoiser(tmp_path / "merged")[0].state_dict()["blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(merged, base + 0.5 * (first - base) + 0.25 * (second - base))


@pytest.mark.parametrize(
    ("files", "kind", "words"),
    [
        (["plan.json"], "unfinished cache", "goes on where it stopped"),
        (["checkpoint.safetensors"], "unfinished run", "goes on where it stopped"),
        (["pytorch_lora_weights.safetensors"], "part of a LoRA", "was killed while it was written"),
        (["model.safetensors"], "part of a patch", "was killed while it was written"),
        (["transformer/config.json"], "part of a model", "was killed while it was written"),
        (["stages/0/x"], "stages", "stages of timesteps"),
    ],
)
def test_what_is_half_there_is_recognised_and_said_so(tmp_path, files, kind, words):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    artifact = open_artifact(tmp_path)
    assert artifact.kind == kind
    with pytest.raises(UserError, match=words):
        artifact.put_on(make_model())


def test_files_are_told_apart(tmp_path):
    (tmp_path / "experts.yaml").write_text("experts: []")
    (tmp_path / "notes.yaml").write_text("x: 1")
    assert open_artifact(tmp_path / "experts.yaml").kind == "experts"
    with pytest.raises(UserError, match="is no file of experts"):
        open_artifact(tmp_path / "notes.yaml")
    assert sp.LoRAConfig().rank == 8

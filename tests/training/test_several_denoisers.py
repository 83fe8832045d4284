"""A model whose makers split it by noise level (Wan 2.2 of 14B): trained, saved and sampled as one."""

import json

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file

from stagepatch import Patch, load_denoiser, open_artifact
from stagepatch.checkpoints import denoiser_ranges
from stagepatch.cli import main
from stagepatch.core.errors import UserError
from stagepatch.training import Run, TrainConfig
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES, PROMPT

WAN = PIPELINES["WanTransformer3DModel"]
BOUNDARY = 0.875
CALL = {"height": 32, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wan22")
    parts = dict(WAN.build().components)
    parts["transformer_2"] = FAMILIES[WAN.family].model(7)
    WanPipeline(**parts, boundary_ratio=BOUNDARY).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 200 - 40 * number, 90)).save(directory / f"{number}.png")
    rows = [json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) for number in range(4)]
    (directory / "metadata.jsonl").write_text("\n".join(rows))
    return directory


def command(model, pictures, output, *more):
    data = [f"--data.source={pictures}", "--data.image_size=32", "--data.crop=center"]
    size = [
        "--patch.sample_size=[1,8,8]",
        "--training.batch_size=2",
        "--training.steps=3",
        "--training.learning_rate=0.5",
    ]
    return ["train", f"--model={model}", *data, *size, f"--output_dir={output}", *more]


@pytest.fixture(scope="module")
def trained(model, pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("both")
    assert main(command(model, pictures, output)) == 0
    return output


def test_each_denoiser_has_its_noise_levels(model):
    assert denoiser_ranges(model) == {"transformer_2": (0.0, BOUNDARY), "transformer": (BOUNDARY, 1.0)}
    assert denoiser_ranges("digits") == {"transformer": (0.0, 1.0)}
    with pytest.raises(UserError, match=r"several denoisers, transformer_2 \(noise 0 to 0.875\) and transformer"):
        load_denoiser(model)
    with pytest.raises(UserError, match="component='unet' is no denoiser"):
        load_denoiser(model, component="unet")
    second, _ = load_denoiser(model, component="transformer_2")
    assert torch.equal(second.patch_embedding.weight, FAMILIES[WAN.family].model(7).patch_embedding.weight)


@pytest.mark.parametrize(
    ("component", "low", "high"), [("transformer_2", 0.0, BOUNDARY), ("transformer", BOUNDARY, 1.0)]
)
def test_each_learns_in_its_own_range_as_the_pipeline_dispatches(model, pictures, tmp_path, component, low, high):
    """The pipeline goes by the timestep that the model is told: shifted, as its scheduler has it."""
    config = TrainConfig(model=str(model), component=component, output_dir=str(tmp_path))
    config.data.source, config.data.image_size, config.patch.sample_size = str(pictures), 32, [1, 8, 8]
    run = Run(config)
    told = run.objective.model_timesteps(run.objective.draw_timesteps(4000, torch.Generator().manual_seed(0))) / 1000
    assert low - 1e-6 <= float(told.min()) <= low + 0.02
    assert high - 0.02 <= float(told.max()) <= high
    config.timesteps.range = [0.0, 0.1] if low else [0.9, 1.0]
    with pytest.raises(UserError, match=f"has nothing of '{component}'"):
        Run(config)
    config.timesteps.range, config.validation.every = [0.0, 1.0], 1
    with pytest.raises(UserError, match="one of them alone makes no samples"):
        Run(config)


def test_one_directory_goes_on_the_pipeline_with_one_call_and_is_what_each_side_is_by_itself(model, trained):
    base = WAN.call(WAN.load(model), steps=4)
    pipe = WAN.load(model)
    put = open_artifact(trained).put_on(pipe)
    assert set(put.methods) == {"transformer", "transformer_2"}
    both = WAN.call(pipe, steps=4)
    by_hand = WAN.load(model)
    for component in ("transformer", "transformer_2"):
        patch = Patch.from_pretrained(trained / "denoisers" / component)
        assert any(bool(prompt.any()) for prompt in patch.prompts), "it has learned"
        patch.attach(by_hand, component=component)
    assert torch.equal(WAN.call(by_hand, steps=4), both)
    assert not torch.allclose(both, base, atol=1e-4)
    one = WAN.load(model)
    open_artifact(trained / "denoisers" / "transformer_2").put_on(one, "transformer_2")
    only = WAN.call(one, steps=4)
    assert not torch.equal(only, both)
    assert not torch.equal(only, base)


def test_another_process_samples_what_this_one_trained(model, trained, tmp_path, processes):
    arguments = [
        "sample",
        f"--model={model}",
        f"--patch={trained}",
        f"--prompts=['{PROMPT}']",
        f"--call={json.dumps(CALL)}",
    ]
    arguments += ["--sampling.num_images=1", "--sampling.num_inference_steps=2", "--sampling.guidance_scale=1.5"]
    processes.call(main, arguments=[*arguments, f"--output_dir={tmp_path}"])
    images = load_file(tmp_path / "samples.safetensors")["images"]
    pipe = WAN.load(model)
    open_artifact(trained).put_on(pipe)
    from stagepatch.sampling import SamplingConfig, generate_with_pipeline

    config = SamplingConfig(num_images=1, num_inference_steps=2, guidance_scale=1.5)
    torch.testing.assert_close(images, generate_with_pipeline(pipe, config, [PROMPT], call=CALL), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="takes no 'frames'"):
        generate_with_pipeline(pipe, config, [PROMPT], call={"frames": 1})


def test_a_killed_training_of_both_goes_on_and_ends_alike(model, pictures, trained, tmp_path):
    """The first side is done, the second has not begun."""
    first = command(model, pictures, tmp_path / "denoisers" / "transformer_2", "--component=transformer_2")
    assert main([*first, f"--cache={tmp_path / 'cache'}"]) == 0
    assert open_artifact(tmp_path / "denoisers" / "transformer_2").kind == "patch"
    assert main(command(model, pictures, tmp_path)) == 0
    for component in ("transformer", "transformer_2"):
        own, theirs = (load_file(at / "denoisers" / component / "model.safetensors") for at in (tmp_path, trained))
        assert all(torch.equal(value, theirs[name]) for name, value in own.items())


def test_a_patch_of_both_is_refused_by_one_model_and_one_of_one_must_be_told_where(model, trained):
    side, _ = load_denoiser(model, component="transformer")
    with pytest.raises(UserError, match="give the pipeline, not one model"):
        open_artifact(trained).put_on(side)
    with pytest.raises(UserError, match="several denoisers, transformer, transformer_2"):
        open_artifact(trained / "denoisers" / "transformer").put_on(WAN.load(model))

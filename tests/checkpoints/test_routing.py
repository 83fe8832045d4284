"""Routed channels: windows by hand, blocks written out, and a model that cannot be loaded without its routing."""

import copy

import diffusers
import pytest
import torch

from stagepatch.checkpoints import (
    add_projections,
    add_routing,
    load_denoiser,
    load_pipeline,
    routing_windows,
    save_denoiser,
)
from stagepatch.cli import main
from stagepatch.core import read_tensors, write_tensors
from stagepatch.core.errors import UserError
from stagepatch.merging import merge_models
from stagepatch.patch import Patch, PatchConfig
from tests.runs import MODEL, make_model, options
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES


@pytest.mark.parametrize(
    ("channels", "steps", "share", "shift", "expected"),
    [
        # Of 10 channels 4 are active; 6 · (0, 1/4, 1/2, 3/4, 1) = 0, 1.5, 3, 4.5, 6, and halves go to the even.
        (10, 5, 0.4, 1.0, [(0, 4), (2, 6), (3, 7), (4, 8), (6, 10)]),
        # 6 · (0, 1/256, 1/16, 81/256, 1) = 0, 0.02, 0.375, 1.9, 6
        (10, 5, 0.4, 4.0, [(0, 4), (0, 4), (0, 4), (2, 6), (6, 10)]),
        (7, 3, 0.5, 2.0, [(0, 3), (1, 4), (4, 7)]),  # 3.5 channels are 3
        (7, 3, 1.0, 4.0, [(0, 7)] * 3),
    ],
)
def test_windows_by_hand(channels, steps, share, shift, expected):
    assert [tuple(window) for window in routing_windows(channels, steps, share, shift).tolist()] == expected


def test_windows_of_the_papers_dit():
    windows = routing_windows(1024, 1000, 0.8, 4.0)
    assert (windows[:, 1] - windows[:, 0]).unique().tolist() == [819]
    assert windows[[0, 500, 999], 0].tolist() == [0, round(205 * (500 / 999) ** 4), 205]


def inputs(batch=3):
    sample = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return sample, torch.tensor([0, 640, 999])[:batch], torch.tensor([1, 2, 10])[:batch]


def test_blocks_are_those_written_out():
    model = make_model()
    routed = copy.deepcopy(model)
    add_routing(routed, 0.5, 2.0)
    sample, timesteps, labels = inputs()
    # 8 of 16 channels, from round(8 · (t / 999)²) on: 0, 3 and 8.
    mask = torch.zeros(3, 1, 16)
    mask[0, :, 0:8] = mask[1, :, 3:11] = mask[2, :, 8:16] = 1.0
    hidden_states = model.x_embedder(sample) + model.positions
    conditioning = model.t_embedder(timesteps) + model.y_embedder(labels)
    for block in model.blocks:
        hidden_states = block(hidden_states * mask, conditioning, (4, 4)) + hidden_states * (1.0 - mask)
    expected = model._unpatchify(model.final_layer(hidden_states, conditioning), (4, 4))
    found = routed(sample, timesteps, labels).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, model(sample, timesteps, labels).sample, rtol=1e-2)
    one = routed(sample[1:2], 640, labels[1:2]).sample  # one number for all
    torch.testing.assert_close(one, expected[1:2], rtol=1e-5, atol=1e-6)
    routed.enable_gradient_checkpointing()
    again = routed(sample, timesteps, labels).sample
    again.square().mean().backward()
    expected.square().mean().backward()
    for own, other in zip(routed.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["DiT", "DiTTransformer2DModel", "PixArtTransformer2DModel"])
def test_all_channels_are_the_model_bit_for_bit(name):
    family = FAMILIES[name]
    model = family.model()
    base = family.call(model)
    routed = copy.deepcopy(model)
    add_routing(model, 1.0)
    assert torch.equal(family.call(model), base)
    add_routing(routed, 0.5)
    assert not torch.allclose(family.call(routed), base, rtol=1e-2)


def test_saved_copied_and_loaded_in_any_precision_it_stays(tmp_path):
    model = make_model()
    add_routing(model, 0.55, 1.5)
    copied = copy.deepcopy(model)
    sample, timesteps, labels = inputs()
    expected = model(sample, timesteps, labels).sample
    save_denoiser(model, diffusers.DDPMScheduler(), tmp_path / "model")
    loaded, _ = load_denoiser(tmp_path / "model")
    half, _ = load_denoiser(tmp_path / "model", torch.bfloat16)
    assert torch.equal(loaded(sample, timesteps, labels).sample, expected)
    assert torch.equal(half.stagepatch_routing.windows, model.stagepatch_routing.windows)
    assert half(sample.bfloat16(), timesteps, labels).sample.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in loaded.parameters()) == sum(
        p.numel() for p in make_model().parameters()
    )
    # A copy has its own windows.
    model.stagepatch_routing.windows.zero_()
    assert torch.equal(copied(sample, timesteps, labels).sample, expected)
    assert not torch.allclose(model(sample, timesteps, labels).sample, expected)
    merge_models(tmp_path / "model", [tmp_path / "model"], [0.5], tmp_path / "merged")
    merged, _ = load_denoiser(tmp_path / "merged")
    torch.testing.assert_close(merged(sample, timesteps, labels).sample, expected)
    save_denoiser(make_model(), diffusers.DDPMScheduler(), tmp_path / "plain")
    with pytest.raises(UserError, match="another architecture"):
        merge_models(tmp_path / "model", [tmp_path / "plain"], [0.5], tmp_path / "both")


@pytest.mark.parametrize("choices", [{}, {"position": "prepend", "prepending": "plain", "gate": "none"}])
def test_a_patch_and_a_projection_work_on_what_goes_into_the_routed_block(choices):
    model = make_model()
    sample, timesteps, labels = inputs()
    before, after = copy.deepcopy(model), model
    # All at once, and with the routing put on last: in either order the same.
    for one, first in ((before, True), (after, False)):
        if first:
            add_routing(one, 0.5, 2.0)
        with torch.no_grad():
            for weight in add_projections(one).maps.values():
                weight.mul_(1.5)
        patch = Patch.create(one, PatchConfig(**choices))
        with torch.no_grad():
            for number, prompt in enumerate(patch.prompts):
                prompt.normal_(generator=torch.Generator().manual_seed(number))
        patch.attach(one)
        if not first:
            add_routing(one, 0.5, 2.0)
    outputs = [one(sample, timesteps, labels).sample for one in (before, after)]
    assert torch.equal(*outputs)


TINY = ["--training.steps=3", "--training.log_every=1", "--training.tensorboard=false", "--training.batch_size=8"]


def test_model_from_scratch_is_routed_and_so_are_its_samples(tmp_path, capsys):
    command = ["pretrain", f"--output_dir={tmp_path / 'routed'}", *options("model", MODEL), *TINY]
    routing = ["--model.routed_share=0.5", "--model.routing_shift=2"]
    assert main([*command, *routing]) == 0
    assert main([*command, "--model.routed_share=0.5"]) == 2
    assert "model.routing_shift was 2.0, is 4.0" in capsys.readouterr().err
    model, _ = load_denoiser(tmp_path / "routed")
    assert torch.equal(model.stagepatch_routing.windows, routing_windows(16, 1000, 0.5, 2.0))
    # After three steps blocks are still shut: draw what is sampled.
    path = tmp_path / "routed" / "transformer" / "diffusion_pytorch_model.safetensors"
    drawn = {name: value.clone() for name, value in make_model().state_dict().items()}
    images = []
    for windows in ({}, {"stagepatch_routing.windows": routing_windows(16, 1000, 0.5, 2.0)}):
        write_tensors(path, drawn | windows)
        output = tmp_path / f"samples-{len(windows)}"
        few = ["--sampling.num_inference_steps=3", "--sampling.num_images=4"]
        assert main(["sample", f"--model={tmp_path / 'routed'}", f"--output_dir={output}", *few]) == 0
        images.append(read_tensors(output / "samples.safetensors")[0]["images"])
    assert not torch.allclose(*images, rtol=1e-2)


@pytest.mark.parametrize("part", ["routing", "projection"])
def test_pipeline_that_diffusers_saved_is_sampled_with_its_parts(tmp_path, part):
    tiny = PIPELINES["DiTTransformer2DModel"]
    pipe = tiny.build()
    plain = tiny.call(pipe)
    if part == "routing":
        add_routing(pipe.transformer, 0.5)
    else:
        with torch.no_grad():
            for weight in add_projections(pipe.transformer).maps.values():
                weight.mul_(0.5)
    expected = tiny.call(pipe)
    assert not torch.allclose(expected, plain, atol=1e-2)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(tiny.call(load_pipeline(tmp_path)), expected)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UserError, match="save the model again with save_denoiser"):
        load_denoiser(tmp_path)


def test_what_cannot_be_routed(capsys, tmp_path):
    with pytest.raises(UserError, match="blocks of tokens; UNet2DModel has none"):
        add_routing(FAMILIES["UNet2DModel"].model())
    for share, shift in ((0.0, 4.0), (1.2, 4.0), (0.8, 0.0)):
        with pytest.raises(UserError, match="must be above 0"):
            add_routing(make_model(), share, shift)
    with pytest.raises(UserError, match="is none: give more"):
        add_routing(make_model(), 0.01)
    model = make_model()
    add_routing(model)
    with pytest.raises(UserError, match="routed already"):
        add_routing(model)
    family = FAMILIES["SD3Transformer2DModel"]
    model = family.model()
    add_routing(model, 0.5)
    with pytest.raises(UserError, match="it gives back more than hidden states"):
        family.call(model)
    unet = ["--model.block_out_channels=[8,16]", "--model.conditioning=none", "--model.learn_sigma=false"]
    assert main(["pretrain", f"--output_dir={tmp_path}", *unet, "--model.routed_share=0.8"]) == 2
    assert "UNet2DModel has none" in capsys.readouterr().err

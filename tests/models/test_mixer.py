"""`convolved_heads`: a DiT whose blocks convolve some channels and attend with the others, written out, and used."""

import diffusers
import pytest
import torch
from torch.nn import functional as F

from stagepatch.checkpoints import load_denoiser, save_denoiser
from stagepatch.cli import main
from stagepatch.core import UserError, read_json
from stagepatch.methods import LoRA
from stagepatch.models import DiT, check_prunable
from stagepatch.models.attention import Mixer
from stagepatch.patch import Patch, PatchConfig
from tests.runs import draw_weights, make_model, options
from tests.studies.test_decouple import TRAINING, decouple, stage_of

GRID = (3, 5)


def around(maps, fill):
    """The nine neighbours of each place, itself in the middle: [B, C, H, W] to [B, C, 9, H, W]."""
    padded = F.pad(maps, (1, 1, 1, 1), value=fill)
    height, width = maps.shape[2:]
    return torch.stack([padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)], dim=2)


def gelu(values):
    return values * 0.5 * (1 + torch.erf(values / 2**0.5))


@pytest.mark.parametrize("convolved", [1, 2, 3])
def test_a_mixer_is_that_of_iformer_written_out(convolved):
    """Of 4 heads of 4 channels; the equations, and the widths of its released code."""
    mixer = Mixer(16, 4, convolved).double()
    draw_weights(mixer.parameters(), 0.3)
    tokens = torch.randn(2, 15, 16, dtype=torch.float64)
    count, half = 4 * convolved, 2 * convolved
    maps = tokens.transpose(1, 2).reshape(2, 16, *GRID)
    first = torch.einsum("oi,bihw->bohw", mixer.expand.weight[:, :, 0, 0], maps[:, :half])
    first = gelu(torch.einsum("ck,bckhw->bchw", mixer.depthwise.weight.reshape(count, 9), around(first, 0.0)))
    second = around(maps[:, half:count], -torch.inf).amax(dim=2)
    second = torch.einsum("oi,bihw->bohw", mixer.pooled.weight[:, :, 0, 0], second)
    second = gelu(second + mixer.pooled.bias.view(-1, 1, 1))
    low = []
    queries, keys, values = (tokens[..., count:] @ mixer.qkv.weight.T + mixer.qkv.bias).chunk(3, dim=2)
    for head in range(4 - convolved):
        own = slice(4 * head, 4 * head + 4)
        scores = queries[..., own] @ keys[..., own].transpose(1, 2) / 2.0
        low.append(torch.softmax(scores, dim=-1) @ values[..., own])
    attended = torch.cat(low, dim=2).transpose(1, 2).reshape(2, -1, *GRID)
    mixed = torch.cat([first, second, attended], dim=1)
    mixed = mixed + torch.einsum("ck,bckhw->bchw", mixer.fuse.weight.reshape(-1, 9), around(mixed, 0.0))
    expected = mixed.flatten(2).transpose(1, 2) @ mixer.proj.weight.T + mixer.proj.bias
    torch.testing.assert_close(mixer(tokens, GRID), expected)


def mixed_model(**changes):
    return make_model(0, 0.1, **{"hidden_size": 32, "num_attention_heads": 4, "convolved_heads": [3, 0], **changes})


def test_it_is_saved_patched_and_adapted_as_any_dit(tmp_path, batch):
    model = mixed_model().requires_grad_(False)
    base = model(*batch)[0]
    assert model(torch.randn(1, 1, 6, 10), torch.tensor([3]), torch.tensor([1]))[0].shape == (1, 2, 6, 10)
    save_denoiser(model, diffusers.DDPMScheduler(), tmp_path)
    loaded, _ = load_denoiser(tmp_path)
    assert loaded.config.convolved_heads == [3, 0]
    assert torch.equal(loaded(*batch)[0], base)
    with Patch.create(model).attach(model):
        assert torch.equal(model(*batch)[0], base)
    with pytest.raises(UserError, match="sites whose attention is described"):
        Patch.create(model, PatchConfig(position="prepend"))
    plain = Patch.create(model, PatchConfig(position="prepend", prepending="plain"))
    with plain.attach(model), pytest.raises(UserError, match="no prompts can be prepended"):
        model(*batch)
    with pytest.raises(UserError, match="heads all attend"):
        check_prunable(model)
    checkpointed = mixed_model().requires_grad_(True)
    expected = torch.autograd.grad(checkpointed(*batch)[0].square().mean(), checkpointed.blocks[0].mixer.fuse.weight)
    checkpointed.enable_gradient_checkpointing()
    found = torch.autograd.grad(checkpointed(*batch)[0].square().mean(), checkpointed.blocks[0].mixer.fuse.weight)
    assert torch.equal(found[0], expected[0])
    LoRA().prepare(model)
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert {"blocks.0.mixer.qkv", "blocks.0.mixer.proj", "blocks.1.attn.qkv"} <= adapted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convolved_heads": 4}, "must be from 0 to 3"),
        ({"convolved_heads": [1]}, "a list of 2, one for each block"),
        ({"convolved_heads": 1, "attention_head_dim": 4}, "make up hidden_size=32"),
        ({"convolved_heads": 1, "hidden_size": 12}, "an even number of channels"),
    ],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DiT(**{"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "sample_size": 8, **changes})


def test_experts_convolve_near_the_image_and_attend_near_the_noise(tmp_path, capsys):
    """From `pretrain` to `decouple --models`."""
    small = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
    for name, heads in {"near": "[3,2]", "far": "0"}.items():
        of_model = options("model", {**small, "num_classes": 10, "convolved_heads": heads})
        place = [f"--output_dir={tmp_path / name}", "--training.steps=0", "--data.source=digits"]
        assert main(["pretrain", *of_model, *place]) == 0
    models = [str(tmp_path / "near"), str(tmp_path / "far")]
    changes = {"num_stages": 2, "models": models, "p": [0.2, 0.9], "consistency": 0.0, "training": TRAINING}
    assert decouple(tmp_path, tmp_path / "far", **changes) == 0
    near, far = (load_denoiser(stage_of(tmp_path, number))[0] for number in (0, 1))
    assert [block.is_mixed for block in (*near.blocks, *far.blocks)] == [True, True, False, False]
    costs = [read_json(stage_of(tmp_path, number) / "stage.json")["cost"] for number in (0, 1)]
    assert costs[0]["flops"] != costs[1]["flops"]
    unet = ["pretrain", "--model.block_out_channels=[8]", "--model.conditioning=none", "--model.learn_sigma=false"]
    assert main([*unet, "--model.convolved_heads=1", f"--output_dir={tmp_path / 'unet'}"]) == 2
    assert "convolved_heads=1 are a DiT's" in capsys.readouterr().err

"""`prune`: what goes is of least Taylor importance, worked out by hand, and the rest computes as before."""

import diffusers
import pytest
import torch

from stagepatch.checkpoints import add_projections, load_denoiser, save_denoiser
from stagepatch.core import UserError
from stagepatch.models import check_prunable, prune, pruning
from tests.runs import make_model
from tests.studies.test_decouple import small_unet

HEADS, WIDTH, HIDDEN = 4, 32, 128
HEAD = WIDTH // HEADS


def with_gradients(**changes):
    """A DiT, the arguments of a forward, and gradients of some loss of it."""
    model = make_model(0, 0.1, **{"hidden_size": WIDTH, "num_attention_heads": HEADS, **changes}).eval()
    generator = torch.Generator().manual_seed(1)
    arguments = [torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([3, 500, 900])]
    if model.config.conditioning == "class":
        arguments.append(torch.tensor([1, 2, 10]))
    model.requires_grad_(True)
    model(*arguments)[0].square().mean().backward()
    return model, arguments


def zeroed(model, heads, channels):
    """The model, of whose every block only so many heads and hidden channels have a say: those of most importance."""
    other = make_model(**{name: value for name, value in model.config.items() if not name.startswith("_")}).eval()
    other.load_state_dict(model.state_dict())
    for block, own in zip(other.blocks, model.blocks, strict=True):
        qkv, out, up, down = (
            (layer.weight * layer.weight.grad).abs().detach()
            for layer in (own.attn.qkv, own.attn.proj, own.mlp.fc1, own.mlp.fc2)
        )
        of_heads = qkv.view(3, HEADS, HEAD, WIDTH).sum((0, 2, 3)) + out.view(WIDTH, HEADS, HEAD).sum((0, 2))
        of_channels = up.sum(1) + down.sum(0)
        with torch.no_grad():
            block.attn.proj.weight.view(WIDTH, HEADS, HEAD)[:, of_heads.argsort()[: HEADS - heads]] = 0.0
            block.mlp.fc2.weight[:, of_channels.argsort()[: HIDDEN - channels]] = 0.0
    return other


@pytest.mark.parametrize(
    ("ratio", "heads", "channels", "conditioning"),
    [(0.3, 3, 90, "class"), (0.5, 2, 64, "none"), (0.97, 1, 4, "class"), (0.0, 4, 128, "class")],
)
def test_it_computes_as_the_model_whose_least_important_parts_are_silent(ratio, heads, channels, conditioning):
    model, arguments = with_gradients(conditioning=conditioning)
    before = model(*arguments)[0]
    pruned = prune(model, ratio)
    assert [block.attn.qkv.out_features for block in pruned.blocks] == [3 * heads * HEAD] * 2
    assert [block.mlp.fc1.out_features for block in pruned.blocks] == [channels] * 2
    torch.testing.assert_close(pruned(*arguments)[0], zeroed(model, heads, channels)(*arguments)[0])
    assert torch.equal(model(*arguments)[0], before)
    assert torch.equal(pruned(*arguments)[0], before) == (ratio == 0.0)


def test_it_is_saved_and_loaded_as_any_dit_and_pruned_again(tmp_path):
    model, arguments = with_gradients()
    pruned = prune(model, 0.5)
    save_denoiser(pruned, diffusers.DDPMScheduler(), tmp_path)
    loaded, _ = load_denoiser(tmp_path)
    assert torch.equal(loaded(*arguments)[0], pruned(*arguments)[0])
    assert not prune(with_gradients()[0], 0.5).training
    loaded.requires_grad_(True)(*arguments)[0].square().mean().backward()
    again = prune(loaded, 0.5)
    assert (again.config.num_attention_heads, again.config.attention_head_dim) == (1, HEAD)


def test_other_models_are_refused_in_words(monkeypatch):
    with pytest.raises(UserError, match="not UNet2DModel"):
        check_prunable(small_unet())
    model, _ = with_gradients()
    add_projections(model)
    with pytest.raises(UserError, match="does not go with projections"):
        prune(model, 0.5)
    monkeypatch.setattr(pruning, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"stagepatch\[pruning\]"):
        prune(with_gradients()[0], 0.5)

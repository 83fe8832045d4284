"""A gate that sees the mean of the text's tokens beside the timestep."""

import pytest
import torch

from stagepatch.core import UserError
from stagepatch.patch import Patch, PatchConfig
from tests.tiny import FAMILIES, TEXT_CHANNELS, mask_of_different_lengths
from tests.tiny_pipelines import PIPELINES
from tests.training.test_train_on_pipelines import draw_images, train

STACKED = ["Krea2Transformer2DModel", "Ideogram4Transformer2DModel"]  # the states of several layers of each token
UNETS = ("UNet2DConditionModel of",)  # of DeepFloyd IF and Kandinsky 2.2
OF_TEXT = [name for name, family in FAMILIES.items() if "encoder_hidden_states" in family.draws]
OF_TEXT = [name for name in OF_TEXT if name not in STACKED and not name.startswith(UNETS)]
MASKS = ["encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask"]


@pytest.mark.parametrize("name", OF_TEXT)
def test_gate_sees_the_timestep_and_the_mean_of_the_tokens_that_count(name):
    family = FAMILIES[name]
    model = family.model()
    base = family.call(model)
    patch = Patch.create(model, PatchConfig(condition="t+text"))
    t_channels = Patch.create(model, PatchConfig(condition="t")).gate.channels
    assert patch.gate.channels == t_channels + TEXT_CHANNELS * (2 if name.startswith("BriaFibo") else 1)
    seen = {}
    model.get_submodule(patch.backbone.time_tap).register_forward_hook(lambda m, a, out: seen.update(t=out))
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.update(kwargs), with_kwargs=True)
    patch.gate.register_forward_pre_hook(lambda m, args: seen.update(gate=args[0]))
    with patch.attach(model):
        assert torch.equal(family.call(model), base)  # a fresh one changes nothing
    seen |= seen.get("joint_attention_kwargs") or {}
    mask = next((seen[mask].flatten(1) for mask in MASKS if seen.get(mask) is not None), torch.ones(2, 5))[:, :5]
    rows = [tokens[kept.bool()].mean(dim=0) for tokens, kept in zip(seen["encoder_hidden_states"], mask, strict=True)]
    differ = mask_of_different_lengths in family.draws.values() or name.startswith(("Chroma", "BriaFibo"))
    assert len({int(kept.sum()) for kept in mask}) == (2 if differ else 1)
    t = seen["t"].mean(dim=1) if seen["t"].ndim == 3 else seen["t"][:2]
    torch.testing.assert_close(seen["gate"], torch.cat([t, torch.stack(rows)], dim=1))


@pytest.mark.parametrize("name", ["UNet2DModel", "ZImageTransformer2DModel", *STACKED])
def test_models_without_text_or_with_another_form_of_it_refuse_it(name):
    with pytest.raises(UserError, match=rf"'t\+text' needs a model that takes text.*{name} takes none"):
        Patch.create(FAMILIES[name].model(), PatchConfig(condition="t+text"))


def test_a_patch_that_sees_no_text_is_not_made_to():
    t = Patch.create(FAMILIES["UNet2DConditionModel"].model(), PatchConfig(condition="t"))
    t.config.condition = "t+text"
    with pytest.raises(UserError, match="condition_channels"):
        t.attach(FAMILIES["UNet2DConditionModel"].model())


def test_trained_on_captions_and_put_on_a_pipeline_with_guidance(tmp_path):
    """From the cache in training, from its text encoder in the pipeline: the gate sees the same."""
    tiny = PIPELINES["UNet2DConditionModel"]
    pipe = tiny.build()
    pipe.save_pretrained(tmp_path / "model")
    draw_images(tmp_path / "images", size=tiny.pixels)
    assert train(tmp_path, "--patch.condition=t+text", "--patch.initialization=normal", size=tiny.pixels[0]) == 0
    patch = Patch.from_pretrained(tmp_path / "run")
    assert patch.config.condition == "t+text"
    weight = patch.gate.weight.detach()
    assert weight[:, -1 - TEXT_CHANNELS : -1].abs().amin() > 0  # the text's features were learned from
    base, logits = tiny.call(pipe, guidance_scale=3.0), []
    patch.gate.register_forward_hook(lambda module, args, output: logits.append(output))
    with patch.attach(pipe):
        assert not torch.equal(tiny.call(pipe, guidance_scale=3.0), base)
    assert logits[0].shape[1] == 2  # without and with the prompt
    assert not torch.equal(logits[0][:, 0], logits[0][:, 1])

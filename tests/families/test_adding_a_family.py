"""docs/adding-a-family.md's row, put into the table as the page says."""

import re
from pathlib import Path

import diffusers
import pytest
import torch

from stagepatch.families import predict, registry, table
from stagepatch.patch import Patch, PatchConfig

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"


@pytest.fixture
def row(monkeypatch):
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    lines = [line[1:] for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(lines) <= 10
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    (family,) = eval("[\n" + "\n".join(lines) + "\n]", vars(table))
    registry.add_families([family])
    return family


def test_row_of_at_most_ten_lines_is_a_whole_family(row):
    torch.manual_seed(0)
    config = {"in_channels": 4, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]}
    model = diffusers.PRXTransformer2DModel(**config, context_in_dim=24).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # its last layer starts at zero
    text = {"encoder_hidden_states": torch.randn(2, 5, 24), "attention_mask": torch.ones(2, 5, dtype=torch.bool)}
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 10.0]), text
    base = predict(model, *inputs)
    assert torch.equal(base, model(inputs[0], inputs[1] / 1000, **text).sample)
    patch = Patch.create(model, PatchConfig(sample_size=[8, 8]))
    assert (patch.backbone.model_class, len(patch.prompts)) == (row.model_class, 2)
    with patch.attach(model):
        assert torch.equal(predict(model, *inputs), base)
        with torch.no_grad():
            for prompts in patch.prompts:
                prompts.normal_(std=20.0)
        output = predict(model, *inputs)
    assert not torch.allclose(output, base, atol=1e-3)
    output.square().mean().backward()
    assert all(prompts.grad.abs().amax(dim=1).gt(0).all() for prompts in patch.prompts)


def test_captions_become_the_models_condition(row):
    class Pipe:
        device = "cpu"

        def encode_prompt(self, prompt, device, do_classifier_free_guidance=True, num_images_per_prompt=2):
            assert (device, do_classifier_free_guidance, num_images_per_prompt) == ("cpu", False, 1)
            return torch.ones(len(prompt), 7, 24), torch.ones(len(prompt), 7), None, None

    condition = row.encode_captions(Pipe(), ["a cat", "a dog"])
    shapes = {name: tuple(value.shape) for name, value in condition.items()}
    assert shapes == {"encoder_hidden_states": (2, 7, 24), "attention_mask": (2, 7)}

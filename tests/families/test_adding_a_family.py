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
    heads = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    config = {**heads, "in_channels": 4, "out_channels": 4, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    model = diffusers.SkyReelsV2Transformer3DModel(**config, text_dim=24).eval()
    inputs = torch.randn(2, 4, 3, 8, 8), torch.tensor([900, 10]), {"encoder_hidden_states": torch.randn(2, 5, 24)}
    base = predict(model, *inputs)
    assert torch.equal(base, model(*inputs[:2], **inputs[2]).sample)
    patch = Patch.create(model, PatchConfig(sample_size=[3, 8, 8]))
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

        def encode_prompt(self, prompt, negative_prompt=None, do_classifier_free_guidance=True, **more):
            assert not do_classifier_free_guidance
            assert more == {"device": "cpu", "max_sequence_length": 512}
            return torch.ones(len(prompt), 512, 24), None

    condition = row.encode_captions(Pipe(), ["a cat", "a dog"])
    assert {name: tuple(value.shape) for name, value in condition.items()} == {"encoder_hidden_states": (2, 512, 24)}

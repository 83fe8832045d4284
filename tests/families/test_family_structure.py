"""Classes without a row: what their structure shows, held against the rows that were written; and all of diffusers."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from diffusers.models import transformers, unets
from PIL import Image

from stagepatch.cli import main
from stagepatch.core import UserError, read_json
from stagepatch.families import (
    Blocks,
    Transformer,
    describe,
    describe_structure,
    has_family,
    predict,
    register,
    registry,
)
from stagepatch.patch import Patch, PatchConfig
from tests import tiny
from tests.families.test_family_families import SIZES, drawn
from tests.tiny import FAMILIES, Family
from tests.tiny_pipelines import wan_vae

# Of classes that cannot be built of their defaults.
CONFIGS = {
    "DreamLiteTransformer2DModel": {"in_channels": 32},
    "EasyAnimateTransformer3DModel": {"patch_size": 2, "in_channels": 16, "out_channels": 16},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "caption_channels": [64, 64],
        "text_emb_dim": 64,
        "llama_layers": [0, 1],
    },
    "HunyuanDiT2DModel": {"patch_size": 2, "in_channels": 4, "attention_head_dim": 72},
    "LatteTransformer3DModel": {"sample_size": 64, "patch_size": 2, "in_channels": 4, "caption_channels": 64},
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
    "Transformer2DModel": {"sample_size": 32, "patch_size": 2, "in_channels": 4, "norm_type": "ada_norm_single"},
    "TransformerTemporalModel": {"in_channels": 320},
}

TAKEN = {}


def every_class():
    """Models of diffusers that denoise, and the few beside them in the same folders that do not."""
    for package in (transformers, unets):
        for file in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{file.name}")
            for value in vars(module).values():
                if inspect.isclass(value) and issubclass(value, ModelMixin) and value.__module__ == module.__name__:
                    yield value


CLASSES = {model_class.__name__: model_class for model_class in every_class()}


def video(batch, height, width):
    return torch.randn(batch, 4, tiny.FRAMES, height, width)


def sizes(batch, height, width):
    return torch.tensor([[8.0 * height, 8.0 * width]]).repeat(batch, 1)


def text_mask(batch, height, width):
    return torch.ones(batch, tiny.TEXT, dtype=torch.bool)


def rotary(batch, height, width):
    return tuple(torch.randn(height // 2 * (width // 2), 16) for _ in range(2))


SIZED = {"original_size": sizes, "target_size": sizes, "crop_coords": lambda batch, *_: torch.zeros(batch, 2)}
SPACE_TIME = tiny.config(tiny.LAYERS, in_channels=4, out_channels=4)
WAN = tiny.config(SPACE_TIME, text_dim=tiny.TEXT_CHANNELS, freq_dim=16, ffn_dim=32, rope_max_seq_len=32)
VIDEO_INPUTS = {**tiny.TEXT_INPUTS, "hidden_states": video, "timestep": tiny.whole_timesteps}
COGVIEW = tiny.config(tiny.LATENTS, tiny.LAYERS, text_embed_dim=tiny.TEXT_CHANNELS, time_embed_dim=24, condition_dim=8)

# Tiny models of classes that are taken by structure, as tests.tiny has them of those with a row.
TAKEN = {
    "CogView4Transformer2DModel": Family(
        diffusers.CogView4Transformer2DModel, {**COGVIEW, "rope_axes_dim": (16, 16)}, {**tiny.TEXT_INPUTS, **SIZED}
    ),
    "CogView3PlusTransformer2DModel": Family(
        diffusers.CogView3PlusTransformer2DModel, {**COGVIEW, "pos_embed_max_size": 16}, {**tiny.TEXT_INPUTS, **SIZED}
    ),
    "HunyuanDiT2DModel": Family(
        diffusers.HunyuanDiT2DModel,
        {
            **{name: value for name, value in tiny.LATENTS.items() if name != "out_channels"},
            **tiny.LAYERS,
            "num_layers": 4,
            "hidden_size": 32,
            "patch_size": 2,
            "cross_attention_dim": tiny.TEXT_CHANNELS,
            "cross_attention_dim_t5": tiny.TEXT_CHANNELS,
            "pooled_projection_dim": 12,
            "text_len": tiny.TEXT,
            "text_len_t5": tiny.TEXT,
            "use_style_cond_and_image_meta_size": False,
        },
        {
            **tiny.TEXT_INPUTS,
            "text_embedding_mask": text_mask,
            "encoder_hidden_states_t5": tiny.text,
            "text_embedding_mask_t5": text_mask,
            "image_rotary_emb": rotary,
        },
        blocks=4,
    ),
    "SkyReelsV2Transformer3DModel": Family(diffusers.SkyReelsV2Transformer3DModel, WAN, VIDEO_INPUTS),
    "ChronoEditTransformer3DModel": Family(diffusers.ChronoEditTransformer3DModel, WAN, VIDEO_INPUTS),
    "SanaVideoTransformer3DModel": Family(
        diffusers.SanaVideoTransformer3DModel,
        tiny.config(
            SPACE_TIME, tiny.CAPTIONS, num_cross_attention_heads=2, cross_attention_head_dim=16, rope_max_seq_len=32
        ),
        VIDEO_INPUTS,
    ),
}

# What structure takes of diffusers 0.42.1, rows or no rows; all others are refused.
FOUND = {
    "AnyFlowFARTransformer3DModel",
    "AnyFlowTransformer3DModel",
    "ChronoEditTransformer3DModel",
    "CogView3PlusTransformer2DModel",
    "CogView4Transformer2DModel",
    "ErnieImageTransformer2DModel",
    "GlmImageTransformer2DModel",
    "HeliosTransformer3DModel",
    "HunyuanDiT2DModel",
    "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel",
    "LuminaNextDiT2DModel",
    "MiniMaxH3Transformer3DModel",
    "OmniGenTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "SanaVideoTransformer3DModel",
    "SanaWMTransformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "Transformer2DModel",
    "WanTransformer3DModel",
}
SIZE = {"3D": [9, 64, 64], "2D": [64, 64]}


# What structure takes and a forward then refuses, whose tokens of the image are not alone.
REFUSED_THEN = {"ErnieImageTransformer2DModel", "OmniGenTransformer2DModel"}


@pytest.fixture(autouse=True)
def no_rows_of_them(monkeypatch):
    """As if they were not known: those that have rows by now, and those that a later stagepatch may have."""
    hidden = {*TAKEN, *REFUSED_THEN, "AnyFlowTransformer3DModel"}
    rows = {name: row for name, row in registry._FAMILIES.items() if name not in hidden}
    monkeypatch.setattr(registry, "_FAMILIES", rows)
    return hidden


def size_of(name):
    return [tiny.FRAMES, 8, 8] if "3D" in name else None


def fresh(name, model, **choices):
    return Patch.create(model, PatchConfig(**{"sample_size": size_of(name), **choices}))


@pytest.fixture(params=list(TAKEN))
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return TAKEN[name]


@pytest.fixture
def model(family):
    return family.model()


def outcome(describe_model, model):
    """'taken', or why not."""
    name = type(model).__name__
    try:
        try:
            backbone = describe_model(model)
        except UserError as error:
            if "PatchConfig(sample_size=" not in str(error):
                raise
            backbone = describe_model(model, SIZE["3D" if "3D" in name else "2D"])
    except UserError as error:
        return str(error)
    modules = dict(model.named_modules())
    assert backbone.sites
    assert {backbone.time_tap, *(site.module for site in backbone.sites)} <= set(modules)
    return "taken"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_of_diffusers_has_a_row_or_is_found_or_is_refused_with_a_reason(name):
    with torch.device("meta"):
        model = CLASSES[name](**CONFIGS.get(name, {}))
    by_structure = outcome(describe_structure, model)
    if by_structure != "taken":
        for part in (
            name,
            "Found: ",
            "Missing: ",
            f"stagepatch.families.register('{name}'",
            "docs/adding-a-family.md",
        ):
            assert part in by_structure
    assert (by_structure == "taken") == (name in FOUND), by_structure
    handled = outcome(describe, model)
    assert handled == "taken" or name in handled
    print(f"| {name} | {'row' if has_family(type(model)) else 'structure'} | {handled.split('Missing: ')[-1]} |")


def test_the_docs_name_every_class_without_a_row_and_those_that_are_found(monkeypatch):
    monkeypatch.undo()
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8").split("## Without a row")[1]
    named = dict(re.findall(r"`(\w+)`( °)?", page))
    without = {name for name, model_class in CLASSES.items() if not has_family(model_class)}
    assert set(named) == without
    assert {name for name, is_found in named.items() if is_found} == without & FOUND


def test_that_list_is_of_classes_of_diffusers():
    assert set(FOUND) <= set(CLASSES)
    assert len(CLASSES) > 80


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_structure_shows_is_what_was_written(name, monkeypatch):
    """Wherever it dares to say something, and forwards do not contradict it."""
    model = FAMILIES[name].model()
    monkeypatch.undo()
    written = describe(model, SIZES.get(name))
    try:
        found = describe_structure(model, SIZES.get(name))
    except UserError:
        # A tiny GLM-Image has another patch size than its config's default.
        assert name.split()[0] not in FOUND or name.startswith(("GlmImage", "CogView"))
        return
    if name in REFUSED_THEN:
        return
    own = [(site.name, site.module, site.index, site.channels, site.grid, site.layout) for site in written.sites]
    assert own == [(site.name, site.module, site.index, site.channels, site.grid, site.layout) for site in found.sites]
    assert {site.image_tokens for site in written.sites} == {"first"}
    for field in ("model_class", "time_tap", "condition_channels", "grid"):
        assert getattr(found, field) == getattr(written, field)


def test_fresh_patch_is_the_identity_bit_for_bit(name, family, model):
    base = family.call(model)
    patch = fresh(name, model)
    assert patch.config.condition == "t"
    assert len(patch.prompts) == family.blocks
    with patch.attach(model):
        assert torch.equal(family.call(model), base)
        drawn(patch)
        assert not torch.allclose(family.call(model), base, atol=1e-3)
    assert torch.equal(family.call(model), base)


def test_gradients_reach_everything_that_is_learned_and_the_model_keeps_none(name, family, model):
    patch = drawn(fresh(name, model)).train()
    patch.attach(model)
    (family.call(model).square().mean() + patch.balance_loss()).backward()
    for learned, parameter in patch.named_parameters():
        assert parameter.grad is not None, learned
        rows = parameter.grad.flatten(1).abs().amax(dim=1) if parameter.ndim > 1 else parameter.grad.abs()
        assert rows.gt(0).all(), learned
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gate_sees_the_models_own_timestep_embedding(name, family, model):
    patch = drawn(fresh(name, model)).train()
    taps = []
    model.get_submodule(describe(model, size_of(name)).time_tap).register_forward_hook(
        lambda *call: taps.append(call[2])
    )
    with patch.attach(model):
        family.call(model)
    expected = torch.nn.functional.linear(
        torch.cat([taps[0], torch.zeros(2, 1)], dim=1), patch.gate.weight, patch.gate.bias
    )
    torch.testing.assert_close(patch.last.logits[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(12, 12), (8, 12)], ids=str)
def test_other_sizes_and_shapes_are_taken(name, family, model, size):
    base = family.call(model, size=size)
    patch = fresh(name, model)
    with patch.attach(model):
        assert torch.equal(family.call(model, size=size), base)
        drawn(patch)
        assert not torch.allclose(family.call(model, size=size), base, atol=1e-3)


def test_saved_and_loaded_patch_gives_the_same_output_and_says_that_it_was_found(name, family, model, tmp_path):
    patch = drawn(fresh(name, model))
    with patch.attach(model):
        expected = family.call(model)
    patch.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["backbone"]["is_found"] is True
    assert "found in the model's structure" in (tmp_path / "README.md").read_text()
    loaded = Patch.from_pretrained(tmp_path)
    assert loaded.backbone.is_found
    with loaded.attach(model):
        assert torch.equal(family.call(model), expected)


def test_patch_of_a_class_that_gets_a_row_later_is_put_on_all_the_same(tmp_path):
    family = TAKEN["CogView4Transformer2DModel"]
    model = family.model()
    patch = drawn(Patch.create(model))
    with patch.attach(model):
        expected = family.call(model)
    patch.save_pretrained(tmp_path)
    tap = "time_condition_embed.timestep_embedder"
    register("CogView4Transformer2DModel", Transformer((Blocks("transformer_blocks"),), tap))
    with Patch.from_pretrained(tmp_path).attach(model):
        assert torch.equal(family.call(model), expected)


def test_file_and_card_of_a_written_description_say_nothing_of_it(tmp_path):
    Patch.create(FAMILIES["SD3Transformer2DModel"].model()).save_pretrained(tmp_path)
    assert "is_found" not in read_json(tmp_path / "config.json")["backbone"]
    assert "found in the model" not in (tmp_path / "README.md").read_text()


def test_tokens_of_text_among_those_of_the_image_are_refused_in_the_first_forward():
    """ERNIE-Image's blocks take both, batch second."""
    torch.manual_seed(0)
    config = tiny.config(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4, out_channels=4
    )
    model = diffusers.ErnieImageTransformer2DModel(**config, text_in_dim=tiny.TEXT_CHANNELS, rope_axes_dim=(4, 4, 8))
    patch = Patch.create(model, PatchConfig(sample_size=[8, 8]))
    text = {"text_bth": torch.randn(2, tiny.TEXT, tiny.TEXT_CHANNELS), "text_lens": torch.tensor([tiny.TEXT] * 2)}
    call = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([10.0, 900.0]), **text}
    base = model(**call, return_dict=False)[0]
    attachment = patch.attach(model)
    with pytest.raises(UserError) as caught:
        model(**call)
    for part in ("ErnieImageTransformer2DModel", "'layers.0' arrived (69, 2, 32)", "[B, 64, 32]", "8 × 8 tokens"):
        assert part in str(caught.value)
    assert "docs/adding-a-family.md" in str(caught.value)
    attachment.detach()
    assert torch.equal(model(**call, return_dict=False)[0], base)


def anyflow(frames):
    model = diffusers.AnyFlowTransformer3DModel(**WAN)
    steps = tiny.timesteps(2)[:, None].repeat(1, frames)
    text = torch.randn(2, tiny.TEXT, tiny.TEXT_CHANNELS)
    return model, {
        "hidden_states": torch.randn(2, frames, 4, 8, 8),
        "timestep": steps,
        "r_timestep": torch.zeros_like(steps),
        "encoder_hidden_states": text,
    }


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (3, r"given \(2, 3, 4, 8, 8\), where latents \[B, 4, frames, height, width\]"),
        (4, "has 8 rows for the 2 samples"),
    ],
)
def test_frames_that_come_first_and_a_timestep_a_frame_are_refused_in_the_first_forward(frames, expected):
    model, call = anyflow(frames)
    Patch.create(model, PatchConfig(sample_size=[frames, 8, 8])).attach(model)
    with pytest.raises(UserError, match=expected):
        model(**call)


def test_block_that_runs_before_the_timestep_is_embedded_is_refused():
    class Late(diffusers.CogView4Transformer2DModel):
        def forward(self, hidden_states, timestep, **arguments):
            self.transformer_blocks[0](torch.zeros(1, 16, 32), *arguments)
            raise AssertionError

    family = TAKEN["CogView4Transformer2DModel"]
    model = Late(**family.config)
    patch = Patch.create(model)
    patch.attach(model)
    patch.observed_rows = 1  # of an earlier forward
    with pytest.raises(UserError, match="embedding has 0 rows"):
        model(hidden_states=torch.zeros(1, 4, 8, 8), timestep=torch.ones(1))


def test_layers_that_happen_to_be_as_wide_as_a_patch_are_not_taken_for_what_cuts_them():
    with torch.device("meta"):
        # The timestep's embedding is as wide as a patch of 8 channels.
        model = diffusers.CogView4Transformer2DModel(**{**COGVIEW, "in_channels": 8})
        assert describe_structure(model).sites[0].channels == 32
        # The text is as wide as 2×2 tokens of 6 channels, which come packed.
        model = diffusers.QwenImageTransformer2DModel(
            **{**FAMILIES["QwenImageTransformer2DModel"].config, "in_channels": 6}
        )
    with pytest.raises(UserError, match="Missing: the grid"):
        describe_structure(model, [8, 8])


def test_size_of_samples_that_the_config_does_not_have_is_asked_for():
    model = TAKEN["SkyReelsV2Transformer3DModel"].model()
    for size in (None, 8):
        with pytest.raises(UserError, match=r"give PatchConfig\(sample_size=\[frames, height, width\]\)"):
            describe(model, size)
    assert describe(model, [3, 8, 8]).grid == (3, 4, 4)


def test_condition_of_class_or_text_is_refused_and_text_is_taken():
    family = TAKEN["CogView4Transformer2DModel"]
    model = family.model()
    with pytest.raises(UserError, match=r"condition='t\+c' needs to know"):
        Patch.create(model, PatchConfig(condition="t+c"))
    base = family.call(model)
    model.register_to_config(caption_channels=tiny.TEXT_CHANNELS)
    patch = Patch.create(model, PatchConfig(condition="t+text"))
    with patch.attach(model):
        assert torch.equal(family.call(model), base)


def test_training_is_refused_until_someone_says_how_the_class_is_called():
    family = TAKEN["SkyReelsV2Transformer3DModel"]
    model = family.model()
    call = family.inputs(model, 2, 8, 8)
    text = {"encoder_hidden_states": call["encoder_hidden_states"]}
    arguments = model, call["hidden_states"], torch.tensor([900.0, 10.0]), text
    with pytest.raises(UserError, match=r"register\('SkyReelsV2Transformer3DModel', describe_structure\)"):
        predict(*arguments)
    register("SkyReelsV2Transformer3DModel", describe_structure)
    assert torch.equal(predict(*arguments), model(**call | {"timestep": arguments[2]}, return_dict=False)[0])
    assert fresh("SkyReelsV2Transformer3DModel", model).backbone.is_found


def test_the_command_says_that_the_class_has_to_be_described_to_be_trained(tmp_path, capsys):
    name = "SkyReelsV2Transformer3DModel"
    TAKEN[name].model().save_pretrained(tmp_path / "model" / "transformer")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    wan_vae().save_pretrained(tmp_path / "model" / "vae")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "0.png")
    paths = [f"--model={tmp_path / 'model'}", f"--data.source={tmp_path / 'images'}", f"--output_dir={tmp_path}"]
    assert main(["train", *paths, "--data.image_size=32"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"No description of {name} is known: its sites, how it is called" in error
    assert f"register('{name}', describe_structure)" in error

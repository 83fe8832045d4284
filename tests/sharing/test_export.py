"""LoRAs in other programs' forms, held against the readers of diffusers: the same images through its pipelines."""

import dataclasses

import pytest
import torch
import yaml
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_lora_to_diffusers,
    _convert_non_diffusers_ltxv_lora_to_diffusers,
)
from safetensors import safe_open

from stagepatch.cli import main
from stagepatch.core.errors import UserError
from stagepatch.diffusion import TimestepsConfig
from stagepatch.methods import LoRA, LoRAConfig
from stagepatch.sampling import load_limited_loras
from stagepatch.sharing import export_lora
from stagepatch.sharing.names import to_comfyui, to_kohya
from stagepatch.training import Run, TrainConfig
from tests.runs import draw_weights
from tests.sampling.test_limited_loras import write_lora
from tests.tiny_pipelines import PIPELINES

STEPS = 3
# Flux's single blocks have their sizes written into diffusers' reader; they are held against it below.
FLUX_DOUBLE = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.0.attn.add_q_proj",
]
FLUX_DOUBLE += ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.ff.net.2"]


def denoiser_of(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def saved(name, directory, facts=None, **choices):
    """A LoRA of drawn weights; returns the pipeline that it is on."""
    pipe = PIPELINES[name].build()
    method = LoRA(LoRAConfig(**{"rank": 2, **choices}), facts)
    draw_weights(method.prepare(denoiser_of(pipe))[0]["params"], std=0.3)
    method.save(directory)
    return pipe


def learned(name, directory, **choices):
    """The same, and the images of the pipeline with it."""
    tiny = PIPELINES[name]
    return tiny, tiny.call(saved(name, directory, **choices), steps=STEPS)


def assert_loads_alike(tiny, file, expected):
    pipe = tiny.build()
    base = tiny.call(pipe, steps=STEPS)
    pipe.load_lora_weights(file)
    torch.testing.assert_close(tiny.call(pipe, steps=STEPS), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "form", "choices"),
    [
        ("UNet2DConditionModel", "kohya", {}),
        ("FluxTransformer2DModel", "kohya", {"targets": FLUX_DOUBLE}),
        ("FluxTransformer2DModel", "comfyui", {}),
        ("Flux2Transformer2DModel", "kohya", {"targets": "all"}),
        ("Flux2Transformer2DModel", "comfyui", {"targets": "all"}),
        ("SD3Transformer2DModel", "comfyui", {}),
        ("QwenImageTransformer2DModel", "kohya", {}),
        ("ZImageTransformer2DModel", "kohya", {}),
        ("WanTransformer3DModel", "kohya", {"targets": "all"}),
        ("WanTransformer3DModel", "comfyui", {}),
    ],
)
def test_a_pipeline_loads_the_file_and_makes_the_same_images(name, form, choices, tmp_path, capsys):
    tiny, expected = learned(name, tmp_path / "lora", **choices)
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "style"), f"--to={form}"]) == 0
    file = tmp_path / "style" / "style.safetensors"
    assert capsys.readouterr().out.strip() == str(file)
    assert_loads_alike(tiny, file, expected)
    assert not (tmp_path / "style" / "experts.yaml").exists()


def drawn(*paths, inside=8, outside=8, rank=2):
    generator = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(paths, (inside, outside))
    return {
        path: (torch.randn(rank, low, generator=generator), torch.randn(high, rank, generator=generator))
        for path, (low, high) in shapes.items()
    }


def deltas(tensors):
    """up · down by module, of names in diffusers' form."""
    downs = {name: value for name, value in tensors.items() if ".lora_A." in name}
    found = {name.split(".lora_A.")[0]: tensors[name.replace("_A.", "_B.")] @ down for name, down in downs.items()}
    return {name.removeprefix("transformer."): value for name, value in found.items()}


def expected_deltas(layers):
    return {path: up @ down for path, (down, up) in layers.items()}


def test_fluxs_single_blocks_in_kohyas_form_are_read_by_diffusers():
    block = "single_transformer_blocks.3"
    layers = drawn(
        f"{block}.attn.to_q", f"{block}.attn.to_v", f"{block}.proj_out", f"{block}.norm.linear", outside=3072
    )
    layers |= drawn(f"{block}.proj_mlp", outside=4 * 3072)
    found = deltas(_convert_kohya_flux_lora_to_diffusers(to_kohya(layers, "FluxTransformer2DModel")))
    assert found.pop(f"{block}.attn.to_k").abs().max() == 0, "a layer that was not trained is in the same map"
    torch.testing.assert_close(found, expected_deltas(layers))
    attention = drawn(f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", outside=3072)
    found = deltas(_convert_kohya_flux_lora_to_diffusers(to_kohya(attention, "FluxTransformer2DModel")))
    assert found.pop(f"{block}.proj_mlp").shape == (4 * 3072, 8)
    torch.testing.assert_close(found, expected_deltas(attention))


def test_kohyas_unet_names_with_alpha_are_read_by_diffusers():
    block = "up_blocks.1.attentions.0"
    layers = drawn(
        f"{block}.proj_in", f"{block}.transformer_blocks.0.ff.net.0.proj", f"{block}.transformer_blocks.0.ff.net.2"
    )
    state, alphas = _convert_non_diffusers_lora_to_diffusers(to_kohya(layers, "UNet2DConditionModel"))
    assert set(alphas.values()) == {2.0}, "alpha is the rank: the scale is 1"
    found = {name.split(".lora.")[0]: up for name, up in state.items() if ".lora.up." in name}
    assert set(found) == {f"unet.{path}" for path in layers}


def test_ltx_in_comfyuis_form_is_read_by_diffusers():
    layers = drawn("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.0.proj")
    tensors = to_comfyui(layers, "LTXVideoTransformer3DModel")
    assert all(name.startswith("diffusion_model.transformer_blocks.0.") for name in tensors)
    torch.testing.assert_close(deltas(_convert_non_diffusers_ltxv_lora_to_diffusers(tensors)), expected_deltas(layers))


# K maps that are each on in their part, and T-LoRA's ranks, which go off one after the other as noise rises.
WEIGHED = [
    ("UNet2DConditionModel", {"rank": 2, "num_stages": 2, "stage_gate": "ranges"}, 2),
    ("SD3Transformer2DModel", {"rank": 4, "min_rank": 1}, 4),
]


@pytest.mark.parametrize(("name", "choices", "count"), WEIGHED, ids=str)
def test_ranks_that_are_on_and_off_are_exported_as_loras_that_are_limited(name, choices, count, tmp_path):
    form = "kohya" if name.startswith("UNet") else "diffusers"
    tiny, expected = learned(name, tmp_path / "lora", **choices)
    files = export_lora(tmp_path / "lora", tmp_path / "style", form)
    assert len(files) == count
    pipe = tiny.build()
    with load_limited_loras(tmp_path / "style" / "experts.yaml", pipe):
        torch.testing.assert_close(tiny.call(pipe, steps=STEPS), expected, rtol=1e-3, atol=1e-3)
    everywhere = tiny.build()
    for number, file in enumerate(files):
        everywhere.load_lora_weights(file, adapter_name=str(number))
    everywhere.set_adapters([str(number) for number in range(count)])
    assert not torch.allclose(tiny.call(everywhere, steps=STEPS), expected, atol=1e-2), "the ranges matter"
    entries = yaml.safe_load((tmp_path / "style" / "experts.yaml").read_text())["loras"]
    for file, entry in zip(files, entries, strict=True):
        assert entry["file"] == file.name, "the folder can be moved"
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["modelspec.timestep_range"] == f"{entry['from']:g},{entry['to']:g}"


def test_loras_of_any_origin_in_a_schedule_are_exported_with_its_ranges(tmp_path):
    tiny = PIPELINES["UNet2DConditionModel"]
    saved("UNet2DConditionModel", tmp_path / "ours")
    theirs = write_lora(tiny.build(), tmp_path / "theirs", 1)
    schedule = tmp_path / "experts.yaml"
    entries = [{"file": "ours", "from": 500, "to": 1000}, {"file": str(theirs), "from": 0, "to": 700, "weight": 0.5}]
    schedule.write_text(yaml.safe_dump({"loras": entries}))
    pipe = tiny.build()
    with load_limited_loras(schedule, pipe):
        expected = tiny.call(pipe, steps=STEPS)
    with pytest.raises(UserError, match="does not say which class of model it is for: give --model_class"):
        export_lora(schedule, tmp_path / "no", "kohya")
    files = export_lora(schedule, tmp_path / "out", "kohya", "UNet2DConditionModel")
    assert [file.name for file in files] == ["out-1-500-1000.safetensors", "out-2-0-700.safetensors"]
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    exported = tiny.build()
    with load_limited_loras(moved / "experts.yaml", exported):
        torch.testing.assert_close(tiny.call(exported, steps=STEPS), expected, rtol=1e-4, atol=1e-4)


def test_an_alpha_that_diffusers_keeps_in_the_metadata_is_worked_in(tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    tiny = PIPELINES["SD3Transformer2DModel"]
    pipe = tiny.build()
    model = pipe.transformer
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"]))
    draw_weights([value for name, value in model.named_parameters() if "lora_" in name], std=0.2)
    expected = tiny.call(pipe, steps=STEPS)
    config = dataclasses.asdict(model.peft_config["default"])
    kept = {name: config[name] for name in ("r", "lora_alpha")} | {"target_modules": ["to_q", "to_v"]}
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=kept)
    (tmp_path / "one.yaml").write_text("loras: [{file: pytorch_lora_weights.safetensors, from: 0, to: 1000}]")
    (file,) = export_lora(tmp_path / "one.yaml", tmp_path / "out", "comfyui", "SD3Transformer2DModel")
    assert_loads_alike(tiny, file, expected)


def test_stages_and_denoisers_keep_their_ranges_and_stay_apart(tmp_path):
    for number, ends in enumerate([(0, 250), (250, 1000)]):
        stage = tmp_path / "decoupled" / "stages" / str(number)
        saved("UNet2DConditionModel", stage)
        (stage / "stage.json").write_text(f'{{"from": {ends[0]}, "to": {ends[1]}}}')
    files = export_lora(tmp_path / "decoupled", tmp_path / "two", "kohya")
    assert [file.name for file in files] == ["two-0-250.safetensors", "two-250-1000.safetensors"]
    for part in ("transformer", "transformer_2"):
        saved("WanTransformer3DModel", tmp_path / "wan" / "denoisers" / part)
    (tmp_path / "wan" / "denoisers.json").write_text('{"transformer_2": {}, "transformer": {}}')
    files = export_lora(tmp_path / "wan", tmp_path / "out", "comfyui")
    expected = ["transformer_2/out-transformer_2.safetensors", "transformer/out-transformer.safetensors"]
    assert [str(file.relative_to(tmp_path / "out")) for file in files] == expected


def test_what_was_trained_on_a_part_of_the_noise_levels_is_limited_to_it(tmp_path):
    saved("UNet2DConditionModel", tmp_path / "lora", {"noise levels": "0.5 to 1"})
    (file,) = export_lora(tmp_path / "lora", tmp_path / "out", "kohya")
    assert file.name == "out-500-1000.safetensors"
    assert 'LimitedLoRA("lora", 500, 1000)' in (tmp_path / "lora" / "README.md").read_text()


def test_a_run_says_which_noise_levels_it_trains_on():
    timesteps = TimestepsConfig(range=[0.25, 0.5])
    assert Run(TrainConfig(method="lora", timesteps=timesteps)).method.facts["noise levels"] == "0.25 to 0.5"
    assert "noise levels" not in Run(TrainConfig(method="lora")).method.facts


@pytest.mark.parametrize(
    ("name", "choices", "form", "message"),
    [
        ("SD3Transformer2DModel", {}, "kohya", "no form of kohya's that is known here; known: Flux"),
        ("PixArtTransformer2DModel", {}, "kohya", "Take --to diffusers"),
        ("ChromaTransformer2DModel", {}, "comfyui", "no form of comfyui's that is known here; known: Aura"),
        ("FluxTransformer2DModel", {"targets": ["x_embedder"]}, "kohya", "'x_embedder' has no name in this form"),
        ("WanTransformer3DModel", {"targets": ["proj_out"]}, "comfyui", "'proj_out' has no name in this form"),
        ("SD3Transformer2DModel", {"num_stages": 2}, "diffusers", "by 'gaussian' is no set of plain LoRAs"),
    ],
)
def test_what_has_no_such_form_is_refused_in_words(name, choices, form, message, tmp_path, capsys):
    saved(name, tmp_path / "lora", **choices)
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "out"), "--to", form]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_things_are_refused(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert "stagepatch export PATH OUTPUT --to" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not hold a LoRA, but a model"):
        export_lora("digits", tmp_path / "out", "diffusers")
    saved("UNet2DConditionModel", tmp_path / "lora")
    (file,) = export_lora(tmp_path / "lora", tmp_path / "once", "kohya")
    (tmp_path / "e.yaml").write_text(f"loras: [{{file: {file}, from: 0, to: 1000}}]")
    with pytest.raises(UserError, match="only diffusers' form is read"):
        export_lora(tmp_path / "e.yaml", tmp_path / "twice", "kohya")
    (tmp_path / "e.yaml").write_text("loras: [{file: name/lora, from: 0, to: 1000}]")
    mixed = {"fuse": "maxfusion", "experts": [{"from": 0, "to": 1000}, {"from": 0, "to": 500, "learned": "lora"}]}
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump(mixed))
    with pytest.raises(UserError, match="mixes features of its experts"):
        export_lora(tmp_path / "mixed.yaml", tmp_path / "out", "kohya")
    with pytest.raises(UserError, match="'name/lora' is not on this disk: fetch it"):
        export_lora(tmp_path / "e.yaml", tmp_path / "twice", "kohya")

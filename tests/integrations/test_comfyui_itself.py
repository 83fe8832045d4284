"""The ComfyUI nodes in ComfyUI's own classes: a ModelPatcher around its Flux, sampled by its own samplers.

ComfyUI is not on PyPI: STAGEPATCH_COMFYUI names a checkout of it, and where none is named these tests are
left out. einops, torchsde with trampoline, comfy-kitchen and comfy-aimdo must be there too; torchvision and
torchaudio, of which nothing is asked here, are stood in for. What was run so is in integrations/comfyui/README.md.
"""

import importlib.util
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from safetensors.torch import save_file

from stagepatch.patch import Patch, PatchConfig
from tests.runs import draw_weights
from tests.tiny import FAMILIES

CHECKOUT = os.environ.get("STAGEPATCH_COMFYUI", "")
NODES = Path(__file__).parents[2] / "integrations" / "comfyui"
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="STAGEPATCH_COMFYUI names no checkout of ComfyUI")
SIGMAS = torch.tensor([1.0, 0.8, 0.6, 0.35, 0.0])
WIDTH, TEXT = 32, 5


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """By name; `folder_paths` knows a folder of LoRAs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(CHECKOUT)
        for name in ("torchvision", "torchvision.transforms", "torchaudio", "torchaudio.transforms"):
            patch.setitem(sys.modules, name, MagicMock())
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import folder_paths

        folder_paths.folder_names_and_paths["loras"] = ([str(tmp_path_factory.mktemp("loras"))], {".safetensors"})
        spec = importlib.util.spec_from_file_location(
            "comfyui_nodes", NODES / "__init__.py", submodule_search_locations=[str(NODES)]
        )
        package = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "comfyui_nodes", package)
        spec.loader.exec_module(package)
        yield package.NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def flux():
    return FAMILIES["FluxTransformer2DModel"].model()


@pytest.fixture(scope="module")
def model(nodes, flux):
    """diffusers' Flux as a MODEL, by ComfyUI's own conversion of its weights."""
    from comfy import model_detection, model_management, model_patcher, supported_models
    from comfy.ldm.flux.model import FluxParams

    config = {
        **{"image_model": "flux", "in_channels": 4, "out_channels": 4, "vec_in_dim": 12, "context_in_dim": 24},
        **{"hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1},
        **{"axes_dim": [4, 4, 8], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True},
        "txt_ids_dims": [],
    }
    known = {"image_model", *FluxParams.__dataclass_fields__}  # earlier ones have no txt_ids_dims
    described = supported_models.Flux({name: value for name, value in config.items() if name in known})
    described.set_inference_dtype(torch.float32, None)
    inner = described.get_model({}, device="cpu")
    weights = {name: value.clone() for name, value in flux.state_dict().items()}  # which it writes to
    weights = model_detection.convert_diffusers_mmdit(weights)
    weights = described.process_unet_state_dict(weights)
    missing, unexpected = inner.diffusion_model.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    device = model_management.get_torch_device()
    return model_patcher.ModelPatcher(inner, load_device=device, offload_device=device)


def conditions(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, TEXT, 24, generator=generator), torch.randn(1, 12, generator=generator)


def sample(model, noise, sigmas=SIGMAS, latent=None):
    """Latents as the denoiser has them, by Euler's method."""
    import comfy.sample
    import comfy.samplers

    text, pooled = conditions()
    told = [[text, {"pooled_output": pooled, "guidance": 3.5}]]
    latent = torch.zeros_like(noise) if latent is None else model.model.process_latent_out(latent)
    sampler = comfy.samplers.sampler_object("euler")
    made = comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, told, told, latent, disable_pbar=True)
    return model.model.process_latent_in(made)


def in_parts(noise, first, second, switch):
    """The same, one MODEL up to a step and another from there."""
    half = sample(first, noise, SIGMAS[: switch + 1])
    return sample(second, torch.zeros_like(noise), SIGMAS[switch:], half)


def write_lora(name, modules, seed=2):
    """In diffusers' names, as `stagepatch export --to comfyui` writes them."""
    import folder_paths

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, (outside, inside) in modules.items():
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(2, inside, generator=generator)
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(outside, 2, generator=generator)
    path = Path(folder_paths.get_folder_paths("loras")[0], f"{name}.safetensors")
    save_file(tensors, path)
    return path, tensors


LAYERS = {
    "transformer_blocks.0.attn.to_q": (WIDTH, WIDTH),
    "transformer_blocks.0.attn.to_k": (WIDTH, WIDTH),
    "transformer_blocks.0.ff.net.0.proj": (4 * WIDTH, WIDTH),
    "single_transformer_blocks.0.attn.to_v": (WIDTH, WIDTH),
    "single_transformer_blocks.0.proj_out": (WIDTH, 5 * WIDTH),
}


def test_this_flux_is_diffusers_flux(model, flux):
    noise, (text, pooled) = torch.randn(1, 4, 8, 12), conditions()
    made = sample(model, noise, torch.tensor([0.7, 0.0]))
    torch.testing.assert_close(made, denoised(flux, 0.7 * noise, 0.7, text, pooled), rtol=1e-4, atol=1e-4)


def denoised(flux, x, sigma, text, pooled):
    """x_start of diffusers' Flux, at any size."""
    from stagepatch.families.packing import pack, unpack

    height, width = (length // 2 for length in x.shape[2:])
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    given = {"encoder_hidden_states": text, "pooled_projections": pooled, "guidance": torch.tensor([3.5])}
    with torch.no_grad():
        output = flux(pack(x), timestep=torch.tensor([sigma]), img_ids=ids, txt_ids=torch.zeros(TEXT, 3), **given)[0]
    return x - sigma * unpack(output, *x.shape[2:])


def test_a_lora_limited_to_timesteps_is_comfyuis_own_lora_in_these_steps_alone(nodes, model):
    from comfy.sd import load_lora_for_models

    _, tensors = write_lora("one", LAYERS)
    noise = torch.randn(1, 4, 8, 12)
    whole, _ = load_lora_for_models(model, None, tensors, 0.3, 0.0)
    plain, everywhere = sample(model, noise), sample(whole, noise)
    assert not torch.allclose(plain, everywhere, atol=0.05)
    node = nodes["StagepatchLoadLimitedLoRA"]()
    for start, end, first, second, switch in [
        (400.0, 1000.0, whole, model, 3),  # on at 1000, 800 and 600
        (0.0, 600.0, model, whole, 3),  # on at 350
        (0.0, 1000.0, whole, whole, 2),
        (500.0, 550.0, model, model, 2),  # no step is there
    ]:
        (limited,) = node.load(model, "one.safetensors", 0.3, start, end)
        expected = in_parts(noise, first, second, switch)
        torch.testing.assert_close(sample(limited, noise), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(sample(model, noise), plain)


def test_a_schedule_beside_a_lora_of_comfyuis_own(nodes, model):
    """Weights that ComfyUI itself has patched are the ones that limited LoRAs are added to."""
    from comfy.sd import load_lora_for_models

    (one, of_one), (two, of_two), (_, everywhere) = (
        write_lora(name, LAYERS, seed) for seed, name in enumerate(("high", "low", "all"))
    )
    entries = [
        {"file": one.name, "from": 700, "to": 1000, "weight": 0.5},
        {"file": two.name, "from": 0, "to": 700},
    ]
    one.with_name("experts.yaml").write_text(yaml.safe_dump({"loras": entries}))
    noise = torch.randn(1, 4, 8, 12)
    base, _ = load_lora_for_models(model, None, everywhere, 0.2, 0.0)
    (scheduled,) = nodes["StagepatchLoadLimitedLoRAs"]().load(base, str(one.with_name("experts.yaml")), 0.4)
    high, _ = load_lora_for_models(base, None, of_one, 0.2, 0.0)
    low, _ = load_lora_for_models(base, None, of_two, 0.4, 0.0)
    expected = in_parts(noise, high, low, 2)  # 1000 and 800, then 600 and 350
    torch.testing.assert_close(sample(scheduled, noise), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, sample(base, noise), atol=0.05)


def test_a_patch_of_prompts_does_there_what_it_does_in_diffusers(nodes, model, flux, tmp_path):
    patch = Patch.create(flux, PatchConfig(sample_size=[8, 8]))
    draw_weights(patch.parameters(), std=3.0)
    patch.save_pretrained(tmp_path / "patch")
    noise, (text, pooled) = torch.randn(1, 4, 8, 12), conditions()
    plain = denoised(flux, 0.7 * noise, 0.7, text, pooled)
    with patch.attach(flux):
        expected = denoised(flux, 0.7 * noise, 0.7, text, pooled)
    assert not torch.allclose(expected, plain, atol=0.05)
    (patched,) = nodes["StagepatchLoadPatch"]().load(model, str(tmp_path / "patch"), 1.0)
    sigmas = torch.tensor([0.7, 0.0])
    torch.testing.assert_close(sample(patched, noise, sigmas), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sample(model, noise, sigmas), plain, rtol=1e-4, atol=1e-4)


def test_its_inputs_are_asked_of_comfyui(nodes):
    write_lora("shown", LAYERS)
    (names,) = nodes["StagepatchLoadLimitedLoRA"].INPUT_TYPES()["required"]["lora_name"]
    assert "shown.safetensors" in names

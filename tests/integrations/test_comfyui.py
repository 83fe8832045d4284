"""The ComfyUI nodes against stand-ins of the calls that they make; in ComfyUI itself: test_comfyui_itself.py."""

import importlib.util
import sys
import types
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from stagepatch.patch import Patch, PatchConfig
from tests.runs import draw_weights
from tests.tiny_pipelines import PIPELINES

ROOT = Path(__file__).parents[2] / "integrations" / "comfyui"


class Flow:
    """Of a flow, as `comfy.model_sampling.CONST`."""

    def timestep(self, sigma):
        return sigma


class Discrete:
    """As `comfy.model_sampling.ModelSamplingDiscrete`, of a diffusers scheduler's noise levels."""

    def __init__(self):
        alphas = diffusers.DDPMScheduler().alphas_cumprod
        self.sigmas, self.num_timesteps = ((1 - alphas) / alphas).sqrt(), 1000

    def timestep(self, sigma):
        return (self.sigmas.log() - sigma.log()).abs().argmin()


class Continuous(Discrete):
    """One that is told other things."""

    def timestep(self, sigma):
        return 0.25 * sigma.log()


class Adapter:
    """As a `WeightAdapterBase`: up · down."""

    def __init__(self, loaded_keys, weights):
        self.loaded_keys, self.weights = loaded_keys, weights


def calculate_weight(patches, weight, key, intermediate_dtype=torch.float32):
    """Writes to the weight, as ComfyUI's does; an offset is (dimension, start, length)."""
    for strength, added, strength_model, offset, _ in patches:
        part = weight if offset is None else weight.narrow(*offset)
        up, down = added.weights
        part.mul_(strength_model).add_(strength * (up @ down).to(intermediate_dtype))
    return weight


def load_lora(tensors, names):
    found = {names[name.removesuffix(".up")]: name for name in tensors if name.removesuffix(".up") in names}
    return {
        target: Adapter({name}, (tensors[name], tensors[name.removesuffix(".up") + ".down"]))
        for target, name in found.items()
    }


class Patcher:
    """As a ModelPatcher whose model is one layer."""

    def __init__(self, model):
        self.model, self.functions, self.wrappers = model, {}, []

    def clone(self):
        other = Patcher(self.model)
        other.functions = {key: list(each) for key, each in self.functions.items()}
        other.wrappers = list(self.wrappers)
        return other

    def add_weight_wrapper(self, name, function):
        self.functions[name] = [*self.functions.get(name, []), function]

    def add_wrapper_with_key(self, kind, key, wrapper):
        assert kind == "apply_model"
        self.wrappers.append(wrapper)

    def __call__(self, x, sigma, wrappers=None):
        wrappers = self.wrappers if wrappers is None else wrappers
        if wrappers:
            executor = types.SimpleNamespace(class_obj=self.model)
            call = type("Executor", (), {"__call__": lambda _, x, t: self(x, t, wrappers[1:]), **vars(executor)})()
            return wrappers[0](call, x, sigma)
        weight = self.model.weight
        for function in self.functions.get("diffusion_model.layer.weight", []):
            weight = function(weight)
        return x @ weight.T


@pytest.fixture
def comfyui(monkeypatch, tmp_path):
    """The nodes, with what they import in place."""
    names = {"layer": "diffusion_model.layer.weight", "half": ("diffusion_model.layer.weight", (0, 4, 4))}
    modules = {
        "comfy": {},
        "comfy.lora": {
            "calculate_weight": calculate_weight,
            "load_lora": load_lora,
            "model_lora_keys_unet": lambda model, known: {**known, **names},
        },
        "comfy.lora_convert": {"convert_lora": lambda tensors: tensors},
        "comfy.utils": {"load_torch_file": lambda file, safe_load: load_file(file)},
        "comfy.model_sampling": {"CONST": Flow, "ModelSamplingDiscrete": Discrete},
        "comfy.patcher_extension": {"WrappersMP": types.SimpleNamespace(APPLY_MODEL="apply_model")},
        "folder_paths": {
            "get_filename_list": lambda kind: [path.name for path in tmp_path.iterdir()],
            "get_full_path_or_raise": lambda kind, name: str(tmp_path / name),
        },
    }
    for name, held in modules.items():
        module = types.ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules["comfy"], name.split(".")[1], module)
    spec = importlib.util.spec_from_file_location(
        "comfyui_nodes", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "comfyui_nodes", package)
    spec.loader.exec_module(package)
    return package


@pytest.fixture
def model():
    torch.manual_seed(0)
    return types.SimpleNamespace(weight=torch.randn(8, 6), model_sampling=Flow())


def write_lora(path, outside=8, name="layer"):
    up, down = torch.randn(outside, 2), torch.randn(2, 6)
    save_file({f"{name}.up": up, f"{name}.down": down}, path)
    return up @ down


def test_a_lora_acts_in_its_range_alone_and_weights_stay(comfyui, model, tmp_path):
    one, two = write_lora(tmp_path / "one.safetensors"), write_lora(tmp_path / "half.safetensors", 4, "half")
    node = comfyui.NODE_CLASS_MAPPINGS["StagepatchLoadLimitedLoRA"]
    inputs = node.INPUT_TYPES()["required"]
    assert list(inputs) == ["model", "lora_name", "strength", "from_timestep", "to_timestep"]
    base, before = Patcher(model), model.weight.clone()
    (first,) = node().load(base, "one.safetensors", 0.5, 400.0, 1000.0)
    (both,) = node().load(first, "half.safetensors", 2.0, 0.0, 700.0)
    x = torch.randn(3, 6)

    def expected(of_one, of_two):
        weight = before + of_one * 0.5 * one
        weight[4:] += of_two * 2.0 * two
        return x @ weight.T

    for sigma, on in [(1.0, (1, 0)), (0.7, (1, 0)), (0.6, (1, 1)), (0.4, (1, 1)), (0.3999, (0, 1)), (0.0, (0, 1))]:
        torch.testing.assert_close(both(x, torch.tensor([sigma, sigma])), expected(*on))
        torch.testing.assert_close(first(x, torch.tensor([sigma])), expected(on[0], 0))
        assert torch.equal(base(x, torch.tensor([sigma])), x @ before.T)
    assert torch.equal(model.weight, before)


def test_a_schedule_is_read_with_files_beside_it(comfyui, model, tmp_path):
    added = write_lora(tmp_path / "one.safetensors")
    entries = [{"file": "one.safetensors", "from": 0, "to": 500, "weight": 0.8}]
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump({"loras": entries}))
    node = comfyui.NODE_CLASS_MAPPINGS["StagepatchLoadLimitedLoRAs"]
    assert node.IS_CHANGED(None, "experts.yaml", 1.0) == (tmp_path / "experts.yaml").stat().st_mtime
    (patched,) = node().load(Patcher(model), "experts.yaml", 0.5)
    x = torch.randn(3, 6)
    torch.testing.assert_close(patched(x, torch.tensor([0.2])), x @ (model.weight + 0.4 * added).T)
    torch.testing.assert_close(patched(x, torch.tensor([0.5])), x @ model.weight.T)


def test_timesteps_are_what_diffusers_tells_its_model(comfyui):
    told = sys.modules["comfyui_nodes.limited"].told_timestep
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(7)
    for sigma, timestep in zip(flow.sigmas, flow.timesteps, strict=False):
        assert told(Flow(), sigma) == pytest.approx(float(timestep), abs=1e-3)
    euler = diffusers.EulerDiscreteScheduler(beta_schedule="linear", interpolation_type="linear")
    euler.set_timesteps(10)
    for sigma, timestep in zip(euler.sigmas, euler.timesteps, strict=False):
        assert told(Discrete(), sigma) == pytest.approx(float(timestep), abs=1.0)
    with pytest.raises(ValueError, match="not on"):
        told(Continuous(), torch.tensor(1.0))


def test_what_is_refused(comfyui, model, tmp_path):
    one, several, prompts = comfyui.NODE_CLASS_MAPPINGS.values()
    write_lora(tmp_path / "other.safetensors", name="elsewhere")
    save_file({"transformer.weighed_by_timestep_alpha": torch.ones(1)}, tmp_path / "t.safetensors")
    for name, message in [("other", "Nothing in .* is of this model"), ("t", "weighed by the noise level")]:
        with pytest.raises(ValueError, match=message):
            one().load(Patcher(model), f"{name}.safetensors", 1.0, 0.0, 500.0)
    with pytest.raises(ValueError, match="from_timestep=500 must be less"):
        one().load(Patcher(model), "other.safetensors", 1.0, 500.0, 400.0)
    for content, message in [
        ("experts: []", "has no `loras`"),
        ("loras: [{file: a, from: 0, to: 9}]", "no file beside"),
    ]:
        (tmp_path / "experts.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            several().load(Patcher(model), str(tmp_path / "experts.yaml"), 1.0)
    patch = Patch.create(PIPELINES["SD3Transformer2DModel"].build())
    patch.save_pretrained(tmp_path / "sd3")
    with pytest.raises(ValueError, match="A patch of SD3Transformer2DModel, position 'add', is not put on a MODEL"):
        prompts().load(Patcher(model), str(tmp_path / "sd3"), 1.0)


class Double(nn.Module):
    """A double block of diffusers, as ComfyUI calls its own."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, img, txt, vec, pe):
        txt, img = self.block(hidden_states=img, encoder_hidden_states=txt, temb=vec, image_rotary_emb=pe)
        return img, txt


class Single(nn.Module):
    """A single block of diffusers, as ComfyUI calls its own."""

    def __init__(self, block, text):
        super().__init__()
        self.block, self.text = block, text

    def forward(self, x, vec, pe):
        txt, img = x[:, : self.text], x[:, self.text :]
        return torch.cat(self.block(img, txt, vec, pe), dim=1)


class ComfyFlux(nn.Module):
    """diffusers' Flux under the names of ComfyUI's, called as that is."""

    patch_size = 2

    def __init__(self, flux, text):
        super().__init__()
        embed = flux.time_text_embed
        self.time_in, self.guidance_in, self.vector_in = (
            embed.timestep_embedder,
            embed.guidance_embedder,
            embed.text_embedder,
        )
        self.double_blocks = nn.ModuleList(map(Double, flux.transformer_blocks))
        self.single_blocks = nn.ModuleList(Single(block, text) for block in flux.single_transformer_blocks)
        self.others = [flux]  # no module of it

    def forward(self, x, timestep, context, y, guidance, pe=None, **kwargs):
        (flux,) = self.others
        project = flux.time_text_embed.time_proj
        vec = self.time_in(project(timestep * 1000)) + self.guidance_in(project(guidance * 1000)) + self.vector_in(y)
        img, txt = flux.x_embedder(packed(x)), flux.context_embedder(context)
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec=vec, pe=pe)
        return flux.proj_out(flux.norm_out(img[:, txt.shape[1] :], vec))


def packed(x):
    """[B, C, H, W] -> [B, HW/4, 4C]"""
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, C, H/2, W/2, 2, 2]
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def test_a_patch_of_flux_does_there_what_it_does_in_diffusers(comfyui, tmp_path):
    flux = PIPELINES["FluxTransformer2DModel"].build().transformer
    patch = Patch.create(flux, PatchConfig(grid=[4, 4]))
    draw_weights(patch.parameters(), std=3.0)
    patch.save_pretrained(tmp_path / "patch")
    x, context, y = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 24), torch.randn(2, 12)
    timestep, guidance = torch.tensor([0.7, 0.2]), torch.tensor([3.5, 3.5])
    image = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    ids = {"img_ids": image, "txt_ids": torch.zeros(5, 3)}
    text = {"encoder_hidden_states": context, "pooled_projections": y}

    def in_diffusers():
        return flux(hidden_states=packed(x), timestep=timestep, guidance=guidance, **text, **ids).sample

    base = in_diffusers()
    with patch.attach(flux):
        expected = in_diffusers()
    there = ComfyFlux(flux, text=5)
    pe = flux.pos_embed(torch.cat([ids["txt_ids"], image]))
    node = comfyui.NODE_CLASS_MAPPINGS["StagepatchLoadPatch"]
    (patched,) = node().load(Patcher(there), str(tmp_path / "patch"), 1.0)
    (wrapper,) = patched.wrappers

    class Executor:
        class_obj = types.SimpleNamespace(diffusion_model=there)

        def __call__(self, *args):
            return there(*args, pe=pe)

    arguments = (x, timestep, context, y, guidance)
    torch.testing.assert_close(there(*arguments, pe=pe), base)
    torch.testing.assert_close(wrapper(Executor(), *arguments), expected)
    assert not torch.allclose(base, expected, atol=1e-2)
    torch.testing.assert_close(there(*arguments, pe=pe), base, msg="nothing stays on the model")

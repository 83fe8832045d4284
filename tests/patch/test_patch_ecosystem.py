"""A patch among what people do with a pipeline: several patches, LoRAs, offloading, precision, compiling, guidance."""

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict

from stagepatch.patch import Patch, PatchConfig, patches_on
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES

SD = PIPELINES["UNet2DConditionModel"]
DENOISERS = ["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]


def drawn(pipe, seed=3, size=None, **choices):
    patch = Patch.create(pipe, PatchConfig(sample_size=size, **choices))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in patch.named_parameters():
        parameter.data.normal_(std=20.0 if name.startswith("prompts") else 0.1, generator=generator)
    return patch


@pytest.fixture(params=DENOISERS)
def tiny(request):
    return PIPELINES[request.param]


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def test_scale_leads_from_the_base_images_to_the_patched_ones(tiny):
    pipe = tiny.build()
    base = tiny.call(pipe)
    patch = drawn(pipe, size=tiny.sample_size)
    patch.attach(pipe)
    distances = []
    for scale in (0.0, 0.5, 1.0):
        patch.scale = scale
        distances.append((tiny.call(pipe) - base).norm())
    assert 0 == distances[0] < distances[1] < distances[2]


def test_all_patches_of_a_pipeline_go_off_and_on_again():
    pipe = SD.build()
    base = SD.call(pipe)
    patches = [drawn(pipe, seed=seed) for seed in (1, 2)]
    for patch in patches:
        patch.attach(pipe)
    patched = SD.call(pipe)
    assert patches_on(pipe) == patches
    for enabled, expected in ((False, base), (True, patched)):
        for patch in patches_on(pipe):
            patch.enabled = enabled
        assert torch.equal(SD.call(pipe), expected)


def test_several_patches_add_up_each_with_its_scale():
    """With plain prompts: two patches at half scale are one with the mean of their prompts."""
    family = FAMILIES["UNet2DConditionModel"]
    model = family.model().double()
    one, other, mean = (drawn(model, seed=seed, gate="none").double() for seed in (1, 2, 3))
    for ours, a, b in zip(mean.prompts, one.prompts, other.prompts, strict=True):
        ours.data = 0.25 * a.data + 0.75 * b.data
    one.scale, other.scale = 0.25, 0.75
    with one.attach(model), other.attach(model):
        both = family.call(model)
    with mean.attach(model):
        torch.testing.assert_close(family.call(model), both, rtol=1e-10, atol=1e-10)


def test_patch_goes_on_the_denoiser_that_is_named():
    wan = PIPELINES["WanTransformer3DModel"]
    pipe = wan.build()
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    patch = Patch.create(pipe, PatchConfig(sample_size=wan.sample_size), component="transformer_2")
    patch.attach(pipe, component="transformer_2")
    assert patches_on(pipe, "transformer_2") == [patch]
    assert patches_on(pipe, "transformer") == []


def lora_files(pipe, directory):
    """A LoRA of random weights, as `pipe.save_lora_weights` writes it."""
    torch.manual_seed(0)
    model = copy.deepcopy(denoiser(pipe))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    name = "unet_lora_layers" if hasattr(pipe, "unet") else "transformer_lora_layers"
    type(pipe).save_lora_weights(directory, **{name: layers})


def test_patch_and_lora_live_side_by_side_in_either_order(tiny, tmp_path):
    pipe = tiny.build()
    base = tiny.call(pipe)
    lora_files(pipe, tmp_path)
    patch = drawn(pipe, size=tiny.sample_size)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    with_lora = tiny.call(pipe)
    assert not torch.allclose(with_lora, base, atol=1e-3)
    handle = patch.attach(pipe)
    both = tiny.call(pipe)
    assert not torch.allclose(both, with_lora, atol=1e-3)
    handle.detach()
    torch.testing.assert_close(tiny.call(pipe), with_lora)
    pipe.unload_lora_weights()
    torch.testing.assert_close(tiny.call(pipe), base)

    patch.attach(pipe)
    patched = tiny.call(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    torch.testing.assert_close(tiny.call(pipe), both)
    pipe.disable_lora()
    torch.testing.assert_close(tiny.call(pipe), patched)


def test_prompts_that_are_attended_to_go_through_the_lora(tmp_path):
    pipe = SD.build()
    lora_files(pipe, tmp_path)
    patch = drawn(pipe, sites="attention", position="prepend")
    pipe.load_lora_weights(tmp_path)
    with_lora = SD.call(pipe)
    patch.attach(pipe)
    assert not torch.allclose(SD.call(pipe), with_lora, atol=1e-3)
    patch.scale = 0.0
    torch.testing.assert_close(SD.call(pipe), with_lora)


# What a pipeline's `enable_..._offload` does to each model; the pipeline itself asks for an accelerator.
CPU = torch.device("cpu")
OFFLOADS = {
    "model": lambda model: cpu_offload_with_hook(model, CPU),
    "sequential": lambda model: cpu_offload(model, CPU, offload_buffers=False),
    "groups": lambda model: apply_group_offloading(model, CPU, offload_type="block_level", num_blocks_per_group=1),
    "leaves": lambda model: apply_group_offloading(model, CPU, offload_type="leaf_level"),
}


@pytest.mark.parametrize("way", OFFLOADS)
@pytest.mark.parametrize("first", ["patch", "offload"])
def test_offloaded_pipeline_makes_the_same_patched_images(tiny, way, first):
    pipe = tiny.build()
    patch = drawn(pipe, size=tiny.sample_size)
    base = tiny.call(pipe)
    with patch.attach(pipe):
        expected = tiny.call(pipe)
    assert not torch.allclose(expected, base, atol=1e-3)
    if first == "patch":
        patch.attach(pipe)
    OFFLOADS[way](denoiser(pipe))
    assert next(denoiser(pipe).parameters()).is_meta == (way == "sequential")
    if first == "offload":
        patch.attach(pipe)
    for _ in range(2):
        assert torch.equal(tiny.call(pipe), expected)
    patch.enabled = False
    assert torch.equal(tiny.call(pipe), base)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"])
def test_offloaded_pipeline_on_an_accelerator(way):
    pipe = SD.build()
    patch = drawn(pipe)
    more = {"onload_device": torch.device("cuda"), "offload_type": "leaf_level"} if "group" in way else {}
    getattr(pipe, way)(**more)
    base = SD.call(pipe)
    with patch.attach(pipe):
        assert not torch.allclose(SD.call(pipe), base, atol=1e-3)
    torch.testing.assert_close(SD.call(pipe), base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_pipeline_is_patched_by_a_float32_patch(tmp_path, dtype):
    pipe = SD.build()
    patch = drawn(pipe)
    pipe.save_pretrained(tmp_path)
    with patch.attach(pipe):
        expected = SD.call(pipe)
    half = type(pipe).from_pretrained(tmp_path, torch_dtype=dtype)
    base = SD.call(half)
    with patch.attach(half):
        patched = SD.call(half)
    assert half.unet.dtype == dtype
    assert patch.prompts[0].dtype == torch.float32
    assert not torch.allclose(patched, base, atol=1e-2)
    assert (patched.float() - expected).abs().mean() < 0.25 * (base.float() - expected).abs().mean()


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, None) for name in ("DiT", "UNet2DConditionModel", "SD3Transformer2DModel")),
        ("WanTransformer3DModel", [3, 8, 8]),
        ("FluxTransformer2DModel", [8, 8]),
    ],
)
def test_compiled_in_one_graph_it_equals_eager(name, size):
    """But for Flux: its graph breaks where its grid is read."""
    family = FAMILIES[name]
    model = family.model()
    drawn(model, size=size).attach(model)
    compiled = torch.compile(model, fullgraph=not name.startswith("Flux"), backend="eager")
    with torch.no_grad():
        inputs = family.inputs(model, 2, *family.size)
        expected, output = (each(**inputs, return_dict=False)[0] for each in (model, compiled))
    assert expected.isfinite().all()
    torch.testing.assert_close(output, expected)


def test_compiled_blocks_equal_eager(tiny):
    pipe = tiny.build()
    drawn(pipe, size=tiny.sample_size).attach(pipe)
    expected = tiny.call(pipe)
    model = denoiser(pipe)
    if not getattr(model, "_repeated_blocks", None):
        pytest.skip("the model names no blocks to compile")
    model.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(tiny.call(pipe), expected, rtol=1e-4, atol=1e-4)


def test_guidance_in_one_pass_and_in_two_is_the_same():
    """A batch of conditional and unconditional rows, as most pipelines do it, and a forward for each."""
    family = FAMILIES["SD3Transformer2DModel"]
    model = family.model()
    drawn(model).attach(model)
    inputs = family.inputs(model, 1, 8, 8)
    null = {**inputs, "encoder_hidden_states": torch.zeros_like(inputs["encoder_hidden_states"])}
    both = {name: torch.cat([inputs[name], null[name]]) for name in inputs}
    in_one = model(**both, return_dict=False)[0]
    in_two = torch.cat([model(**each, return_dict=False)[0] for each in (inputs, null)])
    torch.testing.assert_close(in_one, in_two, rtol=1e-4, atol=1e-5)
    assert in_one.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_pipeline_is_patched_with_guidance_and_without(scale):
    pipe = SD.build()
    base = SD.call(pipe, guidance_scale=scale)
    with drawn(pipe).attach(pipe):
        assert not torch.allclose(SD.call(pipe, guidance_scale=scale), base, atol=1e-3)


def test_fused_projections_are_told_to_be_unfused_for_prepending():
    pipe = SD.build()
    patch = drawn(pipe, sites="attention", position="prepend")
    pipe.fuse_qkv_projections()
    patch.attach(pipe)
    with pytest.raises(ValueError, match=r"call unfuse_qkv_projections\(\) first"):
        SD.call(pipe)
    pipe.unfuse_qkv_projections()
    assert SD.call(pipe).isfinite().all()

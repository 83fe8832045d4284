"""A frozen base in less memory: what it computes, what learns on it, and what is refused."""

import copy
import json
import shutil
import warnings
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

from stagepatch.checkpoints import (
    MemoryConfig,
    has_plain_weights,
    is_plain,
    load_denoiser,
    load_pipeline,
    memory,
    module_fingerprint,
    save_denoiser,
)
from stagepatch.cli import main
from stagepatch.core import UserError
from stagepatch.families import input_dtype
from stagepatch.methods import BitFit, LoRA, LoRAConfig, load_learned
from stagepatch.patch import Patch, PatchConfig
from stagepatch.sampling import SamplingConfig, attach_guide
from stagepatch.training import TrainConfig, read_log, train_all
from tests.runs import options
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES

SD3 = FAMILIES["SD3Transformer2DModel"]
# bitsandbytes packs rows of 64 numbers on a CPU.
WIDE = {"num_attention_heads": 4, "caption_projection_dim": 64}
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with a model, `transformer/`, and, where there is a library for it, a GGUF file, `model.gguf`."""
    directory = tmp_path_factory.mktemp("base")
    model = SD3.model(**WIDE)
    save_denoiser(model, DDPMScheduler(), directory)
    if find_spec("gguf"):
        write_gguf(model, directory / "model.gguf")
    return directory


def write_gguf(model, path):
    """As converters do: matrices in blocks of 32 numbers of 8 bits, the rest in float32."""
    import gguf

    writer, kind = gguf.GGUFWriter(str(path), "sd3"), gguf.GGMLQuantizationType.Q8_0
    for name, value in model.state_dict().items():
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_gguf(layer):
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = gguf.quants.quantize(layer.weight.numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(blocks, kind))


def in_float8(layer):
    return layer.weight.to(torch.float8_e4m3fn).float()


def in_torchao(kind):
    def quantized(layer):
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        layer = copy.deepcopy(layer)
        quantize_(layer, {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]())
        return layer.weight.dequantize()

    return quantized


def in_nf4(layer):
    from bitsandbytes import functional

    return functional.dequantize_4bit(*functional.quantize_4bit(layer.weight.data, quant_type="nf4"))


def in_int8(layer):
    """Rows of at most 127, LLM.int8() (arXiv 2208.07339) without its outliers."""
    scale = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    return (layer.weight / scale).round() * scale


# What holds a base, its library, what it makes of a layer's weights by that library alone, and how near it computes.
# diffusers multiplies GGUF's blocks in float16; of int8, bitsandbytes rounds what goes into a layer too.
WAYS = {
    "gguf": ("gguf", in_gguf, 1e-3),
    "layerwise_casting": ("torch", in_float8, 1e-5),
    "torchao_int8": ("torchao", in_torchao("int8"), 1e-5),
    "torchao_fp8": ("torchao", in_torchao("fp8"), 1e-5),
    "bitsandbytes_nf4": ("bitsandbytes", in_nf4, 1e-5),
    "bitsandbytes_int8": ("bitsandbytes", in_int8, 0.03),
}


def config(name, base):
    if name == "gguf":
        return MemoryConfig(gguf=str(base / "model.gguf"))
    return MemoryConfig(layerwise_casting=True) if name == "layerwise_casting" else MemoryConfig(quantization=name)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The name of a way that can be run here.

    diffusers' own check refuses bitsandbytes on a CPU, which has it. There it has layers of its own for sampling,
    which do not train after; here are those of every device.
    """
    library = WAYS[request.param][0]
    pytest.importorskip(library)
    if library == "bitsandbytes":
        from diffusers.quantizers.bitsandbytes import bnb_quantizer

        for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            monkeypatch.setattr(kind, "validate_environment", lambda *_, **__: None)
            monkeypatch.setattr(kind, "update_device_map", lambda *_: {"": "cpu"})
        monkeypatch.setattr(memory, "processes", lambda: SimpleNamespace(device=torch.device("cuda")))
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    return request.param


@pytest.fixture
def held(way, base):
    return load_denoiser(base, memory=config(way, base))[0].requires_grad_(False)


def test_layers_of_blocks_are_what_the_library_makes_of_them_and_the_rest_is_as_it_was(way, held, base):
    expected = load_denoiser(base)[0].requires_grad_(False)
    _, quantized, tolerance = WAYS[way]
    rest = dict(expected.named_modules())
    for path, layer in memory.block_layers(expected).items():
        layer.weight.data = quantized(rest.pop(path))
        if way == "layerwise_casting":
            layer.bias.data = layer.bias.to(torch.float8_e4m3fn).float()
    if way == "gguf":  # which holds what its writer put in
        for layer in rest.values():
            if isinstance(layer, nn.Linear) and layer.in_features % 32 == 0:
                layer.weight.data = quantized(layer)
    theirs, ours = SD3.call(expected), SD3.call(held)
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    assert not torch.equal(theirs, SD3.call(load_denoiser(base)[0])), "the weights do change"
    if way != "gguf":
        kept = {name: value for name, value in held.named_parameters() if name.rpartition(".")[0] in rest}
        assert all(type(value) is nn.Parameter and value.dtype == torch.float32 for value in kept.values())
    assert input_dtype(held) == torch.float32
    assert not has_plain_weights(held)


def test_what_learns_on_it_starts_at_nothing_is_reached_by_gradients_and_loads_on_the_plain_model(
    held, base, tmp_path
):
    before = SD3.call(held)
    patch = Patch.create(held, PatchConfig(condition="t+c")).train()
    with patch.attach(held):
        assert torch.equal(SD3.call(held), before)
        for prompts in patch.prompts:
            prompts.data.normal_(std=0.1)
        SD3.call(held).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in patch.parameters())
    patch.save_pretrained(tmp_path / "patch")

    lora = LoRA(LoRAConfig(rank=2))
    [group] = lora.prepare(held)
    assert torch.equal(SD3.call(held), before)
    for parameter in group["params"]:
        parameter.data.normal_(std=0.1)
    SD3.call(held).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in group["params"])
    lora.save(tmp_path / "lora")
    learned = SD3.call(held)
    lora.fuse()
    assert torch.equal(SD3.call(held), learned), "it stays an adapter"

    for name in ("patch", "lora"):
        plain, _ = load_denoiser(base)
        untouched = SD3.call(plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of other weights
            load_learned(plain, tmp_path / name)
        assert not torch.allclose(SD3.call(plain), untouched, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Patch.create(plain).attach(held)


def test_a_guide_shares_its_memory(way, base, tmp_path):
    given = config(way, base)
    plain, _ = load_denoiser(base)
    lora = LoRA(LoRAConfig(rank=2))
    for parameter in lora.prepare(plain)[0]["params"]:
        parameter.data.normal_(std=0.1)
    lora.save(tmp_path / "lora")
    model, scheduler = load_denoiser(base, memory=given)
    worse, _ = load_denoiser(base, memory=given)
    load_learned(worse, tmp_path / "lora")
    with torch.no_grad():
        own, other = SD3.call(model), SD3.call(worse)
        attach_guide(model, scheduler, SamplingConfig(guide=str(tmp_path / "lora"), guide_scale=2.0))
        assert torch.allclose(SD3.call(model), other + 2.0 * (own - other), atol=1e-5)
    assert not torch.allclose(own, other, atol=1e-3)


def test_what_its_backward_pass_keeps_of_the_weights_is_as_the_config_says(way, base):
    """Of bytes that autograd keeps, most of the blocks' weights, or none. Modulation has no gradient to carry."""

    def kept_bytes(model):
        Patch.create(model, PatchConfig()).train().attach(model)
        own = {value.untyped_storage().data_ptr() for value in model.parameters() if is_plain(value)}
        kept = {}

        def keep(value):
            if value.numel() and type(value) is torch.Tensor and value.untyped_storage().data_ptr() not in own:
                kept[value.untyped_storage().data_ptr()] = value.numel() * value.element_size(), value
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            SD3.call(model)
        return sum(size for size, _ in kept.values())

    plain, given = load_denoiser(base)[0].requires_grad_(False), config(way, base)
    weights = sum(4 * layer.weight.numel() for layer in memory.block_layers(plain).values())
    share = (kept_bytes(load_denoiser(base, memory=given)[0].requires_grad_(False)) - kept_bytes(plain)) / weights
    assert share > 0.5 if given.needs_checkpointing else share < 0.01


def test_in_bfloat16_it_computes_in_bfloat16(way, base):
    model, _ = load_denoiser(base, torch.bfloat16, memory=config(way, base))
    plain, _ = load_denoiser(base, torch.bfloat16)
    assert input_dtype(model) == torch.bfloat16
    ours, theirs = (SD3.call(each).float() for each in (model, plain))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.15


def test_its_fingerprint_follows_its_weights(held):
    before = module_fingerprint(held)
    assert module_fingerprint(held) == before
    held.proj_out.bias.data += 1
    assert module_fingerprint(held) != before


def test_weights_are_not_put_on_it(held, tmp_path):
    from safetensors.torch import save_file

    save_file({f"{LAYER}.weight": torch.zeros(64, 64)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="weights for a model that is not quantised"):
        load_learned(held, tmp_path)


@pytest.mark.parametrize("way", ["torchao_int8", "bitsandbytes_nf4"], indirect=True)
def test_what_is_saved_quantised_opens_so(way, held, base, tmp_path):
    held.save_pretrained(tmp_path / "transformer")
    shutil.copytree(base / "scheduler", tmp_path / "scheduler")
    saved, _ = load_denoiser(tmp_path)
    assert torch.equal(SD3.call(saved), SD3.call(held))
    with pytest.raises(UserError, match="is quantised already"):
        load_denoiser(tmp_path, memory=config(way, base))
    with pytest.raises(UserError, match="trains the model's own weights, and these are quantised"):
        BitFit().prepare(saved)


def test_what_is_quantised_is_not_merged(base, tmp_path, capsys):
    save_denoiser(SD3.model(**WIDE), DDPMScheduler(), tmp_path / "stage")
    file = tmp_path / "stage" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "torchao"}}))
    stages = [
        f"--base={base}",
        f"--stages=[{tmp_path / 'stage'}]",
        "--weights=[1.0]",
        f"--output_dir={tmp_path / 'out'}",
    ]
    assert main(["merge", *stages]) == 2
    assert "are quantised, and such are not merged" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A whole pipeline, and images for it, as a first run left them cached."""
    from tests.training.test_train_on_pipelines import draw_images

    directory = tmp_path_factory.mktemp("pipeline")
    PIPELINES["SD3Transformer2DModel"].build().save_pretrained(directory / "model")
    draw_images(directory / "images", size=(16, 16))
    return directory


def command(pipeline, name, *more):
    training = {"steps": 2, "batch_size": 2, "log_every": 1, "learning_rate": 0.1, "tensorboard": False}
    own = [f"--model={pipeline / 'model'}", f"--output_dir={pipeline / name}", "--dtype=bfloat16"]
    if name == "run":
        own += [f"--data.source={pipeline / 'images'}", "--data.image_size=16", *options("training", training)]
    return ["train" if name == "run" else "sample", *own, *more]


CASTING = ("--memory.layerwise_casting", "--training.gradient_checkpointing")


def test_train_and_sample_take_it_and_a_run_goes_on_with_the_same_alone(pipeline, capsys):
    assert main(command(pipeline, "run", *CASTING, "--patch.initialization=normal")) == 0
    assert all(record["grad_norm"] > 0 for record in read_log(pipeline / "run"))
    assert main(command(pipeline, "run", "--patch.initialization=normal")) == 2
    assert "memory.layerwise_casting was True, is False" in " ".join(capsys.readouterr().err.split())
    sampled = [f"--patch={pipeline / 'run'}", "--prompts=[a cat]", *options("sampling", {"num_images": 1})]
    sampled += ["--sampling.num_inference_steps=2", "--call={height: 16, width: 16}", "--memory.layerwise_casting"]
    assert main(command(pipeline, "samples", *sampled)) == 0
    pipe = load_pipeline(pipeline / "model", MemoryConfig(layerwise_casting=True), torch_dtype=torch.bfloat16)
    assert pipe.transformer.get_submodule(LAYER).weight.dtype == torch.float8_e4m3fn
    assert pipe.vae.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--method=finetune", "--dtype=float32", *CASTING],
            "trains the model's own weights; memory.* is of a model that stays",
        ),
        (["--memory.layerwise_casting", "--memory.gguf=a.gguf"], "memory.gguf and memory.layerwise_casting are two"),
        (["--memory.layerwise_casting"], "needs training.gradient_checkpointing"),
        (["--memory.group_offload", CASTING[1]], "memory.group_offload needs an accelerator, and there is none here"),
        (["--memory.layerwise_casting", "--training.shard_base"], "training.shard_base and memory.* are two ways"),
        (["--memory.quantization=torchao_int8"], "needs training.gradient_checkpointing"),
        (["--memory.gguf=nowhere.gguf", CASTING[1]], "'nowhere.gguf' is no GGUF file"),
    ],
)
def test_what_cannot_be_is_refused_in_words(pipeline, capsys, given, message):
    assert main([*command(pipeline, "run"), f"--cache={pipeline / 'run' / 'cache'}", *given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_library_that_is_missing_is_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    (tmp_path / "model.gguf").touch()
    for name, library in (("gguf", "gguf"), ("torchao_int8", "torchao"), ("bitsandbytes_nf4", "bitsandbytes")):
        message = rf"needs {library}, which is not installed: pip install 'stagepatch\[quantization\]'"
        with pytest.raises(UserError, match=message):
            load_denoiser(base, memory=config(name, tmp_path))


def test_gguf_files_of_something_else_are_refused(base, tiny_dit, tmp_path):
    pytest.importorskip("gguf")
    given = MemoryConfig(gguf=str(base / "model.gguf"))
    save_denoiser(tiny_dit(), DDPMScheduler(), tmp_path / "dit")
    with pytest.raises(UserError, match="diffusers reads no GGUF file of DiT"):
        load_denoiser(tmp_path / "dit", memory=given)
    save_denoiser(SD3.model(num_layers=3, **WIDE), DDPMScheduler(), tmp_path / "deeper")
    with pytest.raises(UserError, match="holds no SD3Transformer2DModel of this config"):
        load_denoiser(tmp_path / "deeper", memory=given)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="holds no SD3Transformer2DModel of this config"):
        load_denoiser(base, memory=replace(given, gguf=str(tmp_path / "broken.gguf")))


def test_a_gguf_file_is_one_denoiser(monkeypatch, tmp_path):
    both = {"transformer": (0.0, 0.5), "transformer_2": (0.5, 1.0)}
    monkeypatch.setattr("stagepatch.training.several.denoiser_ranges", lambda _: both)
    with pytest.raises(UserError, match="is one denoiser: name it with --component"):
        train_all(TrainConfig(memory=MemoryConfig(gguf="a.gguf")))
    for name in both:
        (tmp_path / name).mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"is one denoiser; .* has transformer, transformer_2"):
        load_pipeline(tmp_path, MemoryConfig(gguf="a.gguf"))


def test_diffusers_is_told_which_layers_stay(base):
    """By paths that are no part of a layer's in the blocks: FLUX's blocks have a 'proj_out' as the model has."""
    pytest.importorskip("torchao")
    shape = FAMILIES["FluxTransformer2DModel"].model().to("meta")
    kept = memory.quantization_of(MemoryConfig(quantization="torchao_int8"), torch.bfloat16, shape)
    assert "x_embedder" in kept.modules_to_not_convert
    assert "norm_out.linear" in kept.modules_to_not_convert
    assert "proj_out" not in kept.modules_to_not_convert


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "WanTransformer3DModel", "UNet2DConditionModel"])
def test_gradients_do_not_see_weights_that_are_away_by_then(name, checkpointing, monkeypatch, tmp_path):
    """On a CPU nothing moves: weights are put on disk here, and are not a number outside of their layer's forward."""
    apply, offload, count = memory.apply_group_offloading, ModuleGroup.offload_, iter(range(1000))

    def to_disk(layer, device, **given):
        apply(layer, device, offload_to_disk_path=str(tmp_path / str(next(count))), **given)

    def and_gone(group):
        offload(group)
        for value in group.tensor_to_key:
            value.data.fill_(torch.nan)

    monkeypatch.setattr(memory, "apply_group_offloading", to_disk)
    monkeypatch.setattr(ModuleGroup, "offload_", and_gone)

    def gradients(is_away):
        family = FAMILIES[name]
        model = family.model()
        if is_away:
            memory.offload_layers(model, torch.device("cpu"))
            assert memory.is_offloaded(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        patch = Patch.create(model, PatchConfig()).train()
        patch.attach(model)
        [group] = LoRA(LoRAConfig(rank=2, targets="all")).prepare(model)
        learned = [*patch.parameters(), *group["params"]]
        generator = torch.Generator().manual_seed(0)
        for parameter in learned:
            parameter.data.normal_(std=0.1, generator=generator)
        family.call(model).square().mean().backward()
        if is_away:
            away = [value for part, value in model.named_parameters() if value.isnan().any()]
            assert len(away) >= len(memory.block_layers(model)) // 3
        return [parameter.grad for parameter in learned]

    for ours, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["group_offload", "bitsandbytes_nf4", "bitsandbytes_int8"])
def test_a_run_on_an_accelerator(pipeline, name):
    """Not run where this was written; on an accelerator with ACCELERATE_USE_CPU=false, which the tests set else."""
    given = ["--memory.group_offload"] if name == "group_offload" else [f"--memory.quantization={name}"]
    own = [f"--output_dir={pipeline / name}", f"--cache={pipeline / 'cache'}", CASTING[1]]
    assert main([*command(pipeline, "run"), *own, *given]) == 0
    assert all(record["grad_norm"] > 0 for record in read_log(pipeline / name))

import json

import pytest
import torch
from diffusers import AutoencoderKLFlux2, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from stagepatch.checkpoints import layout, load_denoiser, load_vae, module_fingerprint, save_denoiser
from stagepatch.core.errors import UserError
from stagepatch.families import input_dtype, predict
from tests.tiny import FAMILIES

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tiny_dit, tmp_path):
    save_denoiser(tiny_dit(), DDPMScheduler(beta_schedule="squaredcos_cap_v2"), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["DiT", "SD3Transformer2DModel", "WanTransformer3DModel", "UNet2DModel"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_read_in_the_dtype_that_diffusers_reads_them_in(tmp_path, name, stored):
    model = FAMILIES[name].model()
    save_denoiser(model.to(stored), DDPMScheduler(), tmp_path)
    loaded, _ = load_denoiser(tmp_path, torch.bfloat16)
    part = "unet" if name.startswith("UNet") else "transformer"
    expected = type(model).from_pretrained(tmp_path / part, torch_dtype=torch.bfloat16)
    theirs = expected.state_dict()
    assert {key: value.dtype for key, value in loaded.state_dict().items()} == {
        key: value.dtype for key, value in theirs.items()
    }
    assert all(torch.equal(value, theirs[key]) for key, value in loaded.state_dict().items())
    kept = {value.dtype for value in theirs.values()} - {torch.bfloat16}
    assert kept == ({torch.float32} if name.startswith("Wan") else set()), "what the test is about is in it"


def test_a_model_computes_in_its_dtype_not_in_that_of_its_first_parameter(tmp_path):
    family = FAMILIES["WanTransformer3DModel"]
    save_denoiser(family.model(), DDPMScheduler(), tmp_path)
    model, _ = load_denoiser(tmp_path, torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    assert input_dtype(model) == torch.bfloat16
    quantized = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)).to(torch.bfloat16)
    quantized[0].weight = torch.nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    assert input_dtype(quantized) == torch.bfloat16


@pytest.mark.parametrize("conditioning", ["class", "none"])
def test_saved_denoiser_comes_back_with_its_scheduler(tiny_dit, batch, tmp_path, conditioning):
    model = tiny_dit(conditioning=conditioning)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", num_train_timesteps=500)
    save_denoiser(model.train(), scheduler, tmp_path / "new")
    loaded, loaded_scheduler = load_denoiser(str(tmp_path / "new"))
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(predict(loaded, *batch), predict(model.eval(), *batch))
    assert (type(loaded_scheduler), loaded_scheduler.config.num_train_timesteps) == (DDIMScheduler, 500)
    assert torch.equal(loaded_scheduler.alphas_cumprod, scheduler.alphas_cumprod)


def test_directory_is_laid_out_as_a_pipelines(saved):
    files = sorted(str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file())
    assert files == ["scheduler/scheduler_config.json", "transformer/config.json", WEIGHTS]


def test_denoiser_may_be_called_unet(saved, batch):
    expected = predict(load_denoiser(saved)[0], *batch)
    (saved / "transformer").rename(saved / "unet")
    assert torch.equal(predict(load_denoiser(saved)[0], *batch), expected)


def test_model_class_of_diffusers_is_loaded(tmp_path):
    model = FAMILIES["DiTTransformer2DModel"].model()
    save_denoiser(model, DDPMScheduler(), tmp_path)
    loaded, _ = load_denoiser(tmp_path)
    assert isinstance(loaded, DiTTransformer2DModel)
    assert module_fingerprint(loaded) == module_fingerprint(model)


def test_bundled_name_stands_for_its_directory(saved, batch, monkeypatch):
    monkeypatch.setitem(layout.BUNDLED, "digits", saved)
    assert torch.equal(predict(load_denoiser("digits")[0], *batch), predict(load_denoiser(saved)[0], *batch))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"No model at '.*nowhere': give a model directory, a Hub id, or one of: digits"),
        ("", "neither 'transformer/' nor 'unet/'"),
    ],
)
def test_what_is_no_model_directory_is_refused(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load_denoiser(tmp_path / name)


@pytest.mark.parametrize("name", ["transformer/config.json", WEIGHTS, "scheduler/scheduler_config.json"])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"No such file: '.*{name}'"):
        load_denoiser(saved)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("transformer/config.json", {"num_layers": 10**9}, "num_layers=1000000000: more than 1,000 are not made"),
        ("transformer/config.json", {"sample_size": 10**6}, "sample_size=1000000 by patch_size=2 is more tokens"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "=1000000000: more than 1,000,000"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_config_that_takes_memory_without_end_is_refused(saved, name, changes, message):
    config = json.loads((saved / name).read_text())
    (saved / name).write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        load_denoiser(saved)


@pytest.mark.parametrize(
    "tensors",
    [
        {"stagepatch_projection.maps.x": torch.zeros(1)},
        {"stagepatch_projection.maps.99": torch.zeros(1)},
        {"stagepatch_projection.maps.-1": torch.zeros(1)},
        {"stagepatch_routing.windows": torch.zeros(3)},
        {"stagepatch_routing.windows": torch.zeros(0, 2, dtype=torch.int64)},
    ],
    ids=str,
)
def test_parts_of_ours_that_are_not_as_they_are_made_are_refused(saved, tensors):
    save_file(load_file(saved / WEIGHTS) | tensors, saved / WEIGHTS)
    with pytest.raises(UserError, match=r"projections that its model has no place for|Windows of routing are"):
        load_denoiser(saved)


@pytest.mark.parametrize("boundary", ["x", -0.1, 1.5, [0.5], float("nan")])
def test_a_boundary_that_is_no_noise_level_is_refused(saved, boundary):
    (saved / "transformer_2").mkdir()
    (saved / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}))
    with pytest.raises(UserError, match=r"boundary_ratio=.*: expected a noise level from 0 to 1"):
        load_denoiser(saved)


@pytest.mark.parametrize("kept", [0, 50, -1])
def test_truncated_weights_are_refused(saved, kept):
    path = saved / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"safetensors' is not a (whole )?safetensors file"):
        load_denoiser(saved)


NO_MODELS, NO_SCHEDULERS = ["MyUNet", "DIT_SIZES", "DDPMScheduler", None], ["MyScheduler", "UNet2DModel", None]
NO_MODEL = "names the class '{_class_name}', which is no model known here"
NO_SCHEDULER = "names the scheduler '{_class_name}'"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        *(("transformer/config", {"_class_name": name}, NO_MODEL) for name in NO_MODELS),
        *(("scheduler/scheduler_config", {"_class_name": name}, NO_SCHEDULER) for name in NO_SCHEDULERS),
        ("transformer/config", {"hidden_size": 48}, "does not hold the DiT"),
    ],
)
def test_config_of_something_else_is_refused(saved, file, changes, message):
    path = saved / f"{file}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message.format(**changes)):
        load_denoiser(saved)


BIAS = "x_embedder.proj.bias"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda tensors: tensors.pop(BIAS), BIAS),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "extra"),
        (lambda tensors: tensors.update({BIAS: torch.ones(7)}), BIAS),
    ],
    ids=["missing", "extra", "shape"],
)
def test_weights_of_another_model_are_refused(saved, change, name):
    tensors = load_file(saved / WEIGHTS)
    change(tensors)
    save_file(tensors, saved / WEIGHTS)
    message = f"does not hold the DiT that its config.json describes: 1 tensors differ, first '{name}'"
    with pytest.raises(UserError, match=message):
        load_denoiser(saved)


def test_denoiser_in_another_precision(saved):
    model, _ = load_denoiser(saved, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_statistics_of_cells_come_in_one_order_whatever_the_model(tmp_path):
    """Ideogram 4's count pixels and then channels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 8, "latent_channels": 2}
    vae = AutoencoderKLFlux2(**blocks, **sizes)
    vae.bn.running_mean = torch.arange(8.0)
    vae.save_pretrained(tmp_path / "vae")
    orders = {"Ideogram4": [0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0], "Flux2": list(range(8))}
    for kind, order in orders.items():
        index = {"transformer": ["diffusers", f"{kind}Transformer2DModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert load_vae(tmp_path).bn.running_mean.tolist() == order

"""Wavelet gates (Spectral Diffusion, arXiv 2211.17106): by hand, against scipy and torch's pooling, and used."""

import copy
import signal

import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from stagepatch.cli import main
from stagepatch.core import UserError, read_json, write_json
from stagepatch.methods import Wavelet, WaveletConfig, load_learned, open_artifact
from stagepatch.methods.wavelet import CONFIG_NAME, FILE_NAME
from stagepatch.methods.wavelet_gates import haar, inverse_haar
from tests.runs import Strike, draw_weights, iteration_of, options, run, train_job
from tests.tiny import FAMILIES

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "conditioning": "none",
    "learn_sigma": "false",
    "block_out_channels": [8, 16],
}


def gates_on(model, std=0.3, **choices):
    """A method whose gates are drawn."""
    method = Wavelet(WaveletConfig(**{"hidden_channels": 4, **choices}))
    method.prepare(model)
    draw_weights(method.gates.parameters(), std)
    return method


def test_bands_of_two_by_two_by_hand():
    bands = haar(torch.tensor([[1.0, 2.0], [3.0, 8.0]])[None, None])
    assert bands.flatten().tolist() == [7.0, -3.0, -4.0, 2.0]  # (1+2+3+8)/2, (1-2+3-8)/2, (1+2-3-8)/2, (1-2-3+8)/2


def test_bands_are_those_of_the_matrix_along_both_sides():
    maps = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    two = torch.from_numpy(scipy.linalg.hadamard(2) / 2**0.5)
    rows, columns = (torch.block_diag(*[two] * (side // 2)) for side in (6, 4))
    whole = rows @ maps @ columns.T
    expected = [whole[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    torch.testing.assert_close(haar(maps), torch.stack(expected, dim=2))
    torch.testing.assert_close(inverse_haar(haar(maps)), maps)


@pytest.mark.parametrize("band", [0, 3])
def test_one_band_alone(band):
    """All that is low is the mean of two by two; of a checkerboard, all is in the highest band."""
    gates = gates_on(FAMILIES["UNet2DModel"].model(), 0.0).gates
    maps = torch.randn(2, gates.backbone.sites[1].channels, 4, 6)
    wanted = torch.full((maps.shape[1], 4), -40.0)
    wanted[:, band] = 40.0  # sigmoid 1, so g = 2
    gates.gates[1][2].bias.data = wanted.flatten()
    if band == 0:
        expected = 2 * F.interpolate(F.avg_pool2d(maps, 2), scale_factor=2, mode="nearest")
    else:
        maps = maps[..., :1, :1] * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 3)
        expected = 2 * maps
    torch.testing.assert_close(gates.enter(1, maps), expected)


@pytest.mark.parametrize("gate_input", ["features", "timestep", "both"])
def test_a_gate_is_the_network_written_out(gate_input):
    model = FAMILIES["UNet2DModel"].model()
    gates = gates_on(model, gate_input=gate_input).gates
    maps, seen = [], []
    model.time_embedding.register_forward_hook(lambda module, args, output: seen.append(output))
    block = model.get_submodule(gates.backbone.sites[1].module)
    for prepend in (True, False):  # what the gate sees, and what the block does
        block.register_forward_pre_hook(
            lambda module, args, kwargs: maps.append(args[0] if args else kwargs["hidden_states"]),
            prepend=prepend,
            with_kwargs=True,
        )
    FAMILIES["UNet2DModel"].call(model, 3)
    before, after = maps
    parts = {"features": [before.mean(dim=(2, 3))], "timestep": seen}
    condition = torch.cat(parts["features"] + parts["timestep"] if gate_input == "both" else parts[gate_input], dim=1)
    first, _, last = gates.gates[1]
    weights = 2 / (1 + torch.exp(-(F.silu(condition @ first.weight.T + first.bias) @ last.weight.T + last.bias)))
    expected = inverse_haar(weights.view(3, -1, 4, 1, 1) * haar(before))
    assert not torch.allclose(after, before, atol=0.1)
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("name", ["UNet2DModel", "DiT", "PixArtTransformer2DModel"])
@pytest.mark.parametrize("size", [(8, 8), (12, 10)])
def test_a_model_starts_as_it_was_at_any_size(name, size):
    """Of 10 latents' width a token grid, or the second stage, has 5: an odd side."""
    family = FAMILIES[name]
    model = family.model()
    base = family.call(model, size=size)
    method = Wavelet(WaveletConfig("both"))
    method.prepare(model)
    assert torch.equal(family.call(model, size=size), base)
    draw_weights(method.gates.parameters())
    changed = family.call(model, size=size).detach()
    assert (changed - base).abs().max() > 1e-3
    assert torch.equal(family.call(copy.deepcopy(model), size=size), changed)
    method.gates.enabled = False
    assert torch.equal(family.call(model, size=size), base)


def test_gradients_are_those_of_finite_differences_and_the_base_has_none():
    model = FAMILIES["UNet2DModel"].model()
    method = gates_on(model)
    FAMILIES["UNet2DModel"].call(model).square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in method.gates.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    gates = method.gates.double()
    maps = torch.randn(1, gates.backbone.sites[0].channels, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda maps, *_: gates.enter(0, maps), (maps, *gates.gates[0].parameters()))


def test_half_precision_stays():
    model = FAMILIES["DiT"].model()
    gates = gates_on(model).gates
    tokens = torch.randn(2, 16, gates.backbone.sites[0].channels)
    half = gates.enter(0, tokens.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), gates.enter(0, tokens), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "odd",
    [{"sites": 5}, {"sites": None}, {"wavelet": []}, {"wavelet": 3}]
    + [{"wavelet": {name: value}} for name, value in (("hidden_channels", "x"), ("gate_input", 5), ("x", 1))],
    ids=str,
)
def test_an_odd_config_is_refused(tmp_path, odd):
    model = FAMILIES["UNet2DModel"].model()
    gates_on(model).save(tmp_path)
    write_json(tmp_path / CONFIG_NAME, read_json(tmp_path / CONFIG_NAME) | odd)
    with pytest.raises(UserError, match=r"is not of wavelet gates|wavelet gates for UNet2DModel with 0 sites"):
        load_learned(FAMILIES["UNet2DModel"].model(), tmp_path)


def test_what_was_saved_comes_back_on_its_own_model_alone(tmp_path):
    family = FAMILIES["UNet2DModel"]
    model = family.model()
    gates_on(model, gate_input="both").save(tmp_path)
    assert open_artifact(tmp_path).kind == "wavelet gates"
    loaded = load_learned(other := family.model(), tmp_path)
    assert loaded.config == WaveletConfig("both", 4)
    assert torch.equal(family.call(other), family.call(model))
    wider = FAMILIES["DiT"].model()
    with pytest.raises(UserError, match="wavelet gates for UNet2DModel with 5 sites"):
        load_learned(wider, tmp_path)
    assert not any(module._forward_pre_hooks for module in wider.modules())
    fresh = Wavelet(WaveletConfig("both", 4))
    fresh.prepare(third := family.model())
    fresh.start_from(third, tmp_path)
    assert torch.equal(family.call(third), family.call(model))
    other_choices = Wavelet(WaveletConfig("features", 4))
    other_choices.prepare(family.model())
    with pytest.raises(UserError, match="gates of another config"):
        other_choices.start_from(model, tmp_path)
    content = read_json(tmp_path / CONFIG_NAME)
    content["wavelet"]["hidden_channels"] = 10**12  # more than there is memory for
    write_json(tmp_path / CONFIG_NAME, content)
    with pytest.raises(UserError, match="does not hold these gates"):
        load_learned(family.model(), tmp_path)
    (tmp_path / "wavelet.json").unlink()
    assert open_artifact(tmp_path).kind == "part of wavelet gates"


def test_a_killed_run_goes_on_to_the_same_gates(tmp_path, processes):
    given, choices = {"steps": 9, "checkpoint_every": 4, "ema_decay": 0.5}, WaveletConfig("both", 4)
    run(tmp_path / "whole", method=Wavelet(choices), **given)
    strike = Strike("iteration", 7)
    job = {"directory": tmp_path / "killed", "method": Wavelet(choices), **given}
    processes.call(train_job, -signal.SIGKILL, strike=strike, **job)
    assert iteration_of(tmp_path / "killed") == 4
    run(tmp_path / "killed", method=Wavelet(choices), **given)
    whole, killed = (load_file(tmp_path / name / FILE_NAME) for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


def test_a_unet_of_digits_is_trained_and_sampled(tmp_path, capsys):
    few = [*options("training", {"steps": 2, "batch_size": 4, "learning_rate": 0.1}), "--data.source=digits"]
    base, learned = tmp_path / "base", tmp_path / "learned"
    drawn = [*options("model", UNET), f"--output_dir={base}", "--training.steps=0", "--data.source=digits"]
    assert main(["pretrain", *drawn]) == 0
    train = [
        "train",
        f"--model={base}",
        "--method=wavelet",
        "--wavelet.gate_input=both",
        f"--output_dir={learned}",
        *few,
    ]
    assert main(train) == 0
    samples = {}
    for patch in ("", str(learned)):
        place = tmp_path / f"samples{len(samples)}"
        sample = ["sample", f"--model={base}", f"--patch={patch}", f"--output_dir={place}"]
        assert main([*sample, "--sampling.num_images=2", "--sampling.num_inference_steps=2"]) == 0
        (samples[patch],) = load_file(place / "samples.safetensors").values()
    assert not torch.equal(*samples.values())
    capsys.readouterr()
    assert main(["inspect", str(learned)]) == 0
    assert "wavelet gate_input" in capsys.readouterr().out
    assert main([*sample, "--patch_scale=0.5"]) == 2
    assert "what wavelet learned" in capsys.readouterr().err
    assert main([*train, "--wavelet.gate_input=features"]) == 2
    assert "wavelet" in capsys.readouterr().err
    assert main(["train", "--method=wavelet", "--wavelet.hidden_channels=0"]) == 2
    assert "hidden_channels=0 must be at least 1" in capsys.readouterr().err

"""Direct discriminative optimization (arXiv 2503.01103) against its formula, with a second copy as reference."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.core import FAKES, UserError, read_tensors, seed_for
from stagepatch.data import CachedLatents, ImageDataset
from stagepatch.methods import DMP, Finetune, LoRA, LoRAConfig
from stagepatch.patch import PatchConfig
from stagepatch.sampling import Captions, Fakes, SamplingConfig, generate, load_fakes
from stagepatch.training import DDOConfig, Run, TrainConfig, TrainingConfig, read_log, train
from stagepatch.training.losses import DDOLoss
from tests.runs import (
    assert_same,
    config_of,
    draw_weights,
    make_dataset,
    make_model,
    make_objective,
    options,
    patch_of,
)
from tests.tiny_pipelines import PIPELINES
from tests.training.test_train_on_pipelines import draw_images
from tests.training.test_train_on_pipelines import train as train_on_images

METHODS = {
    "dmp": lambda: DMP(PatchConfig()),
    "prompts": lambda: DMP(PatchConfig(gate="none")),
    "lora": lambda: LoRA(LoRAConfig(rank=2)),
    "finetune": Finetune,
}


def draws(seed=0, count=3, channels=1):
    generator = torch.Generator().manual_seed(seed)
    real, fake, noise = (torch.randn(count, channels, 8, 8, generator=generator).double() for _ in range(3))
    timesteps = torch.tensor([3, 400, 950])[:count]
    labels = {"class_labels": torch.tensor([1, 5, 10])[:count]}
    return real, noise, timesteps, labels, fake, {"class_labels": torch.tensor([0, 5, 9])[:count]}


def prepared(name, objective, config=None, **model_choices):
    model = make_model(**model_choices).double()
    base = copy.deepcopy(model)
    method = METHODS[name]()
    parameters = [parameter for group in method.prepare(model) for parameter in group["params"]]
    for parameter in parameters:
        parameter.data = parameter.data.double()
    loss = DDOLoss(model, method, objective, nn.ParameterList(parameters), config or DDOConfig())
    return loss, base, parameters


def squared_error(model, objective, x_start, noise, timesteps, labels):
    """Sum over pixels of the error of what the objective's target is, by diffusers' own scheduler."""
    scheduler = objective.scheduler
    if objective.is_flow:
        sigma = (timesteps.double() + 1).view(-1, 1, 1, 1) / 1000
        x_t, told, target = (1 - sigma) * x_start + sigma * noise, (timesteps.double() + 1), noise - x_start
    else:
        x_t, told = scheduler.add_noise(x_start, noise, timesteps), timesteps
        is_epsilon = scheduler.config.prediction_type == "epsilon"
        target = noise if is_epsilon else scheduler.get_velocity(x_start, noise, timesteps)
    output = model(x_t, told, **labels).sample
    return (output - target).square().flatten(1).sum(dim=1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("name", list(METHODS))
def test_loss_and_gradient_are_those_of_the_formula_with_a_copy_as_reference(name, prediction):
    objective = make_objective(learn_sigma=False, prediction_type=prediction)
    config = DDOConfig(alpha=0.7, beta=0.3)
    loss, base, parameters = prepared(name, objective, config, learn_sigma=False)
    draw_weights(parameters, std=0.05, seed=3) if name != "finetune" else [p.data.mul_(1.01) for p in parameters]
    real, noise, timesteps, labels, fake, fake_labels = draws()
    found, logged = loss(real, noise, timesteps, labels, fake, fake_labels)
    extra, _ = loss.method.extra_loss()
    found = found if extra is None else found - extra
    own = torch.autograd.grad(found, parameters, allow_unused=True)

    def delta(x_start, conditions):
        now = squared_error(loss.model, objective, x_start, noise, timesteps, conditions)
        with torch.no_grad():
            then = squared_error(base, objective, x_start, noise, timesteps, conditions)
        return -(now - then)

    real_term = -F.logsigmoid(0.3 * delta(real, labels)).mean()
    expected = real_term - 0.7 * F.logsigmoid(-0.3 * delta(fake, fake_labels)).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.grad(expected, parameters, allow_unused=True)
    pairs = [(a, b) for a, b in zip(own, gradient, strict=True) if b is not None]
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # the loss is in float32
    change = squared_error(loss.model, objective, real, noise, timesteps, labels).mean()
    change = change / squared_error(base, objective, real, noise, timesteps, labels).mean() - 1
    assert float(logged["denoising_change"]) == pytest.approx(float(change.detach()), rel=1e-3)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_fresh_method_starts_at_log_two_a_term_and_falls(name):
    objective = make_objective()
    loss, _, parameters = prepared(name, objective, DDOConfig(alpha=2.0))
    first, logged = loss(*draws())
    extra, _ = loss.method.extra_loss()
    assert float(first.detach()) - float(0.0 if extra is None else extra.detach()) == pytest.approx(
        3 * math.log(2), abs=1e-6
    )
    assert float(logged["denoising_change"]) == pytest.approx(0.0, abs=1e-9)
    optimizer = torch.optim.AdamW(parameters, 3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        value, _ = loss(*draws())
        value.backward()
        optimizer.step()
    last, _ = loss(*draws())
    assert float(last.detach()) < float(first.detach()) - 0.01


def test_under_autocast_the_reference_and_the_gradient_are_not_what_the_other_forward_left():
    objective = make_objective()
    loss, base, parameters = prepared("finetune", objective)
    loss, base = loss.float(), base.float()
    loss.dtype, loss._start = torch.float32, [start.float() for start in loss._start]
    for parameter in parameters:
        parameter.data.mul_(1.05)
    real, noise, timesteps, labels, fake, fake_labels = draws()
    with torch.autocast("cpu", torch.bfloat16):
        value, logged = loss(real.float(), noise.float(), timesteps, labels, fake.float(), fake_labels)
    value.backward()
    assert sum(parameter.grad is not None for parameter in parameters) > len(parameters) / 2
    assert abs(float(logged["denoising_change"])) > 1e-3
    assert all(torch.equal(p.data, b.data * 1.05) for p, b in zip(parameters, base.parameters(), strict=True))


def bank(directory, count=7, model=None, dataset=None, **choices):
    config = SamplingConfig(num_inference_steps=3, num_images=count, batch_size=4, **choices)
    return load_fakes(directory, model or make_model(), make_objective().scheduler, dataset or make_dataset(), config)


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr("stagepatch.sampling.fakes.FAKES_PER_FILE", 3)


def test_fakes_are_made_once_and_go_on_where_they_stopped(tmp_path, small_files):
    whole = bank(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())][:3] == [f"{n:05d}.safetensors" for n in range(3)]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "00001.safetensors").unlink()
    again = bank(tmp_path)
    assert torch.equal(whole.samples, again.samples)
    changed = [path.name for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == ["00001.safetensors"]
    with pytest.raises(UserError, match=r"another model.*model was .*Give another ddo\.fakes"):
        bank(tmp_path, model=make_model(seed=9))
    with pytest.raises(UserError, match=r"num_inference_steps|seed"):
        bank(tmp_path, seed=1)


def test_fakes_have_the_classes_of_the_data_and_are_what_the_model_makes_of_them(tmp_path):
    dataset = make_dataset(40)
    dataset.labels = torch.tensor([2] * 30 + [7] * 10)
    fakes = bank(tmp_path, 200, dataset=dataset)
    labels = fakes.batch(torch.arange(200))["label"]
    assert torch.equal(labels, dataset.labels[fakes.items])
    assert set(labels.tolist()) == {2, 7}
    assert 0.6 < float((labels == 2).float().mean()) < 0.9
    config = SamplingConfig(num_inference_steps=3, num_images=200, batch_size=50, seed=seed_for(FAKES, 0, 0))
    made = generate(make_model(), make_objective().scheduler, config, labels)
    torch.testing.assert_close(made, fakes.samples, rtol=1e-4, atol=1e-4)


def test_images_of_several_sizes_are_refused(tmp_path):
    dataset = make_dataset()
    dataset.groups = lambda: [[0, 1], [2]]
    with pytest.raises(UserError, match="of one size"):
        bank(tmp_path, dataset=dataset)


def discriminate(directory, fakes, method="dmp", **choices):
    made = METHODS[method]()
    parts = make_model(), made, make_objective(), make_dataset(), config_of(**choices)
    train(*parts, directory, progress=False, ddo=(DDOConfig(beta=1.0, max_denoising_change=0.0), fakes))
    return made


@pytest.mark.parametrize("method", ["dmp", "lora"])
def test_a_stopped_run_ends_with_the_same_bits_and_still_compares_with_the_start(tmp_path, method, monkeypatch):
    fakes = Fakes(torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(9), make_dataset())
    name = {"dmp": "model.safetensors", "lora": "pytorch_lora_weights.safetensors"}[method]
    discriminate(tmp_path / "whole", fakes, method, checkpoint_every=3)
    original = torch.optim.AdamW.step
    count = iter(range(100))

    def stop(self, *args, **kwargs):
        if next(count) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        discriminate(tmp_path / "stopped", fakes, method, checkpoint_every=3)
    monkeypatch.undo()
    discriminate(tmp_path / "stopped", fakes, method, checkpoint_every=3)
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    logs = [read_log(tmp_path / run)[-1] for run in ("whole", "stopped")]
    assert logs[0]["denoising_change"] == logs[1]["denoising_change"] != 0.0


def test_accumulated_pieces_give_the_gradient_of_the_whole_batch(tmp_path):
    fakes = Fakes(torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(9), make_dataset())
    # Without the balance losses, which are no mean over samples.
    found = [
        discriminate(tmp_path / str(parts), fakes, "prompts", gradient_accumulation_steps=parts).patch.state_dict()
        for parts in (1, 4)
    ]
    assert_same(found[1], found[0], 1e-4)


def test_a_run_that_goes_too_far_ends_keeps_what_it_has_and_is_done(tmp_path, caplog):
    fakes = Fakes(torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(2)), torch.arange(9), make_dataset())

    def run(limit):
        parts = make_model(), Finetune(), make_objective(), make_dataset(), config_of(learning_rate=3e-2, steps=9)
        ddo = (DDOConfig(beta=1.0, max_denoising_change=limit), fakes)
        train(*parts, tmp_path / str(limit), progress=False, ddo=ddo)
        return read_log(tmp_path / str(limit))

    assert len(run(0.0)) == 9
    assert not caplog.records
    log = run(0.03)
    assert len(log) < 9
    assert log[-1]["denoising_change"] > 0.03 >= max(record["denoising_change"] for record in log[:-1])
    assert "max_denoising_change=0.03" in caplog.text
    weights = (tmp_path / "0.03" / "weights.safetensors").read_bytes()
    assert run(0.03) == log
    assert (tmp_path / "0.03" / "weights.safetensors").read_bytes() == weights


QUICK = {"steps": 3, "batch_size": 8, "log_every": 1, "learning_rate": 1e-3, "tensorboard": False}
FEW = ["--ddo.sampling.num_images=20", "--ddo.sampling.num_inference_steps=2", "--ddo.max_denoising_change=0"]


def test_train_by_command_and_a_second_round_from_the_first(tmp_path):
    given = ["train", "--objective=ddo", *FEW, *options("training", QUICK)]
    assert main([*given, f"--output_dir={tmp_path / 'first'}"]) == 0
    assert (tmp_path / "first" / "fakes" / "plan.json").exists()
    second = [*given, f"--output_dir={tmp_path / 'second'}", f"--start_from={tmp_path / 'first'}"]
    assert main(second) == 0
    first, then = patch_of(tmp_path / "first"), patch_of(tmp_path / "second")
    assert any(not torch.equal(first[name], then[name]) for name in first)
    # A second round starts from the first one's patch: at log 2 a term, with its denoising loss.
    log = read_log(tmp_path / "second")
    assert log[0]["denoising_change"] == pytest.approx(0.0, abs=1e-6)
    fakes = [load_file(tmp_path / run / "fakes") for run in ("first", "second")]
    assert not torch.equal(*fakes)


def load_file(directory):
    return read_tensors(directory / "00000.safetensors")[0]["samples"]


def fakes_of(bank, dataset, indices):
    return Fakes(bank["samples"], bank["items"], dataset).batch(torch.tensor(indices))


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "SD3Transformer2DModel", "DiTTransformer2DModel"])
def test_latents_with_captions_or_classes_are_told_from_the_models_own(tmp_path, name):
    tiny = PIPELINES[name]
    tiny.build().save_pretrained(tmp_path / "model")
    draw_images(tmp_path / "images", size=tiny.pixels, captions=name != "DiTTransformer2DModel")
    size = [f"--patch.sample_size={tiny.sample_size}"] if tiny.sample_size else []
    few = ["--objective=ddo", *FEW, "--ddo.sampling.num_images=5"]
    assert train_on_images(tmp_path, *few, *size, size=tiny.pixels[0]) == 0
    log = read_log(tmp_path / "run")
    assert log[0]["denoising_change"] == pytest.approx(0.0, abs=1e-4)
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in log)
    bank, _ = read_tensors(tmp_path / "run" / "fakes" / "00000.safetensors")
    dataset = CachedLatents(tmp_path / "run" / "cache")
    assert bank["samples"].shape[1:] == dataset[0]["image"].shape
    fakes = fakes_of(bank, dataset, [3, 0])
    if dataset.null_condition is None:
        assert fakes["label"].tolist() == [dataset[int(item)]["label"] for item in bank["items"][[3, 0]]]
        return
    model, scheduler = load_denoiser(tmp_path / "model")
    captions = Captions(lambda indices: fakes_of(bank, dataset, indices)["condition"], dataset.null_condition)
    sampler = "ddim" if name == "UNet2DConditionModel" else type(scheduler).__name__
    config = SamplingConfig(sampler, 2, num_images=5, seed=seed_for(FAKES, 0, 0))
    made = generate(model, scheduler, config, None, tuple(bank["samples"].shape[1:]), captions=captions)
    torch.testing.assert_close(made, bank["samples"], rtol=1e-3, atol=1e-3)
    assert len(set(bank["items"].tolist())) > 1
    for key, value in fakes["condition"].items():  # a sample keeps the caption that it was made with
        expected = torch.stack([dataset[int(item)]["condition"][key] for item in bank["items"][[3, 0]]])
        assert torch.equal(value, expected)


def test_what_cannot_be_is_refused_in_a_line(tmp_path, capsys):
    given = ["train", "--objective=ddo", *FEW, *options("training", QUICK), f"--output_dir={tmp_path / 'run'}"]
    for patch in (["--patch.initialization=normal"], ["--patch.position=prepend", "--patch.prepending=plain"]):
        for method in ("dmp", "prompt_tuning"):
            assert main([*given, f"--method={method}", *patch]) == 2
            assert "leave out patch.initialization and patch.prepending" in capsys.readouterr().err
    # A lesser initialization changes nothing where a gate at zero stands before it, nor where nothing has a patch.
    Run(TrainConfig(objective="ddo", patch=PatchConfig(position="prepend"), output_dir=str(tmp_path / "gated")))
    Run(TrainConfig(objective="ddo", method="lora", patch=PatchConfig(initialization="normal")))
    assert main([*given, f"--start_from={tmp_path / 'nothing'}"]) == 2
    assert "nothing" in capsys.readouterr().err
    assert main([*given, "--objective=dpo"]) == 2
    assert "dpo" in capsys.readouterr().err
    with pytest.raises(UserError, match="is patch, which method='lora' does not learn"):
        Run(TrainConfig(output_dir=str(tmp_path / "lora"), method="lora", start_from=str(_patch(tmp_path))))


@pytest.mark.parametrize("method", ["prompt_tuning", "bitfit", "lora"])
def test_every_method_trains_on_from_what_it_learned(tmp_path, method):
    given = ["train", f"--method={method}", *options("training", QUICK)]
    assert main([*given, f"--output_dir={tmp_path / 'first'}"]) == 0
    longer = [*given, f"--output_dir={tmp_path / 'second'}", f"--start_from={tmp_path / 'first'}"]
    assert main([*longer, "--training.learning_rate=0"]) == 0
    (name,) = [path.name for path in (tmp_path / "first").glob("*.safetensors") if "checkpoint" not in path.name]
    first, second = (read_tensors(tmp_path / run / name)[0] for run in ("first", "second"))
    assert_same(second, first)


def _patch(tmp_path):
    assert main(["train", *options("training", QUICK), f"--output_dir={tmp_path / 'patch'}"]) == 0
    return tmp_path / "patch"


def ddo_job(directory):
    """The command, as each of several processes gives it."""
    given = ["train", "--objective=ddo", *FEW, *options("training", {**QUICK, "learning_rate": 1e-2})]
    assert main([*given, "--method=lora", f"--output_dir={directory}"]) == 0


def test_two_processes_share_the_samples_and_end_as_one(tmp_path, processes):
    processes.call(ddo_job, directory=tmp_path / "one")
    processes.call_together(ddo_job, 2, directory=tmp_path / "two")
    fakes, learned = (
        [read_tensors(tmp_path / run / name)[0] for run in ("one", "two")]
        for name in ("fakes/00000.safetensors", "pytorch_lora_weights.safetensors")
    )
    torch.testing.assert_close(fakes[1], fakes[0], rtol=0, atol=1e-5)
    # Where a gradient is nearly 0 Adam's step is as large as any, and its direction the processor's rounding.
    for name, weight in learned[0].items():
        assert float((learned[1][name] - weight).norm() / weight.norm()) < 2e-3, name


def test_training_on_the_models_own_samples_is_training_on_a_data_set_of_them(tmp_path):
    few = ["--objective=samples", "--method=lora", *FEW, *options("training", QUICK)]
    assert main(["train", *few, f"--output_dir={tmp_path / 'run'}"]) == 0
    bank, _ = read_tensors(tmp_path / "run" / "fakes" / "00000.safetensors")
    run = Run(TrainConfig(method="lora", output_dir=str(tmp_path / "other"), training=TrainingConfig(**QUICK)))
    run.dataset = ImageDataset(bank["samples"], run.dataset.labels[bank["items"]])
    run.train(progress=False)
    name = "pytorch_lora_weights.safetensors"
    assert_same(read_tensors(tmp_path / "run" / name)[0], read_tensors(tmp_path / "other" / name)[0])


def test_the_range_of_timesteps_by_command(tmp_path, seen, capsys):
    given = ["train", *options("training", QUICK), f"--output_dir={tmp_path / 'run'}", "--timesteps.range=[0.25, 0.5]"]
    assert main(given) == 0
    drawn = torch.cat([draws.timesteps for draws in seen])
    assert 250 <= int(drawn.min()) < int(drawn.max()) < 500
    assert main([*given[:-1], "--timesteps.range=[0.25, 0.75]"]) == 2
    assert "timesteps.range" in capsys.readouterr().err  # another run
    assert main(["decouple", "--timesteps.density=mode", f"--output_dir={tmp_path / 'stages'}"]) == 2
    assert "timesteps are those of each stage" in capsys.readouterr().err

"""What one run does: what moves, by how much, and what is written."""

import copy
import functools
import json
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from stagepatch.checkpoints import load_denoiser
from stagepatch.core.errors import UserError
from stagepatch.core.randomness import GLOBAL, NOISE, BatchOrder, generator_for, seed_for
from stagepatch.core.tensors import read_tensors
from stagepatch.diffusion import Objective
from stagepatch.families import predict
from stagepatch.methods import DMP
from stagepatch.patch import Patch, PatchConfig
from stagepatch.training.loop import _checkpoint_gradients
from tests import runs
from tests.runs import RELEASED, TRAINING, assert_same, log_of, make_model, make_objective, patch_of, run


def state_of(model):
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_dmp_moves_the_patch_alone(tmp_path, monkeypatch, preset):
    made, initialize = [], torch.optim.AdamW.__init__

    @functools.wraps(initialize)
    def remember(optimizer, *args, **options):
        initialize(optimizer, *args, **options)
        made.append(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", remember)
    model = make_model().requires_grad_(True).train()
    before = state_of(model)
    seen = []
    model.register_forward_hook(lambda *_: seen.append([p.requires_grad for p in model.parameters()]))
    method = run(tmp_path, {"preset": preset}, model=model)
    assert_same(state_of(model), before)
    assert list(model.state_dict()) == list(before)
    assert not any(any(flags) for flags in seen)
    assert all(parameter.grad is None for parameter in model.parameters())
    learned = {id(parameter) for parameter in method.patch.parameters()}
    assert {id(parameter) for group in made[0].param_groups for parameter in group["params"]} == learned
    assert {id(parameter) for parameter in made[0].state} == learned
    fresh = Patch.create(make_model(), PatchConfig(preset=preset)).state_dict()
    for name, tensor in method.patch.state_dict().items():
        assert not torch.equal(tensor, fresh[name]), f"{name} did not move"


def test_prompt_tuning_moves_prompts_and_has_no_balance_terms(tmp_path):
    method = run(tmp_path, {"gate": "none"})
    assert all(prompt.abs().min() > 0 for prompt in method.patch.prompts)
    assert set(log_of(tmp_path)[0]) == {"iteration", "loss", "grad_norm", "images_per_second", "lr"}


def test_finetuning_moves_every_weight_and_saves_the_model(tmp_path):
    model = make_model().requires_grad_(False)
    before = state_of(model)
    run(tmp_path, method="finetune", model=model, steps=30, label_dropout=0.5)
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), f"{name} did not move"
    assert_same(load_denoiser(tmp_path)[0].state_dict(), state_of(model))


def test_the_model_carries_the_result_on_return(tmp_path):
    model = make_model()
    run(tmp_path, model=model, ema_decay=0.5)
    fresh = make_model()
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 2])
    with torch.no_grad(), Patch.from_pretrained(tmp_path).attach(fresh):
        assert torch.equal(predict(model, *inputs), predict(fresh, *inputs))


def test_training_lowers_the_loss(tmp_path):
    run(tmp_path, method="finetune", steps=100, log_every=10)
    records = log_of(tmp_path)
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]


def by_hand(config, patch_config, rate=lambda iteration: 1.0, flip=False):
    """The loop in plain PyTorch; the patch after every iteration, and what is logged."""
    model, objective, dataset = make_model(), make_objective(), runs.make_dataset()
    method = DMP(PatchConfig(**patch_config))
    torch.manual_seed(seed_for(GLOBAL, config.seed))
    groups = method.prepare(model)
    parameters = [parameter for group in groups for parameter in group["params"]]
    factor = method.config.gate_learning_rate_factor
    optimizer = torch.optim.AdamW(
        [
            {"params": list(method.patch.prompts), "lr": config.learning_rate},
            {"params": list(method.patch.gate.parameters()), "lr": config.learning_rate * factor},
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    scheduler = LambdaLR(optimizer, rate)
    order = BatchOrder([range(len(dataset))], config.batch_size, 0, config.steps, config.seed)
    patches, records = [], []
    for iteration, indices in enumerate(order):
        size, generator = config.batch_size, generator_for(torch.device("cpu"), NOISE, config.seed, iteration)
        x_start, labels = dataset.images[indices], dataset.labels[indices]
        timesteps = torch.randint(0, 1000, (size,), generator=generator)
        noise = torch.randn(x_start.shape, generator=generator)
        if flip:
            flipped = torch.rand(size, generator=generator) < 0.5
            x_start = torch.stack([x.flip(-1) if f else x for x, f in zip(x_start, flipped, strict=True)])
        dropped = torch.rand(size, generator=generator) < config.label_dropout
        labels = torch.tensor([10 if drop else int(label) for label, drop in zip(labels, dropped, strict=True)])
        x_t = objective.scheduler.add_noise(x_start, noise, timesteps)
        output = predict(model, x_t, timesteps, labels)
        loss = objective.loss(output, x_start, noise, timesteps).mean()
        terms = method.patch.balance_terms()
        weights = method.config.importance_weight, method.config.load_weight
        (loss + weights[0] * terms["importance"] + weights[1] * terms["load"]).backward()
        norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
        if config.max_grad_norm and norm > config.max_grad_norm:
            for parameter in parameters:
                parameter.grad *= config.max_grad_norm / norm
        records.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]})
        records[-1] |= {name: term.item() for name, term in terms.items()}
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        patches.append(state_of(method.patch))
    return patches, records


# AdamW divides by a gradient's own size, so it enlarges the rounding of the smallest; one step is a hundredth.
ROUNDING = 1e-4
PATCH = {"initialization": "normal", "gate_learning_rate_factor": 3.0, "importance_weight": 0.5, "load_weight": 2.0}


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.2},
        {"weight_decay": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.99},
        {"label_dropout": 0.5, "seed": 3},
        {"label_dropout": 0.0},
        {"batch_size": 7},
    ],
    ids=str,
)
def test_training_equals_a_plain_loop(tmp_path, training):
    flip = "seed" in training
    patches, records = by_hand(runs.config_of(**training), PATCH, flip=flip)
    method = run(tmp_path, PATCH, flip=flip, **training)
    assert_same(method.patch.state_dict(), patches[-1], ROUNDING)
    for record, expected in zip(log_of(tmp_path), records, strict=True):
        for name, value in expected.items():
            assert record[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_clipping_changes_the_steps(tmp_path):
    # AdamW does not see a gradient's scale, but sees it change.
    for limit in (0.0, 0.2, 1e6):
        run(tmp_path / str(limit), PATCH, max_grad_norm=limit)
    assert_same(patch_of(tmp_path / "1000000.0"), patch_of(tmp_path / "0.0"), 1e-7)
    clipped, free = (patch_of(tmp_path / name)["prompts.blocks.0"] for name in ("0.2", "0.0"))
    assert (clipped - free).abs().max() > 1e-3


def test_gate_learning_rate_factor_reaches_the_optimizer(tmp_path):
    # AdamW's first step is the rate times the gradient's sign.
    before = Patch.create(make_model(), PatchConfig(initialization="zero"))
    method = run(tmp_path, {"preset": "released", "initialization": "zero"}, steps=1, learning_rate=1e-3)
    moved = [(p - q).abs().max().item() for p, q in zip(method.patch.prompts, before.prompts, strict=True)]
    assert moved == pytest.approx([1e-3] * 2, rel=1e-3)
    run(tmp_path / "normal", {"initialization": "normal", "gate_learning_rate_factor": 10.0}, steps=1)
    gate = patch_of(tmp_path / "normal")["gate.weight"]
    assert gate.abs().max().item() == pytest.approx(10 * TRAINING["learning_rate"], rel=1e-3)


def test_gradient_accumulation_of_four_parts_equals_one(tmp_path):
    for parts in (1, 2, 4):
        run(tmp_path / str(parts), gradient_accumulation_steps=parts, learning_rate=1e-3)
    for parts in (2, 4):
        assert_same(patch_of(tmp_path / str(parts)), patch_of(tmp_path / "1"), 1e-6)
        for record, expected in zip(log_of(tmp_path / str(parts)), log_of(tmp_path / "1"), strict=True):
            for name in ("loss", "importance", "load", "grad_norm", "gate_entropy"):
                assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_seed_decides_everything(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        run(tmp_path / name, RELEASED, seed=seed)
    assert_same(patch_of(tmp_path / "a"), patch_of(tmp_path / "b"))
    assert not torch.equal(patch_of(tmp_path / "a")["prompts.blocks.0"], patch_of(tmp_path / "c")["prompts.blocks.0"])


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_other_objectives_train(tmp_path, prediction_type):
    objective = make_objective(learn_sigma=False, prediction_type=prediction_type)
    run(tmp_path, model=make_model(learn_sigma=False), objective=objective)
    assert len(log_of(tmp_path)) == TRAINING["steps"]


@pytest.mark.parametrize(("conditioning", "images"), [("none", 30), ("class", 3)])
def test_unconditional_models_train_and_so_do_fewer_images_than_a_batch(tmp_path, conditioning, images):
    run(tmp_path, model=make_model(conditioning=conditioning), dataset=runs.make_dataset(images))
    assert len(log_of(tmp_path)) == TRAINING["steps"]


# The rate by the share of the steps after the warm-up that is done.
CLOSED_FORMS = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_rate_follows_its_closed_form(tmp_path, name, warmup):
    steps = 10

    def rate(iteration):
        done = (iteration - warmup) / (steps - warmup)
        return iteration / warmup if done < 0 else CLOSED_FORMS[name](done)

    training = {"steps": steps, "lr_scheduler": name, "warmup_steps": warmup, "learning_rate": 0.02}
    method = run(tmp_path, PATCH, **training)
    logged = [record["lr"] for record in log_of(tmp_path)]
    assert logged == pytest.approx([0.02 * rate(iteration) for iteration in range(steps)])
    patches, _ = by_hand(runs.config_of(**training), PATCH, rate)
    assert_same(method.patch.state_dict(), patches[-1], ROUNDING)


@pytest.mark.parametrize(("decay", "power"), [(0.25, 0.0), (0.999, 0.0), (0.999, 0.75), (0.4, 0.75)])
def test_average_equals_its_closed_form(tmp_path, decay, power):
    run(tmp_path / "plain", steps=8, snapshot_every=1)
    run(tmp_path / "averaged", steps=8, snapshot_every=1, ema_decay=decay, ema_power=power)

    def snapshots(name):
        return [patch_of(tmp_path / name / "snapshots" / f"{step:07d}") for step in range(1, 9)]

    plain = snapshots("plain")
    average = plain[0]
    for step, (patch, found) in enumerate(zip(plain, snapshots("averaged"), strict=True)):
        rising = 1 - (1 + step) ** -power if power else (1 + step) / (10 + step)
        weight = min(decay, rising) if step else 0.0  # the decay rises up to `decay`, and is 0 for the first step
        average = {name: weight * average[name] + (1 - weight) * patch[name] for name in patch}
        assert_same(found, average, 1e-7)
    assert_same(patch_of(tmp_path / "averaged"), average, 1e-7)
    assert not torch.allclose(average["prompts.blocks.0"], plain[-1]["prompts.blocks.0"], atol=1e-4)


@pytest.mark.parametrize("ema_decay", [0.0, 0.8])
def test_snapshots_leave_the_run_as_it_is(tmp_path, ema_decay):
    for name, every in (("with", 2), ("without", 0)):
        run(tmp_path / name, RELEASED, steps=7, snapshot_every=every, ema_decay=ema_decay)
    assert_same(patch_of(tmp_path / "with"), patch_of(tmp_path / "without"))
    names = sorted(path.name for path in (tmp_path / "with" / "snapshots").iterdir())
    assert names == ["0000002", "0000004", "0000006"]
    assert Patch.from_pretrained(tmp_path / "with" / "snapshots" / "0000004").num_parameters() > 0
    assert not (tmp_path / "without" / "snapshots").exists()


def test_snapshot_is_the_result_of_a_run_that_ends_there(tmp_path):
    run(tmp_path / "long", steps=6, snapshot_every=4, ema_decay=0.8)
    run(tmp_path / "short", steps=4, ema_decay=0.8)
    assert_same(patch_of(tmp_path / "long" / "snapshots" / "0000004"), patch_of(tmp_path / "short"))


def test_bf16_after_a_run_in_float32(tmp_path):
    run(tmp_path / "full")
    model, seen = make_model(), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    run(tmp_path / "bf16", model=model, mixed_precision="bf16")
    assert set(seen) == {torch.bfloat16}
    full, half = patch_of(tmp_path / "full"), patch_of(tmp_path / "bf16")
    assert all(tensor.dtype == torch.float32 for tensor in half.values())
    losses = [[record["loss"] for record in log_of(tmp_path / name)] for name in ("full", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
    assert not torch.equal(half["prompts.blocks.0"], full["prompts.blocks.0"])
    # And back.
    run(tmp_path / "again")
    assert_same(patch_of(tmp_path / "again"), full)


def test_compiled_run_equals_an_eager_one(tmp_path, monkeypatch):
    # Without code generation, which is torch's to test and takes half a minute.
    compiled, compile_module = [], torch.nn.Module.compile

    def compile_with_aot_eager(module):
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_aot_eager)
    run(tmp_path / "eager", steps=3, ema_decay=0.5)
    assert compiled == []
    run(tmp_path / "compiled", steps=3, ema_decay=0.5, compile=True)
    assert compiled == ["DiT"]
    assert_same(patch_of(tmp_path / "compiled"), patch_of(tmp_path / "eager"), 1e-5)


def test_log_has_means_between_records(tmp_path):
    run(tmp_path / "each", RELEASED, steps=7)
    run(tmp_path / "threes", RELEASED, steps=7, log_every=3)
    each, threes = log_of(tmp_path / "each"), log_of(tmp_path / "threes")
    assert [record["iteration"] for record in threes] == [3, 6, 7]
    for record, part in zip(threes, (each[:3], each[3:6], each[6:]), strict=True):
        for name in ("loss", "importance", "load", "gate_entropy", "grad_norm"):
            assert record[name] == pytest.approx(sum(one[name] for one in part) / len(part), rel=1e-5, abs=1e-7)
        assert record["images_per_second"] > 0
        assert record["lr"] == TRAINING["learning_rate"]


def test_tensorboard_has_what_the_log_has(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, steps=4, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx({record["iteration"]: record["loss"] for record in log_of(tmp_path)})
    assert set(events.Tags()["scalars"]) == set(log_of(tmp_path)[0]) - {"iteration"}


def test_workers_change_nothing_and_progress_is_shown_where_asked(tmp_path, capsys):
    run(tmp_path / "none")
    assert "training" not in capsys.readouterr().out
    run(tmp_path / "one", num_workers=1, progress=True)
    assert "training" in capsys.readouterr().out
    assert_same(patch_of(tmp_path / "one"), patch_of(tmp_path / "none"))


def test_settings_of_the_run_are_in_the_checkpoint(tmp_path):
    run(tmp_path, identity={"data": "here"}, steps=2)
    tensors, metadata = read_tensors(tmp_path / "checkpoint.safetensors")
    assert metadata["iteration"] == "2"
    identity = json.loads(metadata["identity"])
    assert identity["data"] == "here"
    assert identity["training"]["learning_rate"] == TRAINING["learning_rate"]
    # Prompts of two sites, weight and bias of the gate; the backbone is not in it.
    assert sum(name.startswith("trained.") for name in tensors) == 4


def test_objective_sees_flips_about_half_the_time_and_only_when_asked(tmp_path):
    seen = []

    class Spy(Objective):
        def add_noise(self, x_start, noise, timesteps):
            seen.append(x_start.clone())
            return super().add_noise(x_start, noise, timesteps)

    for flip in (False, True):
        seen.clear()
        objective = Spy(make_objective().scheduler, True)
        dataset = runs.make_dataset(40)
        run(tmp_path / str(flip), dataset=dataset, objective=objective, flip=flip, steps=25, batch_size=40)
        # add_noise is called twice an iteration, for the model and for the bound.
        images = torch.cat(seen[::2]).flatten(1)
        plain, turned = (
            (images[:, None] == known.flatten(1)).all(dim=2).any(dim=1).sum().item()
            for known in (dataset.images, dataset.images.flip(-1))
        )
        assert plain + turned == len(images) == 1000
        assert turned == 0 if not flip else 440 < turned < 560


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.6, 1.0])
def test_labels_are_dropped_at_the_rate_asked_for(tmp_path, rate):
    model, seen = make_model(), []
    model.register_forward_pre_hook(lambda _, args, options: seen.append(options["class_labels"]), with_kwargs=True)
    run(tmp_path, model=model, steps=20, batch_size=50, label_dropout=rate)
    share = (torch.cat(seen) == 10).float().mean().item()
    # Four standard errors.
    assert abs(share - rate) <= 4 * (rate * (1 - rate) / 1000) ** 0.5


def test_gradient_checkpointing_trains_the_same(tmp_path):
    for checkpoints in (False, True):
        run(tmp_path / str(checkpoints), steps=3, gradient_checkpointing=checkpoints)
    for name, expected in patch_of(tmp_path / "False").items():
        torch.testing.assert_close(patch_of(tmp_path / "True")[name], expected)


def test_gradient_checkpointing_is_refused_where_it_cannot_be(tmp_path):
    model = make_model()
    model._supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="DiT has no gradient checkpointing that computes the same"):
        run(tmp_path, steps=1, model=model, gradient_checkpointing=True)
    with pytest.raises(UserError, match="needs a loss of one forward"):
        _checkpoint_gradients(make_model(), is_alone=False)

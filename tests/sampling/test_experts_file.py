"""The file that says which expert acts when: what it may name, its errors, and the commands that take it."""

import copy

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from stagepatch.checkpoints import save_denoiser
from stagepatch.cli import main
from stagepatch.core import UserError, read_json
from stagepatch.patch import patches_on
from stagepatch.sampling import generate, load_experts
from tests.runs import assert_same
from tests.sampling.test_experts import answer, config, drawn_method, drawn_patch
from tests.sampling.test_generate import SCHEDULER, by_hand, sampled, sampler_of
from tests.tiny_pipelines import PIPELINES


@pytest.fixture
def stages(tiny_dit, tmp_path):
    """A base, another model, a patch, a LoRA and weights for the base; the models, with these on, by name."""
    models = {"base": tiny_dit(0), "other": tiny_dit(1, hidden_size=16)}
    for name, model in models.items():
        save_denoiser(model, SCHEDULER, tmp_path / name)
    models |= {name: copy.deepcopy(models["base"]) for name in ("patch", "lora", "finetune")}
    patch = drawn_patch(models["patch"])
    patch.save_pretrained(tmp_path / "patch")
    patch.attach(models["patch"])
    for name in ("lora", "finetune"):
        drawn_method(name, models[name], rank=2).save(tmp_path / name)
    return models


def write(path, **content):
    path.write_text(yaml.safe_dump(content))
    return path


def load(directory, base, **content):
    return load_experts(write(directory / "experts.yaml", **content), base, SCHEDULER)


def ranges(*bounds, **more):
    return [{"from": start, "to": end, **more} for start, end in bounds]


RANGES = [
    {"from": 600, "to": 800, "learned": "lora"},
    {"from": 0, "to": 200, "learned": "patch", "name": "the patch"},
    {"from": 200, "to": 400, "model": "other"},
    {"from": 400, "to": 600},
    {"from": 800, "to": 1000, "learned": "finetune"},
]


def test_a_file_of_patch_lora_weights_model_and_base(stages, tmp_path, batch):
    base = stages["base"].requires_grad_(True)
    weights = copy.deepcopy(base.state_dict())
    experts = load(tmp_path, base, experts=RANGES)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not patches_on(base)
    assert [expert.name for expert in experts.ranges] == ["the patch", "other", "base", "lora", "finetune"]
    plain = copy.deepcopy(base)
    with experts.attach(base), torch.no_grad():
        for timestep, name in [(0, "patch"), (399, "other"), (400, "base"), (700, "lora"), (999, "finetune")]:
            output = answer(base, batch, timestep)
            expected = answer(stages[name], batch, timestep)
            torch.testing.assert_close(output, expected)
            assert torch.equal(output, expected) or name == "lora", name  # merged as it is used, in other digits
            assert torch.equal(output, answer(plain, batch, timestep)) == (name == "base")
    assert_same(base.state_dict(), weights)


def test_what_a_patch_and_a_lora_stand_on_is_the_base_s_memory(stages, tmp_path):
    experts = load(tmp_path, stages["base"], experts=RANGES)
    own = {parameter.data_ptr() for parameter in stages["base"].parameters()}
    learned = [expert for expert in experts.ranges if expert.denoiser is not None]
    memory = {expert.name: {value.data_ptr() for value in expert.denoiser.parameters()} for expert in learned}
    assert memory["the patch"] == own
    assert memory["lora"] > own
    assert not memory["finetune"] & own


@pytest.mark.parametrize("name", ["patch", "lora", "finetune"])
def test_what_was_learned_goes_on_a_model(stages, tmp_path, batch, name):
    save_denoiser(copy.deepcopy(stages["base"]), SCHEDULER, tmp_path / "copy")
    expected = answer(stages[name], batch, 700)
    both = ranges((0, 1000), model="copy", learned=name)
    for experts in (
        load(tmp_path, stages["other"], experts=both),
        load_experts(
            write(tmp_path / "a.yaml", experts=ranges((0, 1000), model="copy")),
            stages["other"],
            SCHEDULER,
            f"{tmp_path / name}",
        ),
    ):
        (expert,) = experts.ranges
        torch.testing.assert_close(answer(expert.denoiser, batch, 700), expected)
        if name == "lora":
            assert not any("lora" in each for each, _ in expert.denoiser.named_modules())  # at the model's own cost


def test_commands_put_a_patch_on_each_expert(stages, tmp_path):
    path = write(tmp_path / "experts.yaml", experts=ranges((0, 500), model="other") + ranges((500, 1000)))
    given = ["--sampling.num_images=12", "--sampling.num_inference_steps=5"]
    bare = sampled(tmp_path / "base", tmp_path / "bare", f"--schedule={path}", *given)
    save_denoiser(stages["base"], SCHEDULER, tmp_path / "other")
    images = sampled(tmp_path / "base", tmp_path / "out", f"--schedule={path}", f"--patch={tmp_path / 'lora'}", *given)
    expected = sampled(tmp_path / "base", tmp_path / "plain", f"--patch={tmp_path / 'lora'}", *given)
    torch.testing.assert_close(images, expected)
    assert not torch.allclose(images, bare)


def test_a_directory_named_twice_is_loaded_once(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    entries = [*ranges((0, 100), model="other"), *ranges((100, 200), model=str(tmp_path / "other"))]
    entries += ranges((200, 300), (300, 1000), learned="patch")
    # The file is elsewhere: then its paths are of the working directory.
    experts = load(tmp_path / "sub", stages["base"], experts=entries)
    first, second, third, fourth = (expert.denoiser for expert in experts.ranges)
    assert first is second
    assert third is fourth is not first


def test_steps_of_a_file(stages, tmp_path):
    steps = [{"timestep": 900, "expert": "big"}, {"timestep": 200.5, "expert": "small"}]
    named = [{"name": "small", "model": "other"}, {"name": "big"}, {"name": "unused", "model": "nowhere"}]
    experts = load(tmp_path, stages["base"], experts=named, steps=steps, scheduler="euler")
    assert experts.timesteps == [900, 200.5]
    assert experts.sampling(config()) == config(scheduler="euler", num_inference_steps=2)
    bounds = [(expert.start, expert.end, expert.name) for expert in experts.ranges]
    assert bounds == [(0, 550.25, "small"), (550.25, 1000, "big")]


NAMED = [{"name": "a"}, {"name": "b", "model": "digits"}]
STEPS = [{"timestep": 3, "expert": "a"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("experts: [", "Cannot read the schedule"),
        ("- 1", "the file holds list"),
        ("", "the file holds NoneType"),
        ("expert: []", "no key 'expert'"),
        ("scheduler: ddim", "lacks `experts`"),
        ({"experts": []}, "`experts` is []: give a list of at least one"),
        ({"experts": {"from": 0}}, "give a list of at least one entry"),
        ({"experts": ["a"]}, "expert 1 holds str"),
        ({"experts": [{"from": 0, "to": 1000, "learnt": "x"}]}, "expert 1 has no key 'learnt'"),
        ({"experts": [{"from": 0}]}, "expert 1 lacks `to`"),
        ({"experts": [{"from": "0", "to": 1000}]}, "`from` is '0': give a number"),
        ({"experts": [{"from": 0, "to": True}]}, "`to` is True"),
        ({"experts": ranges((0, float("nan")))}, "`to` must be finite, and fit in 64 bits"),
        ({"experts": ranges((0, 10**400))}, "`to` must be finite, and fit in 64 bits"),
        ({"experts": ranges((0, 1000), model=3)}, "`model` is 3"),
        ({"experts": ranges((0, 1000), model="")}, "`model` is ''"),
        ({"experts": ranges((0, 1000), model="digits", learned="x")}, "The expert 'digits with x'"),
        ({"experts": ranges((0, 400), (500, 1000))}, "No expert is there for timesteps 400 to 500"),
        ({"experts": ranges((100, 1000))}, "No expert is there for timesteps 0 to 100"),
        ({"experts": ranges((0, 400), (300, 1000))}, "Two experts are there for timesteps 300 to 400"),
        ({"experts": ranges((-5, 1000))}, "starts below 0"),
        ({"experts": ranges((0, 1000)), "fuse": "mean"}, "not mixed by 'mean': `fuse` is 'maxfusion'"),
        ({"experts": ranges((0, 1000)), "fuse": True}, "`fuse` is True: give a text"),
        ({"experts": ranges((0, 9), (3, 8), (5, 1000)), "fuse": "maxfusion"}, "More than two experts are there for"),
        ({"experts": ranges((0, 1000), (0, 900)), "fuse": "maxfusion", "steps": STEPS}, "a step has one expert"),
        ({"experts": ranges((0, 400), (400, 400), (400, 1000))}, "The range from 400 to 400 is empty"),
        ({"experts": ranges((0, 900))}, "end at 900; the model has timesteps 0 to 1000"),
        ({"experts": ranges((0, 2000))}, "end at 2000"),
        ({"experts": ranges((0, 1000)), "scheduler": "ddim"}, "`scheduler` goes with `steps`"),
        ({"experts": ranges((0, 1000)), "steps": STEPS}, "has a range, and the file has steps"),
        ({"experts": NAMED, "steps": []}, "`steps` is []: give a list of at least one"),
        ({"experts": [{"model": "digits"}], "steps": STEPS}, "lacks `name`"),
        ({"experts": [*NAMED, {"name": "a"}], "steps": STEPS}, "two experts have one name"),
        ({"experts": NAMED, "steps": [{"timestep": 3}]}, "step 1 lacks `expert`"),
        ({"experts": NAMED, "steps": [{"timestep": 3, "expert": "c"}]}, "no expert 'c' to go to. Experts: a, b"),
        ({"experts": NAMED, "steps": [{"timestep": 1001, "expert": "a"}]}, "within 0 to 1000"),
        ({"experts": NAMED, "steps": STEPS * 2}, "must fall"),
        ({"experts": NAMED, "steps": STEPS, "scheduler": 5}, "`scheduler` is 5"),
        ({"experts": ranges((0, 1000), learned="nowhere")}, "The expert 'nowhere': No patch at 'nowhere'"),
        ({"experts": ranges((0, 1000), model="nowhere", name="it")}, "The expert 'it': No model at 'nowhere'"),
    ],
)
def test_mistakes_in_a_file_are_named(tiny_dit, tmp_path, content, message):
    path = tmp_path / "experts.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    with pytest.raises(UserError) as error:
        load_experts(path, tiny_dit(), SCHEDULER)
    assert message in str(error.value)


def test_no_file(tiny_dit, tmp_path):
    with pytest.raises(UserError, match=r"No such schedule: 'nowhere.yaml'"):
        load_experts("nowhere.yaml", tiny_dit(), SCHEDULER)
    with pytest.raises(UserError, match="Cannot read the schedule"):
        load_experts(tmp_path, tiny_dit(), SCHEDULER)


@pytest.mark.parametrize(
    ("changes", "scheduler", "message"),
    [
        ({"in_channels": 2}, {}, "number of input channels is 2, the base's 1"),
        ({"learn_sigma": False}, {}, "number of output channels is 1, the base's 2"),
        ({"num_classes": 7}, {}, "number of classes is 7, the base's 10"),
        ({"sample_size": 16}, {}, r"sample size is \(16, 16\)"),
        ({"conditioning": "none"}, {}, "number of classes is 0"),
        ({}, {"prediction_type": "v_prediction"}, "predicts 'v_prediction', and the base 'epsilon'"),
        ({}, {"beta_schedule": "squaredcos_cap_v2"}, "another noise schedule"),
        ({}, {"num_train_timesteps": 500}, "another noise schedule"),
        ({}, None, "another noise schedule|predicts"),
    ],
)
def test_experts_that_do_not_fit_the_base_are_named(tiny_dit, tmp_path, changes, scheduler, message):
    flow = FlowMatchEulerDiscreteScheduler()
    trained_with = flow if scheduler is None else DDPMScheduler.from_config(SCHEDULER.config, **scheduler)
    save_denoiser(tiny_dit(**changes), trained_with, tmp_path / "expert")
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, tiny_dit(), experts=ranges((0, 1000), model="expert"))
    assert "The expert 'expert'" in str(error.value)


def test_what_was_learned_is_refused_on_a_patched_base(stages, tmp_path):
    with pytest.raises(UserError, match="detach these first"):
        load(tmp_path, stages["patch"], experts=ranges((0, 1000), learned="patch"))


def test_commands_sample_and_evaluate_a_schedule(stages, tmp_path, capsys):
    base, path = stages["base"], write(tmp_path / "experts.yaml", experts=RANGES)
    given = [f"--model={tmp_path / 'base'}", "--sampling.num_images=12", "--sampling.num_inference_steps=5"]
    images = sampled(tmp_path / "base", tmp_path / "out", f"--schedule={path}", *given[1:])
    with load_experts(path, base, SCHEDULER).attach(base):
        torch.testing.assert_close(images, generate(base, SCHEDULER, config(num_images=12, num_inference_steps=5)))
    same = write(tmp_path / "same.yaml", experts=ranges((0, 300), (300, 1000)))
    evaluate = ["evaluate", *given, "--sampling.num_images=60", f"--output_dir={tmp_path / 'eval'}", "--seeds=[4, 5]"]
    assert main([*evaluate, f"--schedule={same}"]) == 0
    metrics = read_json(tmp_path / "eval" / "metrics.json")
    assert metrics["base"] == metrics["schedule"]  # the base against itself, from the same noise
    assert main([*evaluate, f"--schedule={path}"]) == 0
    other = read_json(tmp_path / "eval" / "metrics.json")
    assert other["base"] == metrics["base"]
    assert other["schedule"] != metrics["schedule"]
    assert "schedule" in capsys.readouterr().out
    given.append(f"--output_dir={tmp_path / 'no'}")
    for command in ("sample", "evaluate"):
        assert main([command, *given, "--schedule=nowhere.yaml"]) == 2
        assert "No such schedule: 'nowhere.yaml'" in capsys.readouterr().err


def test_command_samples_with_experts_of_unequal_capacity(tiny_dit, tmp_path):
    """Other widths, depths and classes of model, as MEME has (arXiv 2306.04990)."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4}
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    models = {
        "base": tiny_dit(0, learn_sigma=False),
        "wide": tiny_dit(1, learn_sigma=False, hidden_size=64, num_layers=1),
        "deep": tiny_dit(2, learn_sigma=False, hidden_size=16, num_layers=5),
        "unet": UNet2DModel(**shape, **blocks, layers_per_block=1, num_class_embeds=10).eval(),
    }
    for name, model in models.items():
        save_denoiser(model, SCHEDULER, tmp_path / name)
    experts = [{"from": 250 * place, "to": 250 * (place + 1), "model": name} for place, name in enumerate(models)]
    path = write(tmp_path / "experts.yaml", experts=experts)
    given = ["--sampling.num_images=3", "--sampling.num_inference_steps=8"]
    images = sampled(tmp_path / "base", tmp_path / "out", f"--schedule={path}", *given)
    sampler, names, labels, called = sampler_of("DDIM", SCHEDULER, 8), list(models), torch.arange(3), []

    def output(sample, timesteps):
        called.append(names[int(timesteps[0]) // 250])
        return models[called[-1]](sample, timesteps, labels).sample

    torch.testing.assert_close(images, by_hand(sampler, output, 3), atol=1e-4, rtol=1e-4)
    assert called == ["unet"] * 2 + ["deep"] * 2 + ["wide"] * 2 + ["base"] * 2


def test_command_samples_a_pipeline_by_ranges_and_by_steps(tmp_path, capsys):
    tiny = PIPELINES["UNet2DConditionModel"]
    tiny.build(0).save_pretrained(tmp_path / "model")
    tiny.build(1).save_pretrained(tmp_path / "other")
    model, given = tmp_path / "model", ["--sampling.num_images=1", "--sampling.num_inference_steps=3"]
    given.append("--prompts=['a cat']")
    path = write(tmp_path / "a.yaml", experts=[*ranges((0, 500), model="other"), *ranges((500, 1000))])
    base = sampled(model, tmp_path / "base", *given)
    by_ranges = sampled(model, tmp_path / "ranges", *given, f"--schedule={path}")
    named = [{"name": "base"}, {"name": "other", "model": "other"}]
    steps = [{"timestep": 981, "expert": "base"}, {"timestep": 333, "expert": "other"}]
    path = write(tmp_path / "b.yaml", experts=named, steps=steps, scheduler="dpmsolver++")
    by_steps = sampled(model, tmp_path / "steps", *given, f"--schedule={path}")
    assert not torch.allclose(base, by_ranges, atol=1e-3)
    assert not torch.allclose(by_steps, by_ranges, atol=1e-3)
    path = write(tmp_path / "c.yaml", experts=named, steps=steps)
    given += [f"--model={model}", f"--output_dir={tmp_path / 'no'}", f"--schedule={path}"]
    assert main(["sample", *given]) == 2
    assert "PNDMScheduler takes no timesteps" in capsys.readouterr().err

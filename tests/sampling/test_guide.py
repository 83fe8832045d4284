"""Guidance by a worse version of the model: against two models in a loop by hand, and where it cannot be."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from stagepatch.checkpoints import save_denoiser
from stagepatch.cli import main
from stagepatch.core import UserError, read_json, read_tensors
from stagepatch.families import predict
from stagepatch.sampling import Guide, SamplingConfig, attach_guide, generate, generate_with_pipeline, guide_on
from tests.runs import assert_same
from tests.sampling.test_experts import answer, at, drawn_method, drawn_patch
from tests.sampling.test_generate import SCHEDULER, by_hand, sampler_of
from tests.tiny_pipelines import PIPELINES

config = partial(SamplingConfig, num_inference_steps=4, num_images=4)


def test_each_output_is_moved_away_from_the_guides(tiny_dit, batch):
    model, worse = tiny_dit(0, learn_sigma=False), tiny_dit(1, hidden_size=16, learn_sigma=False)
    labels = torch.arange(4)
    own, other = (partial(lambda net, x, t: net(x, t, labels).sample, copy.deepcopy(net)) for net in (model, worse))
    away = by_hand(sampler_of("DDIM", SCHEDULER, 4), lambda x, t: 2.5 * own(x, t) - 1.5 * other(x, t), 4)
    plain = generate(model, SCHEDULER, config())
    with Guide(model, worse, 2.5):
        torch.testing.assert_close(generate(model, SCHEDULER, config()), away, atol=1e-4, rtol=1e-4)
        sample, timestep, classes = batch
        in_a_tuple = model(sample, timestep, classes, return_dict=False)[0]
        torch.testing.assert_close(in_a_tuple, answer(model, batch, timestep))
    assert torch.equal(generate(model, SCHEDULER, config()), plain)
    with Guide(model, worse, 1.0):
        assert torch.equal(generate(model, SCHEDULER, config()), plain)


def test_it_acts_in_its_interval_alone_and_is_not_run_elsewhere(tiny_dit):
    model, worse = tiny_dit(0, learn_sigma=False), tiny_dit(1, learn_sigma=False)
    base, labels, seen = copy.deepcopy(model), torch.arange(4), []
    worse.register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)

    def sometimes(x, t):
        own = base(x, t, labels).sample
        return own + 2.0 * (own - worse(x, t, labels).sample) if 250 <= float(t[0]) <= 500 else own

    expected = by_hand(sampler_of("DDIM", SCHEDULER, 4), sometimes, 4)
    assert len(seen) == 2
    with Guide(model, worse, 3.0, (0.25, 0.5)):
        torch.testing.assert_close(generate(model, SCHEDULER, config()), expected, atol=1e-4, rtol=1e-4)
    assert len(seen) == 4


def test_a_learned_variance_stays_the_models_own(tiny_dit, batch):
    model, worse = tiny_dit(0), tiny_dit(1)
    own, other = (answer(net, batch, batch[1]) for net in (model, worse))
    with Guide(model, worse, 3.0):
        found = answer(model, batch, batch[1])
    torch.testing.assert_close(found[:, :1], other[:, :1] + 3.0 * (own - other)[:, :1], atol=1e-5, rtol=1e-5)
    assert torch.equal(found[:, 1:], own[:, 1:])


@pytest.mark.parametrize("kind", ["patch", "lora", "finetune", "model"])
def test_a_guide_out_of_a_directory_and_what_is_learned_on_the_model_later(tiny_dit, tmp_path, batch, kind):
    model = tiny_dit()
    worse = tiny_dit(1) if kind == "model" else copy.deepcopy(model)
    if kind == "model":
        save_denoiser(worse, SCHEDULER, tmp_path)
    elif kind == "patch":
        patch = drawn_patch(worse)
        patch.save_pretrained(tmp_path)
        patch.attach(worse)
    else:
        drawn_method(kind, worse, rank=2).save(tmp_path)
    weights, memory = copy.deepcopy(model.state_dict()), {value.data_ptr() for value in model.parameters()}
    guide = attach_guide(model, SCHEDULER, config(guide=str(tmp_path), guide_scale=2.0))
    assert guide is guide_on(model)
    if kind in ("patch", "lora"):  # on the model's own memory
        assert {value.data_ptr() for value in guide.worse.parameters()} >= memory
    drawn_method("lora", model, rank=3)
    better = tiny_dit()
    drawn_method("lora", better, rank=3)
    with torch.no_grad():
        expected = 2.0 * answer(better, batch, batch[1]) - answer(worse, batch, batch[1])
        torch.testing.assert_close(answer(model, batch, batch[1])[:, :1], expected[:, :1], atol=1e-4, rtol=1e-4)
    base = {
        name.replace("base_layer.", ""): value for name, value in model.state_dict().items() if "lora_" not in name
    }
    assert_same(base, weights)


def test_a_copied_model_has_a_guide_of_its_own(tiny_dit, batch):
    model, worse = tiny_dit(0), tiny_dit(1)
    Guide(model, worse, 2.0)
    other = copy.deepcopy(model)
    expected = answer(model, batch, batch[1])
    with torch.no_grad():
        for parameter in [*model.parameters(), *worse.parameters()]:
            parameter.zero_()
    torch.testing.assert_close(answer(other, batch, batch[1]), expected)


def test_a_pipeline_is_guided_too():
    tiny = PIPELINES["SD3Transformer2DModel"]
    pipe, worse = tiny.build(), tiny.build()
    with torch.no_grad():
        for parameter in worse.transformer.parameters():
            parameter.mul_(0.9)
    choice = config(num_inference_steps=2, num_images=2)
    plain = generate_with_pipeline(pipe, choice, ["a cat", "a dog"])
    with Guide(pipe.transformer, worse.transformer, 3.0):
        guided = generate_with_pipeline(pipe, choice, ["a cat", "a dog"])
    assert guided.isfinite().all()
    assert not torch.allclose(guided, plain, atol=1e-3)
    assert torch.equal(generate_with_pipeline(pipe, choice, ["a cat", "a dog"]), plain)


def test_what_cannot_be_is_refused(tiny_dit, tmp_path):
    model, worse = tiny_dit(0), tiny_dit(1)
    with pytest.raises(UserError, match="number of classes is 3, the base's 10"):
        Guide(model, tiny_dit(1, num_classes=3))
    with pytest.raises(UserError, match="two noise levels"):
        Guide(model, worse, 2.0, (0.5, 0.2))
    with pytest.raises(UserError, match=r"The guide 'x' is not on the model"):
        generate(model, SCHEDULER, config(guide="x"))
    with at((1000, worse)).attach(model), pytest.raises(UserError, match="has experts attached already"):
        Guide(model, worse)
    with Guide(model, worse), pytest.raises(UserError, match="has guides attached already"):
        Guide(model, worse)
    with pytest.raises(UserError, match="Nothing at"):
        attach_guide(model, SCHEDULER, config(guide=str(tmp_path / "nowhere")))
    (tmp_path / "index.safetensors").touch()
    with pytest.raises(UserError, match=r"nothing that a method learned.* but a cache"):
        attach_guide(model, SCHEDULER, config(guide=str(tmp_path)))
    assert guide_on(model) is None
    assert attach_guide(model, SCHEDULER, config()) is None


FEW = ["--training.steps=2", "--training.batch_size=8", "--training.tensorboard=false", "--ddo.sampling.num_images=12"]


def test_a_guide_by_command_trained_on_the_models_own_samples(tmp_path, capsys):
    steps = ["--ddo.sampling.num_inference_steps=2", "--training.learning_rate=0.01"]
    trained = ["train", "--method=lora", "--objective=samples", *FEW, *steps, f"--output_dir={tmp_path / 'worse'}"]
    assert main(trained) == 0
    options = ["--sampling.num_images=8", "--sampling.num_inference_steps=2"]
    guided = [f"--sampling.guide={tmp_path / 'worse'}", "--sampling.guide_scale=5"]
    for name, more in (("plain", []), ("guided", guided)):
        assert main(["sample", *options, *more, f"--output_dir={tmp_path / name}"]) == 0
    plain, found = (read_tensors(tmp_path / name / "samples.safetensors")[0]["images"] for name in ("plain", "guided"))
    assert not torch.allclose(plain, found, atol=1e-3)
    measured = [f"--output_dir={tmp_path / 'measured'}", "--seeds=[0]", "--sampling.num_images=20"]
    assert main(["evaluate", *options, *guided, *measured]) == 0
    assert read_json(tmp_path / "measured" / "metrics.json")["base"]
    experts = tmp_path / "experts.yaml"
    experts.write_text("experts: [{from: 0, to: 1000}]")
    assert main(["sample", *options, *guided, f"--schedule={experts}", f"--output_dir={tmp_path / 'x'}"]) == 2
    assert "has guides attached already" in capsys.readouterr().err


def test_the_guides_condition_is_the_samples(tiny_dit):
    """With guidance by class too, each half of the doubled batch is moved away from its own."""
    model, worse = tiny_dit(0, learn_sigma=False), tiny_dit(1, learn_sigma=False)
    base, none = copy.deepcopy(model), torch.full((4,), 10)

    def both(x, t):
        def moved(labels):
            own, other = (predict(net, x, t, labels) for net in (base, worse))
            return 2.0 * own - other

        return moved(none) + 1.5 * (moved(torch.arange(4)) - moved(none))

    expected = by_hand(sampler_of("DDIM", SCHEDULER, 4), both, 4)
    with Guide(model, worse, 2.0):
        found = generate(model, SCHEDULER, replace(config(), guidance_scale=1.5))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)

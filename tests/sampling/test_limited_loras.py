"""LoRAs that are limited to ranges of timesteps, against switching a pipeline's adapters by hand between its steps."""

import copy

import pytest
import torch
import yaml
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from stagepatch import open_artifact
from stagepatch.cli import main
from stagepatch.core.errors import UserError
from stagepatch.sampling import LimitedLoRA, LimitedLoRAs, SamplingConfig, generate_with_pipeline, load_limited_loras
from stagepatch.sampling.limited_loras import read_limited_loras
from tests.tiny_pipelines import PIPELINES, PROMPT

STEPS = 6
RANGES = [("one", 400.0, 1000.0, 1.0), ("two", 200.0, 700.0, 0.5)]  # they overlap, and leave 0 to 200


def write_lora(pipe, directory, seed):
    """As `pipe.save_lora_weights` writes it, of random weights."""
    torch.manual_seed(seed)
    model = copy.deepcopy(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    kind = "unet" if hasattr(pipe, "unet") else "transformer"
    type(pipe).save_lora_weights(directory, **{f"{kind}_lora_layers": layers})
    return directory / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module", params=["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"])
def tiny(request):
    return PIPELINES[request.param]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def files(tiny, directory):
    pipe = tiny.build()
    return [write_lora(pipe, directory / tiny.family / name, seed) for seed, (name, *_) in enumerate(RANGES)]


@pytest.fixture(scope="module")
def expected(tiny, files):
    """Adapters set between the steps, by diffusers' own means."""
    pipe = tiny.build()
    for (name, *_), file in zip(RANGES, files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)

    def switch(told):
        on = [(name, weight) for name, start, end, weight in RANGES if start <= told < end or told == end == 1000]
        pipe.enable_lora() if on else pipe.disable_lora()
        if on:
            pipe.set_adapters([name for name, _ in on], [weight for _, weight in on])

    def after(pipe, step, timestep, values):
        if step + 1 < len(pipe.scheduler.timesteps):
            switch(float(pipe.scheduler.timesteps[step + 1]))
        return {}

    first = tiny.build()
    tiny.call(first, steps=STEPS)
    switch(float(first.scheduler.timesteps[0]))
    return tiny.call(pipe, steps=STEPS, callback_on_step_end=after)


def test_each_acts_in_its_range_alone(tiny, files, expected):
    pipe = tiny.build()
    base = tiny.call(pipe, steps=STEPS)
    for (name, *_), file in zip(RANGES, files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.7, 1.3])
    everywhere = tiny.call(pipe, steps=STEPS)
    with LimitedLoRAs(pipe, [LimitedLoRA(*each) for each in RANGES]):
        limited = tiny.call(pipe, steps=STEPS)
    assert torch.equal(limited, expected)
    assert not torch.allclose(limited, base, atol=1e-3)
    assert not torch.allclose(limited, everywhere, atol=1e-3)
    assert torch.equal(tiny.call(pipe, steps=STEPS), everywhere), "what was on before is on again, as it was"
    pipe.disable_lora()
    with LimitedLoRAs(pipe, [LimitedLoRA(*each) for each in RANGES]):
        assert torch.equal(tiny.call(pipe, steps=STEPS), expected)
    assert torch.equal(tiny.call(pipe, steps=STEPS), base), "and off again what was off"


def test_the_command_writes_what_a_pipeline_loads_with_one_call_and_sample_takes(tiny, files, expected, tmp_path):
    schedule = tmp_path / "made" / "experts.yaml"
    given = [f"--loras={[str(file) for file in files]}", f"--ranges={[[start, end] for _, start, end, _ in RANGES]}"]
    assert main(["experts", *given, "--weights=[1.0, 0.5]", f"--output={schedule}"]) == 0
    assert open_artifact(schedule).kind == "experts"
    pipe = tiny.build()
    pipe.save_pretrained(tmp_path / "model")
    load_limited_loras(schedule, pipe)
    assert torch.equal(tiny.call(pipe, steps=STEPS), expected)
    sampling = ["--sampling.num_images=1", "--sampling.num_inference_steps=3", "--sampling.guidance_scale=2"]
    height, width = tiny.pixels
    size = [f"--call={{height: {height}, width: {width}}}", f"--prompts=['{PROMPT}']"]
    command = ["sample", f"--model={tmp_path / 'model'}", f"--schedule={schedule}", *sampling, *size]
    command.append(f"--output_dir={tmp_path / 'out'}")
    assert main(command) == 0
    images = load_file(tmp_path / "out" / "samples.safetensors")["images"]
    loaded = tiny.load(tmp_path / "model")
    load_limited_loras(schedule, loaded)
    config = SamplingConfig(num_images=1, num_inference_steps=3, guidance_scale=2.0)
    own = generate_with_pipeline(loaded, config, [PROMPT], call={"height": height, "width": width})
    torch.testing.assert_close(images, own, rtol=1e-4, atol=1e-4)


def test_relative_files_are_the_schedules_neighbours(tiny, files, directory):
    entries = [{"file": "one/pytorch_lora_weights.safetensors", "from": 400, "to": 1000}]
    schedule = directory / tiny.family / "experts.yaml"
    schedule.write_text(yaml.safe_dump({"loras": entries}))
    (lora,) = load_limited_loras(schedule, tiny.build()).loras
    assert (lora.start, lora.end, lora.weight) == (400, 1000, 1.0)


@pytest.mark.parametrize("weight", [float("nan"), float("-inf"), 10**400], ids=["nan", "inf", "long"])
def test_a_weight_that_is_no_number_is_refused(tmp_path, weight):
    path = tmp_path / "experts.yaml"
    path.write_text(yaml.safe_dump({"loras": [{"file": "a", "from": 0, "to": 1000, "weight": weight}]}))
    with pytest.raises(UserError, match="LoRA 1: `weight` must be finite"):
        read_limited_loras(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loras=[a, b]", "--ranges=[[0, 500]]"], "1 ranges for 2 loras"),
        ([], "0 ranges for 0 loras"),
        (["--loras=[a]", "--ranges=[[500, 400]]"], "`from` must be less than `to`"),
        (["--loras=[a]", "--ranges=[[0, 2000]]"], "within 0, an image, to 1000"),
        (["--loras=[a]", "--ranges=[[0, 500, 600]]"], "give its two ends"),
        (["--loras=[a]", "--ranges=[[0, 500]]", "--weights=[1, 2]"], "2 weights for 1 loras"),
        (["--loras=[a.safetensors]", "--ranges=[[0, 500]]"], "No LoRA at 'a.safetensors'"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, options, message):
    assert main(["experts", *options, f"--output={tmp_path / 'experts.yaml'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "experts.yaml").exists()


def test_what_a_pipeline_refuses(tmp_path):
    tiny = PIPELINES["SD3Transformer2DModel"]
    pipe = tiny.build()
    with pytest.raises(UserError, match="No adapter 'style' is loaded: none is"):
        LimitedLoRAs(pipe, [LimitedLoRA("style")])
    file = write_lora(pipe, tmp_path / "one", 0)
    pipe.load_lora_weights(file, adapter_name="one")
    with pytest.raises(UserError, match="No adapter 'style' is loaded: one"):
        LimitedLoRAs(pipe, [LimitedLoRA("style")])
    LimitedLoRAs(pipe, [LimitedLoRA("one", 0, 500)])
    family = pipe.transformer
    with pytest.raises(UserError, match="ranges of different LoRAs"):
        family(
            hidden_states=torch.randn(2, 4, 8, 8),
            timestep=torch.tensor([100.0, 900.0]),
            encoder_hidden_states=torch.randn(2, 3, family.config.joint_attention_dim),
            pooled_projections=torch.randn(2, family.config.pooled_projection_dim),
        )
    schedule = tmp_path / "experts.yaml"
    for content, message in [
        ({"loras": [{"file": "nothing.safetensors", "from": 0, "to": 500}]}, "No LoRA at 'nothing.safetensors'"),
        ({"loras": [{"file": "a", "from": 0}]}, "LoRA 1 lacks `to`"),
        ({"loras": [{"file": "a", "from": 0, "to": 5, "wieght": 2}]}, "LoRA 1 has no key 'wieght'"),
    ]:
        schedule.write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=message):
            load_limited_loras(schedule, tiny.build())
    with pytest.raises(UserError, match="for a pipeline that loads them"):
        load_limited_loras(schedule, torch.nn.Linear(1, 1))

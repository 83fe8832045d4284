"""An assistant LoRA, against the adapter that diffusers itself puts on the model."""

import json

import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image
from safetensors.torch import load_file

from stagepatch.checkpoints import sign_of_distillation
from stagepatch.training.assistant import Assistant
from tests.runs import options
from tests.sampling.test_limited_loras import write_lora
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES
from tests.training.test_train_on_pipelines import draw_images, train

NAMES = ["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def pipe(name):
    return PIPELINES[name].build()


@pytest.fixture
def source(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def lora(pipe, tmp_path):
    return write_lora(pipe, tmp_path / "lora", 3)


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def test_it_is_the_adapter_while_it_is_on_and_nothing_while_it_is_off(name, pipe, source, lora):
    model, call = denoiser(pipe), FAMILIES[name].call
    names, base = list(model.state_dict()), call(model)
    assistant = Assistant(model, str(source), str(lora))
    assert list(model.state_dict()) == names
    assert torch.equal(call(model), base)
    with assistant.set(True):
        assisted = call(model)
        with assistant.set(False):
            assert torch.equal(call(model), base)
        assert torch.equal(call(model), assisted)
    assert torch.equal(call(model), base)
    pipe.load_lora_weights(lora)
    expected = call(denoiser(pipe))
    assert not torch.allclose(expected, base, atol=1e-3)
    torch.testing.assert_close(assisted, expected)


def test_what_is_trained_beside_it_is_what_is_trained_on_the_model_that_it_is_fused_into(tmp_path, caplog):
    pipe = PIPELINES["UNet2DConditionModel"].build()
    draw_images(tmp_path / "images")
    pipe.save_pretrained(tmp_path / "model")
    lora = write_lora(pipe, tmp_path / "lora", 3)
    pictures = options("validation", {"every": 2, "prompts": ["a cat"], "sampling.num_inference_steps": 1})
    assert train(tmp_path, f"--assistant_lora={lora}", *pictures, output="assisted") == 0
    assert train(tmp_path, "--training.learning_rate=0.0", *pictures, output="none") == 0
    pipe.load_lora_weights(lora)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({**pipe.config, "is_distilled": True}))
    assert "was distilled" not in caplog.text
    assert train(tmp_path, output="fused") == 0
    assert "was distilled (is_distilled in its model_index.json)" in caplog.text
    assisted, fused = (load_file(tmp_path / run / "model.safetensors") for run in ("assisted", "fused"))
    assert assisted.keys() == fused.keys()
    for name, value in fused.items():
        torch.testing.assert_close(assisted[name], value, rtol=1e-3, atol=1e-4)
    base = [Image.open(tmp_path / run / "validation" / "0000002.png") for run in ("assisted", "none")]
    left = [picture.crop((0, 0, picture.width // 2, picture.height)).tobytes() for picture in base]
    assert left[0] == left[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--assistant_lora=nowhere"], "assistant_lora='nowhere' cannot be loaded"),
        (["--assistant_lora=lora", "--objective=ddo"], "is for objective='denoising'"),
        (["--assistant_lora=lora", "--model=digits", "--data.source=digits"], "'digits' is no whole pipeline"),
    ],
)
def test_what_cannot_be_is_refused_in_words(given, message, tmp_path, capsys):
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "model")
    draw_images(tmp_path / "images")
    assert train(tmp_path, *given) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("mark", ["is_distilled", "LCMScheduler"])
def test_a_distilled_model_shows_it(mark, tmp_path):
    path = tmp_path / "model"
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(path)
    assert not sign_of_distillation(path)
    if mark == "is_distilled":
        index = json.loads((path / "model_index.json").read_text())
        (path / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    else:
        LCMScheduler.from_pretrained(path, subfolder="scheduler").save_pretrained(path / "scheduler")
    assert mark in sign_of_distillation(path)

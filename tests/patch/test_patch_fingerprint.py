"""A patch knows the model it was made for."""

import json
import warnings

import pytest
import torch

from stagepatch.checkpoints import load_denoiser
from stagepatch.core.errors import UserError
from stagepatch.patch import Patch
from tests.tiny import FAMILIES


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_layers": 4}, "num_layers 3 against the model's 4"),
        ({"in_channels": 3}, "in_channels 1 against the model's 3"),
        ({"num_classes": 7}, "num_classes 10 against the model's 7"),
        ({"learn_sigma": False}, "learn_sigma True against the model's False"),
    ],
    ids=str,
)
def test_other_architecture_is_refused_by_name_of_what_differs(tiny_dit, tmp_path, overrides, message):
    Patch.create(tiny_dit()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"for another model: .*{message}"):
        Patch.from_pretrained(tmp_path).attach(tiny_dit(**overrides))


def test_unet_for_inpainting_is_not_the_unet_the_patch_was_made_for(tmp_path):
    Patch.create(FAMILIES["UNet2DConditionModel"].build()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="in_channels 4 against the model's 9"):
        Patch.from_pretrained(tmp_path).attach(FAMILIES["UNet2DConditionModel"].build(in_channels=9))


def test_other_weights_of_the_architecture_warn_and_the_same_do_not(tiny_dit, tmp_path):
    Patch.create(tiny_dit(seed=0)).save_pretrained(tmp_path)
    Patch.from_pretrained(tmp_path).attach(tiny_dit(seed=0))
    with pytest.warns(UserWarning, match="trained on other weights of this architecture: '.*' differs"):
        Patch.from_pretrained(tmp_path).attach(tiny_dit(seed=1))


def test_model_that_was_trained_on_a_little_warns(tiny_dit, tmp_path):
    Patch.create(tiny_dit()).save_pretrained(tmp_path)
    other = tiny_dit()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.001)
    with pytest.warns(UserWarning, match="other weights"):
        Patch.from_pretrained(tmp_path).attach(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_same_weights_in_another_precision_do_not_warn(tiny_dit, tmp_path, dtype):
    Patch.create(tiny_dit()).save_pretrained(tmp_path)
    Patch.from_pretrained(tmp_path).attach(tiny_dit().to(dtype))


def test_another_sample_size_of_the_same_model_is_no_difference(tiny_dit, tmp_path):
    Patch.create(tiny_dit()).save_pretrained(tmp_path)
    Patch.from_pretrained(tmp_path).attach(tiny_dit(sample_size=16))


def test_weights_that_are_not_in_memory_are_not_compared(tmp_path):
    family = FAMILIES["SD3Transformer2DModel"]
    Patch.create(family.model()).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = family.build()
    Patch.from_pretrained(tmp_path).attach(model)


def test_file_names_the_model_the_patch_was_made_for(tmp_path):
    model, _ = load_denoiser("digits")
    Patch.create(model).save_pretrained(tmp_path)
    fingerprint = json.loads((tmp_path / "config.json").read_text())["fingerprint"]
    assert fingerprint["model_id"] == "digits"
    assert fingerprint["dtype"] == "float32"
    name, numbers = next(iter(fingerprint["weights"].items()))
    assert numbers == model.get_parameter(name).flatten()[:4].tolist()


def test_fingerprint_of_another_form_is_an_error(tiny_dit, tmp_path):
    Patch.create(tiny_dit()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["fingerprint"]["colour"] = "red"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="fingerprint in a form not known here"):
        Patch.from_pretrained(tmp_path)

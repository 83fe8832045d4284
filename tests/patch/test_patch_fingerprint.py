"""A patch knows the model it was made for."""

import json
import warnings
from types import SimpleNamespace

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


@pytest.fixture
def attach_saved(tmp_path):
    """Saves a patch of the first model and attaches what comes back to the second."""

    def attach(made_for, other):
        Patch.create(made_for).save_pretrained(tmp_path)
        Patch.from_pretrained(tmp_path).attach(other)

    return attach


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_layers": 2}, r"3 sites \(blocks.0…\) against 2"),
        ({"num_layers": 4}, r"3 sites \(blocks.0…\) against 4.*num_layers 3 against the model's 4"),
        (
            {"hidden_size": 48},
            "condition_channels 32 against the model's 48; channels 32 at blocks.0 against the model's 48",
        ),
        ({"in_channels": 3}, ".*in_channels 1 against the model's 3"),
        ({"num_classes": 7}, ".*num_classes 10 against the model's 7"),
        ({"learn_sigma": False}, ".*learn_sigma True against the model's False"),
    ],
    ids=str,
)
def test_other_architecture_is_refused_by_name_of_what_differs(tiny_dit, attach_saved, overrides, message):
    other = tiny_dit(**overrides)
    with pytest.raises(UserError, match=f"The patch is for another model: {message}"):
        attach_saved(tiny_dit(), SimpleNamespace(transformer=other))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in other.modules())


def test_unet_for_inpainting_is_not_the_unet_the_patch_was_made_for(attach_saved):
    family = FAMILIES["UNet2DConditionModel"]
    with pytest.raises(UserError, match="in_channels 4 against the model's 9"):
        attach_saved(family.build(), family.build(in_channels=9))


def test_other_weights_of_the_architecture_warn(tiny_dit, attach_saved):
    with pytest.warns(UserWarning, match="trained on other weights of this architecture: '.*' differs"):
        attach_saved(tiny_dit(seed=0), tiny_dit(seed=1))


def test_model_that_was_trained_on_a_little_warns(tiny_dit, attach_saved):
    other = tiny_dit()
    for parameter in other.parameters():
        parameter.mul_(1.001)
    with pytest.warns(UserWarning, match="other weights"):
        attach_saved(tiny_dit(), other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_same_weights_in_any_precision_do_not_warn(tiny_dit, attach_saved, dtype):
    attach_saved(tiny_dit(), tiny_dit().to(dtype))


def test_another_sample_size_of_the_same_model_is_no_difference(tiny_dit, attach_saved):
    attach_saved(tiny_dit(), tiny_dit(sample_size=16))


def test_weights_that_are_not_in_memory_are_not_compared(attach_saved):
    family = FAMILIES["SD3Transformer2DModel"]
    with torch.device("meta"):
        other = family.build()
    attach_saved(family.model(), other)


def test_file_names_the_model_the_patch_was_made_for(tmp_path):
    model, _ = load_denoiser("digits")
    Patch.create(model).save_pretrained(tmp_path)
    fingerprint = json.loads((tmp_path / "config.json").read_text())["fingerprint"]
    assert (fingerprint["model_id"], fingerprint["dtype"]) == ("digits", "float32")
    name, numbers = next(iter(fingerprint["weights"].items()))
    assert numbers == model.get_parameter(name).flatten()[:4].tolist()

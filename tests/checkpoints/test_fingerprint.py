"""Fingerprints are kept in caches, journals and stages: they stay what they were, and change with what they are of."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stagepatch.checkpoints import files_fingerprint, model_fingerprint, module_fingerprint, sampled_fingerprint

WEIGHT = torch.arange(12.0).view(3, 4)


def model_directory(directory, weight):
    (directory / "unet").mkdir(exist_ok=True)
    names = ["b", "a"]
    for number, name in enumerate(names):  # two files, which are no part of what the fingerprint is of
        path = directory / "unet" / f"diffusion_pytorch_model-{number}.safetensors"
        save_file({name: weight + number, f"{name}.half": weight.half()}, path)
    return model_fingerprint(directory)


def module(directory, weight):
    layer = nn.Linear(4, 3)
    layer.load_state_dict({"weight": weight, "bias": torch.ones(3)})
    return module_fingerprint(layer)


def write(directory, weight):
    (directory / "unet").mkdir(exist_ok=True)
    content = weight.numpy().tobytes()
    (directory / "unet" / "model.safetensors").write_bytes(content * 5000)
    (directory / "more.safetensors").write_bytes(content[:5])
    return directory


@pytest.mark.parametrize(
    ("fingerprint", "before"),
    [
        (model_directory, "ffc4a9014551a5ff"),
        (module, "9242e5e7a6f6184b"),
        (lambda directory, weight: files_fingerprint(write(directory, weight)), "2685ee936fdf035d"),
        (lambda directory, weight: sampled_fingerprint(write(directory, weight)), "75bf8d033f21d52c"),
    ],
    ids=["model", "module", "files", "sampled"],
)
def test_fingerprint_is_what_it_was_and_changes_with_a_weight(tmp_path, fingerprint, before):
    assert fingerprint(tmp_path, WEIGHT)[:16] == before
    assert fingerprint(tmp_path, WEIGHT + 1)[:16] != before

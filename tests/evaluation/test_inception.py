"""Inception-v3 layer by layer against torch-fidelity's, which is not in `dev`: `make test-inception`.

torch-fidelity imports torchvision for its data sets and other networks, not for this one. So that torchvision is not
needed, the module of this network alone is imported, without what the package imports at first.
"""

import importlib
import importlib.util
import sys
import types
from functools import partial

import pytest
import torch

from stagepatch.evaluation.inception import Inception, load_inception, resize_as_tensorflow

FOUND = importlib.util.find_spec("torch_fidelity")
pytestmark = pytest.mark.skipif(FOUND is None, reason="needs torch-fidelity: make test-inception")


@pytest.fixture(scope="module")
def fidelity():
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(FOUND.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    yield lambda name: importlib.import_module(f"torch_fidelity.{name}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def both(fidelity, tmp_path_factory):
    """Ours and theirs, with the same random weights; running means and variances are random too."""
    torch.manual_seed(0)
    state = Inception().state_dict()
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn_like(tensor) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("running_mean", "bias")):
            state[name] = torch.randn_like(tensor) * 0.1
        elif name.endswith(("running_var", "bn.weight")):
            state[name] = 1 + torch.rand_like(tensor) * 0.2
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, path)
    theirs = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    names = ["2048", "logits_unbiased"]
    return load_inception(str(path)), theirs("inception-v3-compat", names, feature_extractor_weights_path=str(path))


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (299, 299), (350, 320)])
def test_resizing_is_theirs(fidelity, size):
    pixels = torch.randint(0, 256, (2, 3, *size)).float()
    theirs = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    expected = theirs(pixels, size=(299, 299), align_corners=False)
    assert torch.equal(resize_as_tensorflow(pixels), expected)


def keep(seen, name, _module, _given, output):
    seen[name] = output.clone()


@torch.no_grad()
def test_every_layer_is_theirs(both):
    ours, theirs = both
    outputs = ({}, {})
    for model, seen in zip(both, outputs, strict=True):
        for name, module in model.named_modules():
            if name:  # of a block its end, of a layer its own output, before a ReLU in place
                module.register_forward_hook(partial(keep, seen, name))
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    found = ours(resize_as_tensorflow(pixels.float()))
    features, logits = theirs(pixels)
    torch.testing.assert_close(found["features"], features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-4)
    shared = [name for name in outputs[0] if name in outputs[1]]
    assert {name for name, _ in ours.named_children()} - {"fc"} <= {*shared}
    assert len(shared) > 190  # 94 convolutions, their normalisations, blocks
    for name in shared:
        apart = float((outputs[0][name] - outputs[1][name]).abs().max() / outputs[1][name].abs().max())
        assert apart < 1e-5, (name, apart)
    spatial = outputs[1]["Mixed_6d.branch1x1.bn"].relu()[:, :7].permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(found["spatial"], spatial, rtol=1e-4, atol=1e-4)


def test_their_weights_load_in_ours_and_ours_in_theirs(both):
    assert {name: value.shape for name, value in both[0].state_dict().items()} == {
        name: value.shape for name, value in both[1].state_dict().items()
    }

"""Inception-v3 and the encoders of transformers as extractors, with weights that the tests draw."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
)

from stagepatch import evaluation
from stagepatch.cli import main
from stagepatch.core import UserError, read_json
from stagepatch.data import ImageDataset
from stagepatch.evaluation import References, load_extractor
from stagepatch.evaluation.features import ModuleFeatures, extract_outputs, quantised, resize_clean
from stagepatch.evaluation.inception import Inception, resize_as_tensorflow
from tests.hub import TAGGED

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 16, "patch_size": 8}
IMAGES = torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The three encoders, tiny, as transformers saves them; CLIP's with a tokenizer of letters."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    text = {**TOWER, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=12)).save_pretrained(root / "clip")
    letters = [*"abcdefghij", *(f"{letter}</w>" for letter in "abcdefghij")]
    vocabulary = {token: place for place, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(root / "clip")
    SiglipModel(SiglipConfig(text_config={**TOWER, "vocab_size": 40}, vision_config=VISION)).save_pretrained(
        root / "siglip"
    )
    Dinov2Model(Dinov2Config(**{**VISION, "mlp_ratio": 1})).save_pretrained(root / "dinov2")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Inception with weights that keep the activations apart from zero, as pytorch-fid's file: without counters."""
    torch.manual_seed(0)
    network, path = Inception(), tmp_path_factory.mktemp("inception") / "weights.pth"
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith("batches_tracked")}
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            state[name] = torch.randn_like(tensor) * (2 / tensor[0].numel()) ** 0.5
    torch.save(state, path)
    return path


def test_images_are_resized_as_clean_fid_does():
    pixels = quantised(IMAGES)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, IMAGES.shape)
    for size in (11, 40):
        expected = F.interpolate(pixels.double(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)
        np.testing.assert_allclose(resize_clean(pixels, size), expected, atol=2e-3)
    assert torch.equal(resize_clean(pixels, 24), pixels.float())
    assert torch.equal(quantised(IMAGES[:, :1]), pixels[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(UserError, match="1 or 3 channels, not 4"):
        quantised(torch.zeros(1, 4, 8, 8))


def test_tensorflows_resize_takes_the_nearest_two_from_the_top_left():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    found = resize_as_tensorflow(ramp, 8)[0, 0, 0]
    assert found.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]  # torch's own begins at -0.25
    assert torch.equal(resize_as_tensorflow(ramp.mT, 8), resize_as_tensorflow(ramp, 8).mT)
    shrunk = resize_as_tensorflow(torch.arange(8.0).expand(1, 1, 8, 8), 4)
    assert shrunk[0, 0, 0].tolist() == [0, 2, 4, 6]


def test_inception_gives_features_spatial_ones_and_logits(weights, monkeypatch):
    monkeypatch.setenv("STAGEPATCH_INCEPTION", str(weights))
    extractor, legacy = load_extractor("inception"), load_extractor(f"inception_legacy:{weights}")
    found = extractor.outputs(IMAGES[:2])
    assert {name: [*value.shape] for name, value in found.items()} == {
        "features": [2, 2048],
        "spatial": [2, 2023],
        "logits": [2, 1008],
    }
    torch.testing.assert_close(found["logits"], found["features"] @ extractor.network.fc.weight.T)
    assert float(found["features"].std()) > 1e-3
    torch.testing.assert_close(extractor(IMAGES[1:2]), found["features"][1:], rtol=1e-3, atol=1e-4)
    assert float((legacy(IMAGES[:1]) - found["features"][:1]).abs().max()) > 1e-3
    assert extractor.fingerprint != legacy.fingerprint
    assert "antialiased bicubic" in extractor.preprocessing
    assert "TensorFlow 1" in legacy.preprocessing


def test_a_file_of_other_weights_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other.pth' does not hold Inception-v3's weights"):
        load_extractor(f"inception:{tmp_path / 'other.pth'}")


@pytest.mark.parametrize(("name", "size"), [("clip", 12), ("siglip", 16), ("dinov2", 16)])
def test_encoders_are_those_of_transformers(folder, name, size):
    extractor = load_extractor(f"{name}:{folder / name}")
    found = extractor(IMAGES)
    assert found.shape == (5, size)
    assert not found.requires_grad
    assert extractor.fingerprint == load_extractor(f"{name}:{folder / name}").fingerprint
    assert "16×16" in extractor.preprocessing
    if name == "clip":  # its own processor rounds after resizing
        processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
        pixels = processor([*quantised(IMAGES).permute(0, 2, 3, 1).numpy()], return_tensors="pt")["pixel_values"]
        expected = CLIPModel.from_pretrained(folder / name).get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(found, expected.detach(), rtol=0.02, atol=0.02)


def test_an_encoder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"DINOv2 cannot be loaded from .*as in dinov2:/path"):
        load_extractor(f"dinov2:{tmp_path}")


def test_a_revision_of_the_hub_is_what_is_loaded_and_recorded(folder, hub, tmp_path, monkeypatch):
    """As an extractor of `evaluate`; CLIP's tokenizer is of the same commit."""
    monkeypatch.setenv("STAGEPATCH_CACHE", str(tmp_path / "cache"))
    for name in ("dinov2", "clip"):
        files = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
        hub.repos[f"org/{name}@v1"] = files
        hub.repos[f"org/{name}"] = {"config.json": files["config.json"]}  # no weights
    images = [np.random.default_rng(seed).integers(0, 256, (20, 8, 8), dtype=np.uint8) for seed in (0, 1)]
    for place, each in zip(("a.npy", "b.npy"), images, strict=True):
        np.save(tmp_path / place, each)
    given = ["evaluate", str(tmp_path / "a.npy"), str(tmp_path / "b.npy"), "--extractor=dinov2:org/dinov2@v1"]
    assert main([*given, f"--output_dir={tmp_path / 'out'}"]) == 0
    name, pinned = "org/dinov2@v1", f"org/dinov2@{TAGGED}"
    assert read_json(tmp_path / "out" / "metrics.json")["loaded"] == {name: pinned}
    assert f"# {name} was {pinned}" in (tmp_path / "out" / "run.yaml").read_text()
    assert pinned in (tmp_path / "out" / "report.html").read_text()
    clip = load_extractor("clip:org/clip@v1")
    assert torch.equal(clip(IMAGES), load_extractor(f"clip:{folder / 'clip'}")(IMAGES))
    assert clip.of_captions(["abc"]).shape == (1, 12)
    with pytest.raises(UserError, match="CLIP cannot be loaded from 'org/clip'"):
        load_extractor("clip:org/clip")
    with pytest.raises(UserError, match=r"CLIP cannot be loaded from 'org/clip@v2'.*the Hub does not give it"):
        load_extractor("clip:org/clip@v2")


def test_any_module_is_an_extractor():
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 7))
    extractor = ModuleFeatures(module, "mine")
    assert torch.equal(extractor(IMAGES), module(IMAGES).detach())
    assert extractor.fingerprint != ModuleFeatures(module, "mine", "halved").fingerprint
    with pytest.raises(UserError, match=r"'mine' gives \[5, 3, 24, 24\]"):
        ModuleFeatures(nn.Identity(), "mine")(IMAGES)


def test_metrics_of_several_outputs_and_extractors_are_measured_in_one_pass(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("STAGEPATCH_CACHE", str(tmp_path))
    clip, dinov2 = (load_extractor(f"{name}:{folder / name}") for name in ("clip", "dinov2"))

    class Three:
        name, fingerprint, output_names = "three", "three", ("features", "spatial", "logits")

        def __call__(self, images):
            return images[:, :, 0, :2].flatten(1)

        def outputs(self, images):
            first = self(images)
            return {"features": first, "spatial": 2 * first, "logits": first}

    train, held_out, images = (torch.rand(30, 3, 24, 24) * 2 - 1 for _ in range(3))
    labels = torch.zeros(30, dtype=torch.long)
    both = References(ImageDataset(train, labels), ImageDataset(held_out, labels))
    others = {"clip": clip, "dinov2": dinov2}
    evaluator = evaluation.Evaluator(both, Three(), others=others, keys=["all"])
    samples = evaluator.collect(images, captions=["abc"] * 30)
    found = evaluator.measure_collected(samples)
    assert {*found} == {*evaluation.METRICS} - {"fid_second"}
    assert found["sfid"] == pytest.approx(4 * found["fid_held_out"])
    assert found["cmmd"] == evaluation.cmmd(clip(images), clip(held_out))
    assert found["fd_dinov2"] == pytest.approx(evaluation.fid(dinov2(images), dinov2(held_out)), rel=1e-6)
    captions = CLIPModel.from_pretrained(folder / "clip")
    expected = captions.get_text_features(clip_tokens(folder)).pooler_output.expand(30, -1).detach()
    assert found["clip_score"] == pytest.approx(evaluation.clip_score(clip(images), expected), rel=1e-4)
    halves = [evaluator.collect(part, captions=["abc"] * 15) for part in images.split(15)]
    for name, value in samples.items():
        torch.testing.assert_close(torch.cat([half[name] for half in halves]), value)
    without = evaluator.measure_left_out(samples)
    assert {*without} == {*found} - {"fid_infinity"}
    assert all(len(values) == 20 for values in without.values())


def clip_tokens(folder):
    return CLIPTokenizer.from_pretrained(folder / "clip")(["abc"], return_tensors="pt")["input_ids"]


def test_outputs_do_not_depend_on_the_batch(weights):
    extractor = load_extractor("digits")
    images = torch.randn(7, 1, 8, 8)
    whole, parts = (extract_outputs(extractor, images, ["features", "logits"], size) for size in (7, 2))
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(whole["logits"], extractor.classifier(images).detach())


def test_metrics_that_there_are_not_are_refused():
    with pytest.raises(UserError, match=r"no metric 'fidd'. Choose of: all, fid, fid_train"):
        evaluation.chosen(["fidd"])

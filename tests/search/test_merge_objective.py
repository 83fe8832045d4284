"""What a search evaluates is what merging writes, measured as everywhere else."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagepatch.checkpoints import add_projections, load_denoiser, model_fingerprint, save_denoiser
from stagepatch.core.errors import UserError
from stagepatch.data import DataConfig
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.evaluation import load_extractor, load_references, measure
from stagepatch.merging import Ties, find_stages, merge_lora_stages, merge_models
from stagepatch.methods import LoRAConfig, load_learned, make_method
from stagepatch.patch import PatchConfig
from stagepatch.sampling import SamplingConfig
from stagepatch.search.merge_objective import MergedLoRA, MergedModel, SampleFID

SAMPLING = SamplingConfig(num_images=12, num_inference_steps=2, seed=3)
WEIGHTS = [0.3, 0.9]


@pytest.fixture
def directories(tiny_dit, tmp_path):
    """A base and two stages, as model directories."""
    scheduler = make_scheduler(ObjectiveConfig())
    for seed, name in enumerate(("base", "one", "two")):
        save_denoiser(tiny_dit(seed), scheduler, tmp_path / name)
    return [str(tmp_path / name) for name in ("base", "one", "two")]


def stages_of(directories):
    return find_stages(directories[0], directories[1:])


def tensors_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(model, expected):
    own, theirs = model.state_dict(), expected.state_dict()
    assert set(own) == set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())


@pytest.mark.parametrize("ties", [None, Ties(0.4)])
def test_model_in_memory_is_the_model_that_is_written(directories, tmp_path, ties, monkeypatch):
    monkeypatch.setattr("stagepatch.search.merge_objective.PIECE", 7)
    stages = stages_of(directories)
    merged = MergedModel(stages, ties)
    merged.at([1.0, -2.0])  # nothing of it stays
    merge_models(tmp_path / "base", stages.directories, WEIGHTS, tmp_path / "out", ties)
    assert_equal(merged.at(WEIGHTS), load_denoiser(tmp_path / "out")[0])


def test_half_precision_is_rounded_as_in_the_written_model(directories, tmp_path):
    for directory in directories:
        path = tmp_path / directory / "transformer" / "diffusion_pytorch_model.safetensors"
        save_file({name: value.half() for name, value in load_file(path).items()}, path)
    stages = stages_of(directories)
    merge_models(tmp_path / "base", stages.directories, WEIGHTS, tmp_path / "out")
    assert_equal(MergedModel(stages).at(WEIGHTS), load_denoiser(tmp_path / "out")[0])


def test_projections_of_stages_are_merged_too(directories, tmp_path):
    for name in ("one", "two"):
        model, scheduler = load_denoiser(tmp_path / name)
        projection = add_projections(model)
        for number, weight in enumerate(projection.parameters()):
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        save_denoiser(model, scheduler, tmp_path / name)
    stages = stages_of(directories)
    merge_models(tmp_path / "base", stages.directories, WEIGHTS, tmp_path / "out")
    assert_equal(MergedModel(stages).at(WEIGHTS), load_denoiser(tmp_path / "out")[0])


def test_lora_in_memory_is_the_lora_that_is_written(directories, tmp_path, batch):
    for number in (1, 2):
        model, _ = load_denoiser(directories[0])
        method = make_method("lora", PatchConfig(), LoRAConfig(rank=number))
        (group,) = method.prepare(model)
        for parameter in group["params"]:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
        method.save(tmp_path / f"lora{number}")
    stages = find_stages(directories[0], [str(tmp_path / "lora1"), str(tmp_path / "lora2")], needs_base=True)
    merged = MergedLoRA(stages)
    merged.at([5.0, 5.0])
    merge_lora_stages(stages.directories, WEIGHTS, tmp_path / "out")
    expected, _ = load_denoiser(directories[0])
    load_learned(expected, tmp_path / "out")
    with torch.no_grad():
        predicted = [model(*batch, return_dict=False)[0] for model in (merged.at(WEIGHTS), expected)]
    assert torch.equal(*predicted)


@pytest.mark.parametrize("metric", ["fid_train", "fid_held_out"])
def test_value_is_the_fid_that_evaluate_reports(directories, metric):
    references, extractor = load_references(DataConfig()), load_extractor("digits")
    merged = MergedModel(stages_of(directories))
    objective = SampleFID(merged, SAMPLING, references, extractor, metric)
    value = objective(WEIGHTS)
    model, scheduler = copy.deepcopy(merged.at(WEIGHTS)), merged.scheduler
    assert objective([0.0, 0.0]) != value
    measured = measure(model, scheduler, SAMPLING, [SAMPLING.seed], references, extractor)
    assert value == measured.values(metric)[0]
    assert objective(WEIGHTS) == value  # the noise is the same


def test_models_that_sample_no_numbers_are_infinitely_bad(directories):
    merged = MergedModel(stages_of(directories))
    objective = SampleFID(merged, SAMPLING, load_references(DataConfig()), load_extractor("digits"))
    assert objective([1e30, -1e30]) == math.inf


def test_held_out_images_must_be_there(directories):
    references = load_references(DataConfig())
    references.held_out = None
    with pytest.raises(UserError, match="no held-out images; use 'fid_train'"):
        SampleFID(MergedModel(stages_of(directories)), SAMPLING, references, load_extractor("digits"), "fid_held_out")


def test_stages_of_other_architectures_are_refused_by_name(directories, tiny_dit, tmp_path):
    save_denoiser(tiny_dit(num_layers=2), make_scheduler(ObjectiveConfig()), tmp_path / "two")
    with pytest.raises(UserError, match=r"two' has another architecture than the base: \d+ tensors differ"):
        MergedModel(stages_of(directories))


def test_fingerprint_is_of_the_weights_however_they_are_divided(directories, tmp_path):
    first = model_fingerprint(tmp_path / "one")
    assert first != model_fingerprint(tmp_path / "two")
    path = tmp_path / "one" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    parts = (names[:3], names[3:])
    for number, part in enumerate(reversed(parts)):
        save_file({name: tensors[name] for name in part}, path.with_stem(f"{path.stem}-0000{number}-of-00002"))
    path.unlink()
    assert model_fingerprint(tmp_path / "one") == first
    changed = {**tensors, names[0]: tensors[names[0]] + 1e-6}
    for part in path.parent.glob("*.safetensors"):
        part.unlink()
    save_file(changed, path)
    assert model_fingerprint(tmp_path / "one") != first
    save_file({name: value.view(-1) for name, value in tensors.items()}, path)
    assert model_fingerprint(tmp_path / "one") != first
    with pytest.raises(UserError, match="not a model directory"):
        model_fingerprint(tmp_path)

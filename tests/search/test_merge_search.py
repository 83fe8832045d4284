"""What a search evaluates is what merging writes, measured as everywhere else."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stagepatch.checkpoints import add_projections, load_denoiser, model_fingerprint, save_denoiser
from stagepatch.core import UserError
from stagepatch.data import DataConfig
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.evaluation import Evaluator, load_extractor, load_references
from stagepatch.merging import MergeMethod, find_stages, merge_loras, merge_models
from stagepatch.merging.config import SUM
from stagepatch.methods import load_learned
from stagepatch.sampling import SamplingConfig
from stagepatch.search import MergedLoRA, MergedModel, SampledMetric
from tests.search.searches import save_learned

SAMPLING = SamplingConfig(num_images=12, num_inference_steps=2, seed=3)
WEIGHTS = [0.3, 0.9]


@pytest.fixture
def stages(tiny_dit, tmp_path):
    """A base and two stages."""
    directories = [tmp_path / name for name in ("base", "one", "two")]
    for seed, directory in enumerate(directories):
        save_denoiser(tiny_dit(seed), make_scheduler(ObjectiveConfig()), directory)
    base, *others = map(str, directories)
    return find_stages(base, others)


def weights_file(directory):
    return directory / "transformer" / "diffusion_pytorch_model.safetensors"


def assert_as_written(merged, stages, output, method=SUM):
    """At WEIGHTS, the model in memory is the one that `merge_models` writes."""
    merge_models(Path(stages.base), stages.directories, WEIGHTS, output, method)
    own, theirs = merged.at(WEIGHTS).state_dict(), load_denoiser(output)[0].state_dict()
    assert set(own) == set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in own.items())


METHODS = [SUM, MergeMethod(ties_keep=0.4), MergeMethod("dare", dare_drop=0.5, seed=1)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_model_in_memory_is_the_model_that_is_written(stages, tmp_path, method, monkeypatch):
    monkeypatch.setattr("stagepatch.merging.models.PIECE", 7)
    merged = MergedModel(stages, method)
    merged.at([1.0, -2.0])  # nothing of it stays
    assert_as_written(merged, stages, tmp_path / "out", method)


def test_half_precision_is_rounded_as_in_the_written_model(stages, tmp_path):
    for name in ("base", "one", "two"):
        path = weights_file(tmp_path / name)
        save_file({name: value.half() for name, value in load_file(path).items()}, path)
    assert_as_written(MergedModel(stages), stages, tmp_path / "out")


def test_projections_of_stages_are_merged_too(stages, tmp_path):
    for name in ("one", "two"):
        model, scheduler = load_denoiser(tmp_path / name)
        for number, weight in enumerate(add_projections(model).parameters()):
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        save_denoiser(model, scheduler, tmp_path / name)
    assert_as_written(MergedModel(stages), stages, tmp_path / "out")


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]], ids=lambda method: method.kind)
def test_lora_in_memory_is_the_lora_that_is_written(stages, tmp_path, batch, method):
    for number in (1, 2):
        save_learned("lora", load_denoiser(stages.base)[0], tmp_path / f"lora{number}", number, rank=number)
    loras = find_stages(stages.base, [str(tmp_path / "lora1"), str(tmp_path / "lora2")], needs_base=True)
    merged = MergedLoRA(loras, method)
    merged.at([5.0, 5.0])
    merge_loras(loras.directories, WEIGHTS, tmp_path / "out", method)
    expected, _ = load_denoiser(stages.base)
    load_learned(expected, tmp_path / "out")
    with torch.no_grad():
        predicted = [model(*batch, return_dict=False)[0] for model in (merged.at(WEIGHTS), expected)]
    assert torch.equal(*predicted)


@pytest.fixture
def evaluator():
    return Evaluator(load_references(DataConfig()), load_extractor("digits"))


@pytest.mark.parametrize("metric", ["fid_train", "fid_held_out"])
def test_value_is_the_fid_that_evaluate_reports(stages, evaluator, metric):
    merged, fid = MergedModel(stages), SampledMetric(evaluator, metric)
    value = fid(merged.at(WEIGHTS), merged.scheduler, SAMPLING)
    assert fid(merged.at([0.0, 0.0]), merged.scheduler, SAMPLING) != value
    measured = evaluator.measure(merged.at(WEIGHTS), merged.scheduler, SAMPLING, [SAMPLING.seed])
    assert value == measured.values(metric)[0]
    assert fid(merged.at(WEIGHTS), merged.scheduler, SAMPLING) == value  # the noise is the same


@pytest.mark.parametrize("batch_size", [2, 256])
def test_the_first_quarter_is_reported_on_the_way(stages, evaluator, batch_size):
    merged, metric = MergedModel(stages), SampledMetric(evaluator, "recall")
    model, reports, done = merged.at(WEIGHTS), [], []
    sampling = SamplingConfig(num_images=17, num_inference_steps=2, batch_size=batch_size)
    metric.on_batch = done.append
    value = metric(model, merged.scheduler, sampling, lambda value: reports.append((value, sum(done))))
    expected = metric(model, merged.scheduler, sampling)
    assert value == pytest.approx(expected, abs=1e-3)
    part = SamplingConfig(num_images=6 if batch_size == 2 else 5, num_inference_steps=2)
    ((reported, images),) = reports
    assert reported == pytest.approx(metric(model, merged.scheduler, part), abs=1e-3)
    assert images <= 5  # the others were not sampled yet
    assert value <= 0.0  # recall is to be high


def test_models_that_sample_no_numbers_are_infinitely_bad(stages, evaluator):
    merged = MergedModel(stages)
    assert SampledMetric(evaluator, "fid_train")(merged.at([1e30, -1e30]), merged.scheduler, SAMPLING) == math.inf


def test_held_out_images_must_be_there(evaluator):
    with pytest.raises(UserError, match="no held-out images; use 'fid_train'"):
        SampledMetric(evaluator.without_held_out(), "fid_held_out")


def test_stages_of_other_architectures_are_refused_by_name(stages, tiny_dit, tmp_path):
    save_denoiser(tiny_dit(num_layers=2), make_scheduler(ObjectiveConfig()), tmp_path / "two")
    with pytest.raises(UserError, match=r"two' has another architecture than the base: \d+ tensors differ"):
        MergedModel(stages)


@pytest.mark.usefixtures("stages")
def test_fingerprint_is_of_the_weights_however_they_are_divided(tmp_path):
    first = model_fingerprint(tmp_path / "one")
    assert first != model_fingerprint(tmp_path / "two")
    path = weights_file(tmp_path / "one")
    tensors = load_file(path)
    names = sorted(tensors)
    for changed in (
        {**tensors, names[0]: tensors[names[0]] + 1e-6},
        {name: value.view(-1) for name, value in tensors.items()},
    ):
        save_file(changed, path)
        assert model_fingerprint(tmp_path / "one") != first
    path.unlink()
    for number, part in enumerate((names[3:], names[:3])):
        save_file({name: tensors[name] for name in part}, path.with_stem(f"{path.stem}-0000{number}-of-00002"))
    assert model_fingerprint(tmp_path / "one") == first
    with pytest.raises(UserError, match="not a model directory"):
        model_fingerprint(tmp_path)

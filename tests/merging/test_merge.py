"""The algebra of merging, on files, and on steps of SGD."""

import copy
from functools import partial

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save, save_file

from stagepatch.checkpoints import add_projections, load_denoiser, save_denoiser
from stagepatch.core import TensorReader, UserError, read_json, write_json, write_stream, write_tensors
from stagepatch.diffusion import Objective, ObjectiveConfig, make_scheduler
from stagepatch.diffusion.timesteps import equal_in_t
from stagepatch.families import predict
from stagepatch.merging import MergeMethod, combine, merge_loras, merge_models
from stagepatch.methods.lora import CONFIG_NAME as LORA_CONFIG
from stagepatch.methods.lora import FILE_NAME as LORA_FILE
from tests.runs import assert_same
from tests.tiny import FAMILIES
from tests.tiny_pipelines import PIPELINES


@pytest.fixture
def models(tmp_path):
    """A base and three stages that differ from it everywhere, as directories."""
    pipe = PIPELINES["UNet2DModel"].build()
    paths = [tmp_path / name for name in ("base", "one", "two", "three")]
    for number, path in enumerate(paths):
        other = DDPMPipeline(copy.deepcopy(pipe.unet), pipe.scheduler)
        generator = torch.Generator().manual_seed(number)
        for parameter in other.unet.parameters():
            parameter.data += (0.1 if number else 0.0) * torch.randn(parameter.shape, generator=generator)
        other.save_pretrained(path)
    return paths[0], paths[1:]


def weights_of(directory):
    return load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")


def merged(models, weights, tmp_path, **more):
    base, stages = models
    output = tmp_path / f"merged-{'-'.join(map(str, weights))}"
    merge_models(base, stages, weights, output, **more)
    return weights_of(output)


def test_the_pipeline_is_copied_and_a_training_run_beside_it_is_not(models, tmp_path):
    base, stages = models
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (base / "snapshots" / "0000100").mkdir(parents=True)
    (base / "search.json").write_text("{}")
    merge_models(base, stages, [0.0, 0.0, 0.0], tmp_path / "merged")
    names = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert names == ["model_index.json", "scheduler", "tokenizer", "unet"]
    DDPMPipeline.from_pretrained(tmp_path / "merged")


def test_no_weight_gives_the_base_and_one_gives_its_stage_exactly(models, tmp_path):
    base, stages = models
    assert_same(merged(models, [0.0, 0.0, 0.0], tmp_path), weights_of(base))
    for place, stage in enumerate(stages):
        weights = [float(place == other) for other in range(3)]
        assert_same(merged(models, weights, tmp_path), weights_of(stage))


def test_merging_is_linear_and_the_sum_of_task_vectors(models, tmp_path):
    base, stages = (weights_of(models[0]), [weights_of(stage) for stage in models[1]])
    weights = [0.3, -0.2, 0.7]
    both, twice = (merged(models, [scale * weight for weight in weights], tmp_path) for scale in (1, 2))
    for name, value in both.items():
        vectors = [stage[name].double() - base[name].double() for stage in stages]
        expected = base[name].double() + sum(w * vector for w, vector in zip(weights, vectors, strict=True))
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(twice[name] - base[name], 2 * (value - base[name]), rtol=1e-4, atol=1e-6)


def test_merged_model_is_loaded_by_diffusers(models, tmp_path):
    merged(models, [0.2, 0.3, 0.4], tmp_path)
    pipe = DDPMPipeline.from_pretrained(tmp_path / "merged-0.2-0.3-0.4")
    assert isinstance(pipe.unet, UNet2DModel)
    assert PIPELINES["UNet2DModel"].call(pipe).isfinite().all()


def test_ties_trims_elects_and_averages_those_that_agree():
    base = torch.zeros(4)
    stages = [torch.tensor([4.0, -1.0, 3.0, 0.1]), torch.tensor([2.0, 5.0, -3.5, 0.2])]
    kept_half = combine(base, stages, [1.0, 1.0], MergeMethod("ties", ties_keep=0.5))
    # Kept: [4, 0, 3, 0] and [0, 5, -3.5, 0]; signs elected +, +, −; each has one that agrees; times two stages.
    assert kept_half.tolist() == [8.0, 10.0, -7.0, 0.0]
    whole = combine(base, stages, [0.5, 0.5], MergeMethod("ties", ties_keep=1.0))
    assert whole.tolist() == pytest.approx([3.0, 5.0, -3.5, 0.15])


def test_whole_numbers_are_the_bases():
    base, stage = torch.tensor([1, 2]), torch.tensor([7, 8])
    assert combine(base, [stage], [1.0]).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_is_the_bases(dtype):
    base, stage = torch.randn(5).to(dtype), torch.randn(5).to(dtype)
    assert combine(base, [stage], [0.5]).dtype == dtype
    assert torch.equal(combine(base, [stage], [1.0]), stage)


def test_streamed_file_is_what_the_library_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.randn(2, 2).half(),
        "c": torch.randn(5).bfloat16(),
        "d": torch.arange(6).view(2, 3),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    write_stream(tmp_path / "file.safetensors", shapes, lambda name: [tensors[name]])
    assert_same(load_file(tmp_path / "file.safetensors"), tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    reader = TensorReader([tmp_path / "other.safetensors"])
    assert_same({name: reader.read(name) for name in reader.names()}, tensors)
    assert {name: (reader.shape(name), reader.dtype(name)) for name in reader.names()} == shapes
    assert [piece.tolist() for piece in reader.pieces("d", 4)] == [[0, 1, 2, 3], [4, 5]]
    write_stream(tmp_path / "pieces.safetensors", shapes, lambda name: reader.pieces(name, 3))
    assert_same(load_file(tmp_path / "pieces.safetensors"), tensors)


def test_weights_in_several_files_are_read_as_one(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors")
    reader = TensorReader(sorted(tmp_path.glob("*.safetensors")))
    assert reader.names() == ["a", "b"]
    assert reader.read("b").tolist() == [0, 0, 0]


TRUNCATED = save({"a": torch.ones(100)})[:-4]


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 40, b"not a file of tensors at all", TRUNCATED])
def test_files_of_another_format_and_truncated_ones_are_refused(tmp_path, content):
    (tmp_path / "file.safetensors").write_bytes(content)
    message = "not a whole safetensors file" if content == TRUNCATED else r"not a (whole )?safetensors file"
    with pytest.raises(UserError, match=message):
        TensorReader([tmp_path / "file.safetensors"])
    with pytest.raises(UserError, match="No such file"):
        TensorReader([tmp_path / "nowhere"])


def test_stages_of_other_architectures_and_numbers_are_refused(models, tmp_path):
    base, stages = models
    with pytest.raises(UserError, match="2 weights for 3 stages"):
        merge_models(base, stages, [1.0, 0.0], tmp_path / "out")
    other = tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors"
    write_tensors(other, {**weights_of(base), "more": torch.ones(1)})
    message = "other' has another architecture than the base: 1 tensors differ, first 'more'"
    with pytest.raises(UserError, match=message):
        merge_models(base, [tmp_path / "other"], [1.0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loras_merge_into_one_of_the_summed_rank(tmp_path):
    torch.manual_seed(0)
    loras = [{"x.lora_A.weight": torch.randn(2, 5), "x.lora_B.weight": torch.randn(7, 2)} for _ in range(3)]
    stages = [tmp_path / str(number) for number in range(3)]
    for stage, lora in zip(stages, loras, strict=True):
        write_tensors(stage / LORA_FILE, lora)
        write_json(stage / LORA_CONFIG, {"rank": 2, "min_rank": 2})  # as good as none
    weights = [0.5, -1.0, 2.0]
    merge_loras(stages, weights, tmp_path / "merged")
    one = load_file(tmp_path / "merged" / LORA_FILE)
    assert one["x.lora_A.weight"].shape == (6, 5)
    products = [lora["x.lora_B.weight"] @ lora["x.lora_A.weight"] for lora in loras]
    expected = sum(weight * product for weight, product in zip(weights, products, strict=True))
    torch.testing.assert_close(one["x.lora_B.weight"] @ one["x.lora_A.weight"], expected)
    choices = read_json(tmp_path / "merged" / LORA_CONFIG)
    assert (choices["rank"], choices["min_rank"], choices["num_stages"]) == (6, 0, 1)
    with pytest.raises(UserError, match="2 weights for 3 stages"):
        merge_loras(stages, [1.0, 0.0], tmp_path / "merged")
    write_tensors(stages[1] / LORA_FILE, {"y.lora_A.weight": torch.ones(1, 1)})
    with pytest.raises(UserError, match="is on other layers"):
        merge_loras(stages, weights, tmp_path / "merged")
    write_tensors(stages[1] / LORA_FILE, loras[1])
    for weighed in ({"rank": 1, "num_stages": 2}, {"rank": 2, "min_rank": 1}):
        write_json(stages[1] / LORA_CONFIG, weighed)
        with pytest.raises(UserError, match="weighed by the noise level"):
            merge_loras(stages, weights, tmp_path / "merged")


def test_a_projection_that_the_base_has_not_is_the_identity_there(tmp_path):
    for number, name in enumerate(("base", "one", "two")):
        model = FAMILIES["UNet2DModel"].model(seed=0)
        for weight in add_projections(model, [1, 4][:number]).maps.values() if number else ():
            weight.data.normal_(generator=torch.Generator().manual_seed(number))
        save_denoiser(model, DDPMScheduler(), tmp_path / name)
    stages = [tmp_path / "one", tmp_path / "two"]
    merge_models(tmp_path / "base", stages, [0.5, 0.25], tmp_path / "out")
    maps = {name: weights_of(tmp_path / name) for name in ("one", "two", "out")}
    first, second = "stagepatch_projection.maps.1", "stagepatch_projection.maps.4"
    eye = torch.eye(len(maps["out"][first]))
    expected = eye + 0.5 * (maps["one"][first] - eye) + 0.25 * (maps["two"][first] - eye)
    torch.testing.assert_close(maps["out"][first], expected)
    eye = torch.eye(len(maps["out"][second]))
    torch.testing.assert_close(maps["out"][second], eye + 0.25 * (maps["two"][second] - eye))
    assert load_denoiser(tmp_path / "out")[0].stagepatch_projection.maps.keys() == {"1", "4"}
    merge_models(tmp_path / "base", stages, [0.0, 1.0], tmp_path / "two again")
    assert_same(weights_of(tmp_path / "two again"), maps["two"])


def test_one_sgd_step_each_then_merged_is_one_step_on_the_weighted_sum(tiny_dit):
    """DeMe, arXiv 2410.06664, supplement, Eq. 13."""
    base = tiny_dit(learn_sigma=False).double().requires_grad_(True)
    objective = Objective(make_scheduler(ObjectiveConfig()))
    generator = torch.Generator().manual_seed(0)
    x_start, noise = (torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    ranges, weights = equal_in_t(1000, 4), [0.1, 0.4, 0.2, 0.5]
    labels = torch.arange(16) % 10

    def loss(model, first, stop):
        timesteps = torch.randint(first, stop, (16,), generator=torch.Generator().manual_seed(first))
        error = predict(model, objective.add_noise(x_start, noise, timesteps), timesteps, labels) - noise
        return error.square().mean()

    def step(loss):
        model = copy.deepcopy(base)
        loss(model).backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    stages = [step(partial(loss, first=first, stop=stop)) for first, stop in ranges]
    expected = step(lambda model: sum(w * loss(model, *limits) for w, limits in zip(weights, ranges, strict=True)))
    for name, parameter in base.named_parameters():
        merged = combine(parameter.detach(), [stage[name] for stage in stages], weights)
        torch.testing.assert_close(merged, expected[name], rtol=1e-12, atol=1e-14)

"""Cosines between task vectors against flat vectors, and against what peft itself adds to the weights."""

import pytest
import torch
from torch.nn import functional as F

from stagepatch.analysis import analyze_task_vectors, task_vectors
from stagepatch.checkpoints import add_projections, save_denoiser
from stagepatch.core import TensorReader, write_json
from stagepatch.core.errors import UserError
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.methods import LoRAConfig, MethodConfig, load_learned, make_method
from tests.tiny import FAMILIES

TINY = FAMILIES["UNet2DConditionModel"]
SCHEDULER = make_scheduler(ObjectiveConfig())


def save(directory, seed):
    save_denoiser(TINY.model(seed), SCHEDULER, directory)
    return directory


def learn(directory, name, seed, model=None, **choices):
    """What a method would save, every trained number moved at random."""
    model = model or TINY.model(0)
    method = make_method(MethodConfig(name, lora=LoRAConfig(rank=3, **choices)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in method.prepare(model):
            for parameter in group["params"]:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    method.save(directory)
    return directory


def flat_difference(model, base, names=""):
    pairs = zip(model.named_parameters(), base.parameters(), strict=True)
    return torch.cat([(one - two).double().flatten() for (name, one), two in pairs if names in name])


def cosine(one, two):
    return float(F.cosine_similarity(one, two, dim=0))


def compare(tmp_path, **stages):
    return task_vectors(save(tmp_path / "base", 0), stages)


def learned(directory):
    model = TINY.model(0)
    load_learned(model, directory)
    return model


def assert_products_of(found, vectors):
    for row, one in enumerate(vectors):
        assert float(found.norms()[row]) == pytest.approx(float(one.norm()), rel=1e-5)
        for column, two in enumerate(vectors):
            assert float(found.cosine()[row, column]) == pytest.approx(cosine(one, two), abs=1e-6)


def test_cosines_and_norms_are_those_of_flat_vectors(tmp_path):
    found = compare(tmp_path, **{str(seed): save(tmp_path / str(seed), seed) for seed in (1, 2, 3)})
    base = TINY.model(0)
    vectors = [flat_difference(TINY.model(seed), base) for seed in (1, 2, 3)]
    assert_products_of(found, vectors)
    assert sum(found.sizes.values()) == len(vectors[0])
    for block in ("down_blocks.1", "conv_in"):
        parts = [flat_difference(TINY.model(seed), base, f"{block}.") for seed in (1, 2)]
        assert found.sizes[block] == len(parts[0])
        assert float(found.cosine(block)[0, 1]) == pytest.approx(cosine(*parts), abs=1e-6)
        assert float(found.norms(block)[0]) == pytest.approx(float(parts[0].norm()))


def test_weights_that_were_not_trained_did_not_move(tmp_path):
    stages = {"biases": learn(tmp_path / "biases", "bitfit", 1), "all": learn(tmp_path / "all", "finetune", 2)}
    vectors = [flat_difference(learned(directory), TINY.model(0)) for directory in stages.values()]
    assert int((vectors[0] == 0).sum()) > len(vectors[0]) / 2
    assert_products_of(compare(tmp_path, **stages), vectors)


@pytest.mark.parametrize("targets", [None, ["conv1", "to_q"]])  # the second has convolutions of 3×3
def test_loras_are_what_peft_adds_to_the_weights(tmp_path, targets):
    stages = {str(seed): learn(tmp_path / str(seed), "lora", seed, targets=targets) for seed in (1, 2)}
    stages["model"] = save(tmp_path / "model", 3)
    plain, vectors = dict(TINY.model(0).named_parameters()), []
    for directory in list(stages.values())[:2]:
        added = {
            f"{path}.weight": module.get_delta_weight("stagepatch").detach()
            for path, module in learned(directory).named_modules()
            if hasattr(module, "get_delta_weight")
        }
        assert added
        deltas = [added.get(name, torch.zeros_like(weight)) for name, weight in plain.items()]
        vectors.append(torch.cat([delta.flatten().double() for delta in deltas]))
    vectors.append(flat_difference(TINY.model(3), TINY.model(0)))
    assert_products_of(compare(tmp_path, **stages), vectors)


def test_a_projection_moved_from_the_identity(tmp_path):
    maps = []
    for seed in (1, 2):
        model = TINY.model(0)
        projection = add_projections(model)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in projection.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        moved = [(value.detach() - torch.eye(len(value))).flatten() for value in projection.parameters()]
        maps.append(torch.cat(moved))
        save_denoiser(model, SCHEDULER, tmp_path / str(seed))
    stages = {"one": tmp_path / "1", "two": tmp_path / "2", "neither": save(tmp_path / "3", 3)}
    found = compare(tmp_path, **stages)
    assert float(found.cosine()[0, 1]) == pytest.approx(cosine(*maps), abs=1e-6)
    assert float(found.norms()[0]) == pytest.approx(float(maps[0].norm()), rel=1e-5)
    assert float(found.cosine()[0, 2]) == 0.0


def test_a_stage_that_did_not_move_has_no_direction(tmp_path):
    stages = {"same": save(tmp_path / "same", 0), "other": save(tmp_path / "other", 1)}
    found = compare(tmp_path, **stages)
    assert found.norms()[0] == 0
    assert found.cosine()[0].isnan().all()
    assert float(found.cosine()[1, 1]) == pytest.approx(1.0)


def stage(directory, seed, first):
    """A model as `stagepatch decouple` leaves it, of 500 timesteps from the first on."""
    save(directory, seed)
    write_json(directory / "stage.json", {"from": first, "to": first + 500, "training": {"seed": seed}})
    return directory


def test_a_range_that_was_trained_twice_stands_beside_different_ranges(tmp_path):
    base, ranges = save(tmp_path / "base", 0), [0, 500, 0]
    stages = {str(seed): stage(tmp_path / str(seed), seed, first) for seed, first in enumerate(ranges, 1)}
    stages["neither"] = save(tmp_path / "neither", 4)
    one, two, again = (flat_difference(TINY.model(seed), TINY.model(0)) for seed in (1, 2, 3))
    shown = analyze_task_vectors(base, stages)
    assert shown.numbers["ranges"] == [(0.0, 500.0), (500.0, 1000.0), (0.0, 500.0), None]
    pairs = {name: cosines.tolist() for name, cosines in shown.numbers["pairs"].items()}
    different = [cosine(one, two), cosine(two, again)]
    assert pairs == {
        "different_ranges": pytest.approx(different, abs=1e-6),
        "same_range": pytest.approx([cosine(one, again)], abs=1e-6),
    }
    table = shown.summary[1]
    assert [row[:2] for row in table.rows] == [
        ["different ranges", "2"],
        ["the same range, trained again", "1"],
        ["0 to 499 and other ranges", "2"],
        ["0 to 499, trained again", "1"],
        ["500 to 999 and other ranges", "2"],
    ]
    assert table.rows[0][2:] == [f"{value:+.3f}" for value in (min(different), sum(different) / 2, max(different))]
    assert "is the control" in table.note
    del stages["3"]
    (without,) = analyze_task_vectors(base, stages).summary[1:]
    assert "there is no control" in without.note
    assert len(analyze_task_vectors(base, {"1": base, "2": stages["neither"]}).summary) == 1


def test_the_same_training_is_no_control(tmp_path):
    base, one = save(tmp_path / "base", 0), stage(tmp_path / "one", 1, 0)
    with pytest.raises(UserError, match=r"one range and one seed.*another --training\.seed"):
        task_vectors(base, {"one": one, "copy": stage(tmp_path / "copy", 1, 0)})
    task_vectors(base, {"one": one, "next": stage(tmp_path / "next", 1, 500)})


def test_at_most_one_tensor_of_each_file_is_read_at_a_time(tmp_path, monkeypatch):
    reads, read = [], TensorReader.read
    monkeypatch.setattr(TensorReader, "read", lambda self, name: reads.append(name) or read(self, name))
    stages = {str(seed): save(tmp_path / str(seed), seed) for seed in (1, 2)}
    compare(tmp_path, **stages)
    names = [name for name, _ in TINY.model(0).named_parameters()]
    assert len(reads) == 3 * len(names)
    assert all(len(set(reads[place : place + 3])) == 1 for place in range(0, len(reads), 3))


def test_what_is_no_stage_is_refused(tmp_path):
    base, one = save(tmp_path / "base", 0), save(tmp_path / "one", 1)
    patch = learn(tmp_path / "patch", "prompt_tuning", 1)
    save_denoiser(FAMILIES["UNet2DModel"].model(), SCHEDULER, tmp_path / "other")
    lora = learn(tmp_path / "lora", "lora", 1, FAMILIES["DiTTransformer2DModel"].model())
    (tmp_path / "empty").mkdir()
    for path, message in [
        (patch, "holds a patch.*no task vector.*learned"),
        (tmp_path / "nowhere", "Nothing at"),
        (tmp_path / "empty", "holds no patch, no LoRA, no weights"),
        (tmp_path / "other", "of another model than the base: it lacks"),
        (lora, "of another model than the base: it holds"),
    ]:
        with pytest.raises(UserError, match=message):
            task_vectors(base, {"one": one, "two": path})
    with pytest.raises(UserError, match="1 stages make no pair"):
        task_vectors(base, {"one": one})
    with pytest.raises(UserError, match="not a model directory"):
        task_vectors(tmp_path / "empty", {"one": one, "two": one})

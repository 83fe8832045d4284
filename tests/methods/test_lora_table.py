"""A gate that is a table of ranges (Remix-DiT, arXiv 2412.05628), written out; and T-LoRA's ranks in whole numbers."""

import math
import signal

import pytest
import torch
from safetensors.torch import load_file

from stagepatch.core.errors import UserError
from stagepatch.families import predict
from stagepatch.methods import LoRA, LoRAConfig, load_learned
from stagepatch.methods.consistency import Consistent
from stagepatch.methods.lora import ADAPTER, FILE_NAME, active_ranks
from stagepatch.methods.lora_stages import TableGate
from tests.runs import Strike, draw_weights, iteration_of, log_of, run, train_job

TABLE = {"rank": 2, "num_stages": 3, "stage_gate": "table", "num_ranges": 5}


def table_on(model, std=0.3, **choices):
    """A LoRA whose maps and table are drawn."""
    method = LoRA(LoRAConfig(**{**TABLE, **choices}))
    maps, gate = method.prepare(model)
    draw_weights(maps["params"], std)
    draw_weights(gate["params"], 2.0, seed=2)
    return method


def softmax(numbers):
    """In Python's own floats."""
    powers = [math.exp(number) for number in numbers]
    return [power / sum(powers) for power in powers]


def test_weights_are_a_softmax_of_the_ranges_row():
    gate = TableGate(3, 2, 5)
    timesteps = torch.arange(1000)
    weights = gate.stages(timesteps / 1000)
    rows = [softmax(row) for row in gate.logits.tolist()]
    expected = torch.tensor([rows[time // 200] for time in range(1000)])
    torch.testing.assert_close(weights, expected)
    assert torch.equal(gate(timesteps / 1000), weights.repeat_interleave(2, dim=1))
    assert torch.equal(gate.stages(torch.tensor([1.0])), gate.stages(torch.tensor([0.9])))  # pure noise is the last's


@pytest.mark.parametrize(("num_ranges", "num_stages"), [(20, 4), (8, 4), (4, 4), (5, 3), (1000, 4)])
def test_a_table_starts_at_random_with_a_lead_for_one_stage_a_range(num_ranges, num_stages):
    """As the released code's prior, which repeats each row of the identity N/K times."""
    torch.manual_seed(0)
    logits = torch.stack([TableGate(num_stages, 1, num_ranges).logits.detach() for _ in range(400)])
    means = logits.mean(dim=0)
    if num_ranges % num_stages == 0:
        prior = torch.eye(num_stages).repeat_interleave(num_ranges // num_stages, dim=0)
    else:
        prior = torch.eye(3)[[0, 0, 1, 1, 2]]
    torch.testing.assert_close(means, 3.0 * prior, rtol=0, atol=0.3)
    assert abs(float((logits - means).std()) - 1.0) < 0.02


def test_the_prior_is_cross_entropy_and_fades_to_nothing(tiny_dit):
    method = table_on(tiny_dit(), gate_prior=0.5)
    rows = [softmax(row) for row in method.gate.logits.tolist()]
    expected = -sum(math.log(row[stage]) for row, stage in zip(rows, (0, 0, 1, 1, 2), strict=True)) / 5
    around = Consistent(method)
    for progress, share in ((0.0, 0.5), (0.25, 0.375), (1.0, 0.0)):
        method.progress = progress
        loss, logged = method.extra_loss()
        assert math.isclose(float(loss.detach()), share * expected, rel_tol=1e-5)
        assert math.isclose(float(logged["gate_prior"]), expected, rel_tol=1e-5)
    around.progress = 0.5
    around.prepare(model := tiny_dit())
    predict(model, torch.zeros(1, 1, 8, 8), torch.tensor([5]), torch.tensor([0]))
    around.extra_loss()
    assert method.progress == 0.5
    assert table_on(tiny_dit(), gate_prior=0.0).extra_loss() == (None, {})
    other = LoRA(LoRAConfig(num_stages=2))
    other.prepare(tiny_dit())
    assert other.extra_loss() == (None, {})


def test_the_table_has_the_gradients_of_finite_differences():
    gate = TableGate(3, 2, 5).double()
    levels = torch.tensor([0.05, 0.3, 0.31, 0.99], dtype=torch.float64)
    weights = torch.randn(4, 6, dtype=torch.float64)

    def loss(logits):
        output = torch.func.functional_call(gate, {"logits": logits}, (levels,))
        return (weights * output).sum() + torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0, 1, 1, 2]))

    assert torch.autograd.gradcheck(loss, (gate.logits,))


def test_a_layer_is_base_plus_the_mixed_maps(tiny_dit, batch):
    """Against a closed form in float64, for samples of different ranges; and the same merged."""
    sample, timesteps, labels = batch
    model = tiny_dit()
    method = table_on(model)
    layer, seen = model.blocks[1].attn.qkv, {}
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], output=output))
    a, b = (part[ADAPTER].weight.double() for part in (layer.lora_A, layer.lora_B))
    rows = [softmax(row) for row in method.gate.logits.tolist()]

    def expected_of(timesteps):
        x, base = seen["x"].double(), layer.base_layer
        expected = x @ base.weight.double().T + base.bias.double()
        for number, time in enumerate(timesteps.tolist()):
            for stage, weight in enumerate(rows[time // 200]):
                own = slice(2 * stage, 2 * stage + 2)
                expected[number] += weight * (x[number] @ a[own].T @ b[:, own].T)
        return expected

    predict(model, sample, timesteps, labels)
    torch.testing.assert_close(seen["output"].double(), expected_of(timesteps), rtol=1e-5, atol=1e-5)
    same = torch.full((4,), 450)
    with torch.no_grad():
        predict(model, sample, same, labels)
    torch.testing.assert_close(seen["output"].double(), expected_of(same), rtol=1e-5, atol=1e-5)


def test_it_trains_is_saved_and_comes_back(tiny_dit, batch, tmp_path):
    start = LoRA(LoRAConfig(**TABLE, gate_learning_rate_factor=7.0)).prepare(tiny_dit())
    assert [group["factor"] for group in start] == [1.0, 7.0]
    assert [tuple(value.shape) for value in start[1]["params"]] == [(5, 3)]
    method = LoRA(LoRAConfig(**TABLE, gate_prior=0.1))
    run(tmp_path / "run", method=method, steps=4, ema_decay=0.5)
    assert method.progress == 0.75
    assert all("gate_prior" in record for record in log_of(tmp_path / "run"))
    model = tiny_dit()
    saved = table_on(model)
    saved.save(tmp_path)
    assert torch.equal(load_file(tmp_path / FILE_NAME)["transformer.stage_gate.logits"], saved.gate.logits)
    loaded = load_learned(other := tiny_dit(), tmp_path)
    assert loaded.config == saved.config
    assert torch.equal(predict(other, *batch), predict(model, *batch))


def test_a_killed_run_goes_on_to_the_same_table(tmp_path, processes):
    """The prior's weight follows from the iteration."""
    given = {"steps": 12, "checkpoint_every": 4, "ema_decay": 0.5}
    choices = {**TABLE, "gate_prior": 10.0, "gate_learning_rate_factor": 3.0}
    run(tmp_path / "whole", method=LoRA(LoRAConfig(**choices)), **given)
    method, strike = LoRA(LoRAConfig(**choices)), Strike("iteration", 7)
    processes.call(train_job, -signal.SIGKILL, directory=tmp_path / "killed", method=method, strike=strike, **given)
    assert iteration_of(tmp_path / "killed") == 4
    run(tmp_path / "killed", method=LoRA(LoRAConfig(**choices)), **given)
    whole, killed = (load_file(tmp_path / name / FILE_NAME) for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"num_ranges": 2}, "num_ranges=2 must be at least num_stages=3"),
        ({"gate_prior": -1.0}, "gate_prior=-1.0 must be at least 0"),
        ({"gate_learning_rate_factor": -1.0}, "gate_learning_rate_factor=-1.0 must be at least 0"),
        ({"min_rank": 1}, "num_stages=3 and min_rank=1 weigh the ranks"),
    ],
)
def test_tables_that_cannot_be_are_refused(choices, message):
    with pytest.raises(UserError, match=message):
        LoRA(LoRAConfig(**{**TABLE, **choices}))


def test_t_loras_ranks_are_those_of_whole_numbers():
    """⌊(T − t)(r − r_min)/T⌋ + r_min, as the paper has it, at every timestep: all ranks at the image's end."""
    timesteps = torch.arange(1001)
    for rank in (2, 3, 4, 8, 10, 16, 64, 100):
        for least in range(1, rank, max(1, rank // 8)):
            expected = (1000 - timesteps) * (rank - least) // 1000 + least
            assert torch.equal(active_ranks(timesteps / 1000, rank, least).long(), expected), (rank, least)

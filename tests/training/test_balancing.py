"""Losses of intervals of timesteps, balanced: closed forms, projections by hand, and runs that are stopped."""

import itertools
import json
import math
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from stagepatch.cli import main
from stagepatch.core import UserError
from stagepatch.core.tensors import read_tensors
from stagepatch.diffusion import IntervalSampler
from stagepatch.methods import DMP, Finetune
from stagepatch.studies import CompareConfig, EntryConfig
from stagepatch.studies.compare_plan import plan_jobs
from stagepatch.training import BalancingConfig, Run, TrainConfig, read_log
from stagepatch.training.backward import backward_apart
from stagepatch.training.balancing import bargained, make_intervals, project_conflicts, uncertainty_weighted
from stagepatch.training.draws import Draws
from stagepatch.training.log import RunLog
from stagepatch.training.losses import UncertaintyLoss
from tests import runs
from tests.runs import Strike, assert_same, config_of, log_of, make_model, make_objective, options, run

NAMES = ("uncertainty", "pcgrad", "nash")
INTERVALS = IntervalSampler(((0, 100), (100, 600), (600, 1000)))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(size=6):
    """A batch whose row i is of interval i mod 3."""
    x_start, noise = torch.randn(2, size, 1, 8, 8, generator=generator(1)).double()
    return Draws(x_start, noise, INTERVALS.draw(size, generator()), {"class_labels": torch.arange(size)})


def prepared():
    model = make_model(learn_sigma=False).double()
    method = Finetune()
    parameters = [parameter for group in method.prepare(model) for parameter in group["params"]]
    objective = make_objective(learn_sigma=False)
    return UncertaintyLoss(model, method, objective, nn.ParameterList(parameters), 3).double(), parameters


def mean_losses(loss, drawn):
    """Of the three intervals, by diffusers' scheduler, row by row."""
    x_t = loss.objective.scheduler.add_noise(drawn.x_start, drawn.noise, drawn.timesteps)
    output = loss.model(x_t, drawn.timesteps, **drawn.condition).sample
    errors = [(output[row] - drawn.noise[row]).square().mean() for row in range(len(x_t))]
    return [sum(errors[number::3]) / len(errors[number::3]) for number in range(3)]


def test_best_log_variances_are_the_logs_of_fixed_losses():
    losses = torch.tensor([0.02, 0.3, 1.0, 4.0], dtype=torch.float64)
    log_variances = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.Adam([log_variances], lr=0.025)
    for _ in range(3000):
        optimizer.zero_grad()
        uncertainty_weighted(losses, log_variances).backward()
        optimizer.step()
    torch.testing.assert_close(log_variances.data, losses.log(), rtol=1e-6, atol=1e-6)
    # There every interval weighs 1/2, whatever its loss, and the sum is that of 1/2 (1 + log l).
    assert float(uncertainty_weighted(losses, losses.log())) == pytest.approx(0.5 * float((1 + losses.log()).sum()))


def test_weighted_loss_and_all_gradients_are_those_of_the_formula():
    loss, parameters = prepared()
    values = [0.5, -1.0, 2.0]
    loss.log_variances.data = torch.tensor(values, dtype=torch.float64)
    drawn = draws()
    found, logged = loss(*drawn.tensors())
    means = mean_losses(loss, drawn)
    expected = sum(mean / (2 * math.exp(value)) + value / 2 for mean, value in zip(means, values, strict=True))
    torch.testing.assert_close(found, expected)
    own = torch.autograd.grad(found, [loss.log_variances, *parameters], retain_graph=True, allow_unused=True)
    slopes = [(1 - float(mean.detach()) / math.exp(value)) / 2 for mean, value in zip(means, values, strict=True)]
    torch.testing.assert_close(own[0], torch.tensor(slopes, dtype=torch.float64))
    torch.testing.assert_close(own[1:], torch.autograd.grad(expected, parameters, allow_unused=True))
    assert float(logged["loss"]) == pytest.approx(float(sum(means).detach()) / 3)
    assert [float(logged[f"log_variance_{number}"]) for number in range(3)] == values


def test_two_gradients_that_conflict_are_projected_as_by_hand():
    # (1, 0) on the normal of (-1, 1) is (1/2, 1/2); (-1, 1) on that of (1, 0) is (0, 1).
    conflicting = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    assert project_conflicts(conflicting, generator()).tolist() == [0.25, 0.75]
    agreeing = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(project_conflicts(agreeing, generator()), agreeing.mean(dim=0), rtol=0, atol=1e-15)
    assert conflicting.tolist() == [[1.0, 0.0], [-1.0, 1.0]]


def project_by_hand(gradients, orders):
    total = torch.zeros_like(gradients[0])
    for own, order in zip(gradients, orders, strict=True):
        for other in order:
            inner = own.dot(gradients[other])
            if inner < 0:
                own = own - inner / gradients[other].norm() ** 2 * gradients[other]
        total = total + own
    return total / len(gradients)


def test_others_are_met_in_orders_that_are_drawn():
    gradients = torch.tensor([[1.0, 0.2, 0.0], [-1.0, 0.3, 0.5], [-0.4, -1.0, 0.7]], dtype=torch.float64)
    orders = [itertools.permutations({0, 1, 2} - {own}) for own in range(3)]
    possible = torch.stack([project_by_hand(gradients, each) for each in itertools.product(*orders)])
    seen = set()
    for seed in range(100):
        distances = (possible - project_conflicts(gradients, generator(seed))).abs().amax(dim=1)
        assert distances.min() < 1e-12
        seen |= set(distances.lt(1e-12).nonzero().flatten().tolist())
    assert len(seen) == len(possible) == 8


def test_bargained_gradients_are_those_of_the_equation():
    """G Gᵀ α = 1/α has one solution of positive weights; of gradients at right angles it is known."""
    torch.testing.assert_close(bargained(torch.tensor([[3.0, 0.0], [0.0, 4.0]])), torch.full((2,), 337**0.25))
    gradients = torch.randn(5, 40, generator=generator(3), dtype=torch.float64) * torch.tensor([[1, 0.5, 4, 1, 2]]).T
    gradients[1] -= gradients[0]
    gram = gradients @ gradients.T
    found = bargained(gradients)
    weights = torch.linalg.solve(gram, gradients @ found)
    torch.testing.assert_close(weights @ gradients, found)
    ones = gram @ weights / gram.norm() * weights
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-5)
    torch.testing.assert_close(bargained(1e-4 * gradients.float()), 1e-4 * found.float(), rtol=1e-3, atol=1e-6)
    assert (weights > 0).all()
    assert not (gradients @ gradients.mean(dim=0) > 0).all()  # by the mean, one would lose
    assert (gradients @ found > 0).all()


def test_gradients_that_cancel_or_vanish_leave_something_finite():
    assert bargained(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).abs().max() < 1e-2
    assert bargained(torch.zeros(3, 2)).tolist() == [0.0, 0.0]
    lone = bargained(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    torch.testing.assert_close(lone[1], 2 * lone[0])
    assert 0 < lone[0] < 10


class Slopes(nn.Module):
    """A loss whose gradient is the mean of the rows of x_start."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x_start, noise, timesteps, condition):
        loss = (self.weight * x_start[:, 0] + self.bias * x_start[:, 1]).mean()
        return loss, {"loss": timesteps.double().mean()}


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_left_to_the_optimizer_are_projected_ones(parts):
    step = Slopes()
    # Means (1, 0) and (-1, 1), of which every piece of an interval has another share.
    rows = torch.tensor([[2, 0], [-1, 1], [0, 0], [-2, 3], [1, 5], [-1, 0], [1, -5], [0, 0]]).double()
    drawn = Draws(rows, rows, torch.arange(8), {})
    parameters = list(step.parameters())
    combine = partial(project_conflicts, generator=generator())
    logged = backward_apart(step, drawn, parts, Accelerator(cpu=True), 2, parameters, combine)
    assert (step.weight.grad.tolist(), step.bias.grad.tolist()) == ([0.25], [[0.75]])
    assert step.unused.grad.tolist() == [0.0, 0.0, 0.0]
    assert float(logged["loss"]) == 3.5


def states(directory):
    return read_tensors(directory / "checkpoint.safetensors")[0]


BALANCED = {**runs.EVERYTHING, "batch_size": 8, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("method", [lambda: DMP(), lambda: Finetune(make_objective().scheduler)], ids=["dmp", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_stopped_run_ends_as_one_that_was_not(tmp_path, monkeypatch, name, method):
    choices = {**BALANCED, "balancing": {"name": name, "num_intervals": 4, "clustering": "snr"}}
    run(tmp_path / "whole", method=method(), **choices)
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "advance", RunLog.advance)  # what is armed lasts as long as this
        runs.arm(Strike("iteration", 5, signum=signal.SIGINT))
        with pytest.raises(BaseException, match="Stopped at iteration 5"):
            run(tmp_path / "stopped", method=method(), **choices)
    run(tmp_path / "stopped", method=method(), **choices)
    assert_same(states(tmp_path / "stopped"), states(tmp_path / "whole"))
    for one, other in zip(log_of(tmp_path / "stopped"), log_of(tmp_path / "whole"), strict=True):
        if one["iteration"] != 6:  # which after the stop is of one iteration alone
            assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}
    has_variances = "log_variance_3" in log_of(tmp_path / "whole")[-1]
    assert has_variances == (name == "uncertainty")


def balanced_job(directory, name):
    run(directory, batch_size=8, steps=4, balancing={"name": name, "num_intervals": 2})


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(processes, tmp_path, name):
    processes.call(balanced_job, directory=tmp_path / "one", name=name)
    processes.call_together(balanced_job, 2, directory=tmp_path / "two", name=name)
    trained = {key: value for key, value in states(tmp_path / "one").items() if key.startswith("trained")}
    other = states(tmp_path / "two")
    assert_same({key: other[key] for key in trained}, trained, 1e-5)


def test_log_variances_are_neither_averaged_nor_decayed_and_learn_at_their_own_rate(tmp_path):
    balancing = {"name": "uncertainty", "num_intervals": 4, "log_variance_learning_rate": 0.1}
    choices = {"steps": 1, "batch_size": 8, "weight_decay": 0.5, "ema_decay": 0.9}
    run(tmp_path, method="finetune", balancing=balancing, **choices)
    tensors = states(tmp_path)
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("trained."))
    # AdamW's first step is the rate, against the sign of the gradient (1 - l)/2.
    torch.testing.assert_close(tensors[f"trained.{last}"].abs(), torch.full((4,), 0.1), rtol=1e-3, atol=0)
    assert f"ema.{last - 1}" in tensors
    assert f"ema.{last}" not in tensors


TINY = ["--training.steps=3", "--training.log_every=1", "--training.tensorboard=false", "--training.batch_size=8"]


def test_command_trains_balanced_and_refuses_other_settings_afterwards(tmp_path, capsys):
    command = ["train", f"--output_dir={tmp_path / 'run'}", "--balancing.name=uncertainty", *TINY]
    assert main([*command, "--balancing.num_intervals=4"]) == 0
    assert {f"log_variance_{number}" for number in range(4)} <= read_log(tmp_path / "run")[-1].keys()
    assert main([*command, "--balancing.num_intervals=2"]) == 2
    assert "balancing.num_intervals was 4, is 2" in capsys.readouterr().err
    assert main([*command[:2], *TINY]) == 2
    assert main(["train", f"--output_dir={tmp_path / 'plain'}", *TINY]) == 0
    assert main([*command[:1], f"--output_dir={tmp_path / 'plain'}", *command[2:], "--balancing.num_intervals=2"]) == 2
    assert "balancing.name was none, is uncertainty" in capsys.readouterr().err


def test_intervals_by_the_similarity_that_analyze_writes(tmp_path, capsys):
    analyse = ["analyze", f"--output_dir={tmp_path / 'a'}", "--losses=false", "--timesteps=6", "--samples=4"]
    assert main(analyse) == 0
    path = tmp_path / "a" / "analysis.json"
    config = BalancingConfig("pcgrad", "gradient", 2, str(path))
    found = json.loads(path.read_text())["gradients"]
    cosine = found["cosine"]["matrix"]

    def worth(first, stop):
        return sum(cosine[first + (stop - first) // 2][first:stop])

    best = max(range(1, 6), key=lambda cut: worth(0, cut) + worth(cut, 6))
    edge = round(best * 1000 / 6)
    objective = make_objective()
    assert make_intervals(config, objective).intervals == ((0, edge), (edge, 1000))
    command = ["train", f"--output_dir={tmp_path / 'run'}", *options("balancing", vars(config)), *TINY]
    assert main(command) == 0
    # Another analysis at the same path is another run.
    matrix = torch.full((6, 6), -1.0)
    cut = 1 if best != 1 else 5
    matrix[:cut, :cut], matrix[cut:, cut:] = 1.0, 1.0
    found["cosine"]["matrix"] = matrix.tolist()
    path.write_text(json.dumps({"gradients": found}))
    assert main(command) == 2
    assert "intervals was" in capsys.readouterr().err
    found["timesteps"][0] = 3
    path.write_text(json.dumps({"gradients": found}))
    with pytest.raises(UserError, match="is of other timesteps"):
        make_intervals(config, objective)
    path.write_text("{}")
    with pytest.raises(UserError, match="holds no similarity of gradients"):
        make_intervals(config, objective)


def test_model_from_scratch_is_balanced_too(tmp_path):
    model = options("model", runs.MODEL)
    command = ["pretrain", f"--output_dir={tmp_path}", *model, *TINY, "--balancing.name=uncertainty"]
    assert main([*command, "--balancing.num_intervals=4"]) == 0
    assert "log_variance_3" in read_log(tmp_path)[-1]
    assert main(command) == 2


def test_a_comparison_has_balanced_entries(tmp_path):
    entries = [
        EntryConfig("plain", "dmp"),
        EntryConfig("balanced", "dmp", balancing={"name": "uncertainty", "num_intervals": 4, "similarity": "a.json"}),
    ]
    plain, balanced = plan_jobs(CompareConfig(output_dir=str(tmp_path), entries=entries, training_seeds=[0]))
    assert balanced.config.balancing == BalancingConfig("uncertainty", "timestep", 4, "a.json")
    assert balanced.identity()["balancing"] == BalancingConfig("uncertainty", "timestep", 4)  # wherever its files are
    assert "balancing" not in plain.identity()
    with pytest.raises(UserError, match="balancing has no key 'intervals'"):
        EntryConfig("balanced", "dmp", balancing={"name": "uncertainty", "intervals": 3})


def test_off_leaves_a_run_as_it_was(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), training=config_of())
    plain = Run(config)
    assert plain.objective.timesteps is None
    assert not {"balancing", "intervals"} & plain.identity.keys()
    balanced = Run(replace(config, balancing=BalancingConfig("pcgrad")))
    assert balanced.identity["intervals"] == tuple((first, first + 200) for first in range(0, 1000, 200))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--balancing.num_intervals=3"], "holds no equal shares of 3 intervals"),
        (["--balancing.num_intervals=1"], "num_intervals=1 must be at least 2"),
        (["--balancing.clustering=gradient"], "needs balancing.similarity"),
        (["--objective=ddo"], "draws its own timesteps"),
        (["--timesteps.range=[0,0.5]"], "draws its own timesteps"),
    ],
)
def test_what_cannot_be_balanced(tmp_path, capsys, arguments, message):
    assert main(["train", f"--output_dir={tmp_path}", "--balancing.name=pcgrad", *TINY, *arguments]) == 2
    assert message in capsys.readouterr().err

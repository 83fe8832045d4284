"""A DiT pruned for ranges of timesteps: by a ratio for each (Diff-Pruning, arXiv 2305.10924), or by architectures that
are learned under one budget (DiffPruning, arXiv 2409.15557)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stagepatch.analysis import Samples, loss_at_timesteps
from stagepatch.core import MASKS, UserError, generator_for, processes
from stagepatch.diffusion import TimestepSampler
from stagepatch.models import Architectures, BlockCost, Gated, Kept, prune, ranks
from stagepatch.studies.decouple_cost import cost_of
from stagepatch.training import Conditions, Run, draw, load_batches, sample_losses

_MOST = 100  # timesteps of a range that are looked at
_RATE, _WEIGHT = 0.05, 2.0  # AdamW's learning rate of logits; weight of the budget's penalty


def prune_for(run: Run, timesteps: TimestepSampler, ratio: float, threshold: float) -> Any:
    """The run's model without what its loss in a range needs least; see `prune`.

    Args:
        run: see `_add_gradients`.
        timesteps: the range.
        ratio: of heads and hidden channels to remove.
        threshold: see `_add_gradients`.
    """
    model = _add_gradients(run, timesteps, threshold)
    pruned = prune(model, ratio)
    model.requires_grad_(False).zero_grad()
    return pruned


def _add_gradients(run: Run, timesteps: TimestepSampler, threshold: float) -> Any:
    """The run's model, with gradients of its loss in a range.

    As in Diff-Pruning's released code, they are summed over timesteps, but for those whose loss is below a share of
    the largest, where the model has little left to say. There it is the largest of all timesteps up to then, and the
    first that falls below ends the sum; here it is the largest of the range.

    Args:
        run: a batch of its training images is looked at, drawn anew for each timestep.
        timesteps: the range, of which at most a hundred are looked at, spread evenly.
        threshold: the share.
    """
    model = run.model.to(processes().device).eval().requires_grad_(True)
    first, length = timesteps.first, timesteps.stop - timesteps.first
    count = min(length, _MOST)
    places = [first + int((place + 0.5) * length / count) for place in range(count)]
    size = min(run.config.training.batch_size, len(run.dataset))
    samples = Samples(run.dataset, places, size, size, run.config.training.seed, run.config.data.horizontal_flip)
    losses = loss_at_timesteps(model, run.objective, samples).mean(dim=1)
    for timestep, loss in zip(places, losses, strict=True):
        if loss >= threshold * losses.max():
            for draws in samples.at(timestep, model, run.objective):
                sample_losses(model, run.objective, draws).mean().backward()
    return model


def learn_architectures(
    run: Run, ranges: Sequence[TimestepSampler], budget: float, steps: int, threshold: float
) -> list[Kept]:
    """What stays of the run's model in each range, under one budget for all.

    The model stays as it is. Gates on its blocks, heads and groups of hidden channels are drawn anew in each step, for
    each range, and their logits learn by the model's own loss at timesteps of all T, plus a weight times
    |log(cost / budget)|, the cost being the FLOPs of the architectures that were drawn, in the mean over timesteps.
    In the end the budget is spent on what has the highest logits.

    Args:
        run: gives model, data, batch size and seed.
        ranges: of all stages.
        budget: share of the model's FLOPs.
        steps: of learning.
        threshold: see `_add_gradients`, by which heads and channels are ranked.

    Raises:
        UserError: a budget below what the least architecture costs.
    """
    model: Any = run.model.to(processes().device)
    whole = float(cost_of(model, run.objective, run.dataset)["flops"])
    cost = BlockCost(model, _tokens(run, model))
    elsewhere = whole - len(model.blocks) * cost.whole
    if elsewhere + cost.least > budget * whole:
        least = (elsewhere + cost.least) / whole
        raise UserError(f"prune_budget={budget} is less than the smallest architecture takes, {least:.3f}.")
    found = []
    for timesteps in ranges:
        found.append(ranks(_add_gradients(run, timesteps, threshold)))
        model.zero_grad()
    model.requires_grad_(False)
    shares = torch.tensor([(each.stop - each.first) / run.objective.num_train_timesteps for each in ranges])
    architectures = Architectures(found)

    def penalty(gates: list[Tensor]) -> Tensor:
        costs: Tensor = elsewhere + (architectures.costs(gates, cost) * shares.to(gates[0])).sum()
        return _WEIGHT * (costs / (budget * whole)).log().abs()

    _learn(run, architectures, ranges, penalty, steps)
    spent = architectures.cpu().spend(cost, shares, budget * whole - elsewhere)
    return [architectures.kept(spent, number) for number in range(len(ranges))]


def _learn(
    run: Run,
    architectures: Architectures,
    ranges: Sequence[TimestepSampler],
    penalty: Callable[[list[Tensor]], Tensor],
    steps: int,
) -> None:
    model, config, device = run.model, run.config.training, processes().device
    architectures.to(device)
    optimizer = torch.optim.AdamW(architectures.parameters(), lr=_RATE, weight_decay=0.0)
    conditions, edges = (
        Conditions(model, run.dataset),
        torch.tensor([each.first for each in ranges[1:]], device=device),
    )
    data = run.config.data
    batches = load_batches(run.dataset, config.batch_size, 0, steps, config.seed, data.num_workers)
    for iteration, batch in enumerate(batches):
        draws = draw(batch, config, run.objective, conditions, iteration, data.horizontal_flip, device)
        gates = architectures.draw(generator_for(device, MASKS, config.seed, iteration))
        with Gated(model, architectures, gates, torch.bucketize(draws.timesteps, edges, right=True)):
            loss = sample_losses(model, run.objective, draws).mean()
        (loss + penalty(gates)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _tokens(run: Run, model: Any) -> int:
    draws = next(iter(Samples(run.dataset, [0], 1).at(0, model, run.objective)))
    return int(draws.x_start[0, 0].numel() // model.patch_size**2)

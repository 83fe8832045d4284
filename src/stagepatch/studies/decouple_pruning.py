"""A DiT pruned for a range of timesteps (Diff-Pruning, arXiv 2305.10924)."""

from typing import Any

from stagepatch.analysis import Samples, loss_at_timesteps
from stagepatch.core import processes
from stagepatch.diffusion import TimestepSampler
from stagepatch.models import prune
from stagepatch.training import Run, sample_losses

_MOST = 100  # timesteps of a range that are looked at


def prune_for(run: Run, timesteps: TimestepSampler, ratio: float, threshold: float) -> Any:
    """The run's model without what its loss in a range needs least; see `prune`.

    As in the released code, gradients of the loss are summed over timesteps, but for those whose loss is below a share
    of the largest, where the model has little left to say. There it is the largest of all timesteps up to then, and
    the first that falls below ends the sum; here it is the largest of the range.

    Args:
        run: a batch of its training images is looked at, drawn anew for each timestep.
        timesteps: the range, of which at most a hundred are looked at, spread evenly.
        ratio: of heads and hidden channels to remove.
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
    pruned = prune(model, ratio)
    model.requires_grad_(False).zero_grad()
    return pruned

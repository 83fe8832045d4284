"""Gradients of a batch: in pieces, and interval by interval."""

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from stagepatch.training.draws import Draws
from stagepatch.training.faults import out_of_memory


def backward(step: nn.Module, draws: Draws, parts: int, accelerator: Accelerator) -> dict[str, Tensor]:
    """Gradients of the mean loss over `parts` pieces of the batch; the scalars to log, averaged over them.

    Raises:
        StepFault: there is no memory for it; it says in how many parts there is.
    """
    try:
        return _backward(step, draws, parts, accelerator)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
    raise out_of_memory(step, draws, parts, accelerator)  # out here, where nothing that was computed is held


def _backward(step: nn.Module, draws: Draws, parts: int, accelerator: Accelerator) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for index, piece in enumerate(draws.split(parts)):
        last = index == parts - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(step):
            loss, logged = step(*piece.tensors())
            accelerator.backward(loss / parts)
        for name, value in logged.items():
            totals[name] = totals.get(name, 0.0) + value / parts
    return totals


def backward_apart(
    step: nn.Module,
    draws: Draws,
    parts: int,
    accelerator: Accelerator,
    num_intervals: int,
    parameters: list[nn.Parameter],
    combine: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """`backward` for each interval of timesteps alone; left is what is made of their gradients."""
    gradients, totals = [], dict[str, Tensor]()
    for interval in range(num_intervals):
        own = draws.rows(slice(interval, None, num_intervals))
        for name, value in backward(step, own, parts, accelerator).items():
            totals[name] = totals.get(name, 0.0) + value / num_intervals
        found = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        for parameter in parameters:
            parameter.grad = None
    combined = combine(torch.stack(gradients))
    for parameter, gradient in zip(parameters, combined.split([each.numel() for each in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)
    return totals

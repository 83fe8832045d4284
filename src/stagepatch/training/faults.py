"""What befalls a step but leaves what trains as it was: it costs no step, and is said in words."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from stagepatch.core import LEFT_ALONE, UserError, is_left_alone
from stagepatch.training.draws import Draws

T = TypeVar("T")


class StepFault(UserError):
    """A step that was not taken, for a reason that lies outside of it."""


@contextmanager
def saved_at_fault(save: Callable[[], str]) -> Iterator[None]:
    """Let a fault of a step be preceded by `save`, which says what it kept.

    Raises:
        UserError: the fault, and what is kept.
    """
    try:
        yield
    except StepFault as fault:
        raise UserError(f"{fault} {save()}") from fault
    except RuntimeError as error:
        if not is_left_alone(error):
            raise
        raise UserError(f"{LEFT_ALONE} {save()}") from error


def living(loader: Iterable[T]) -> Iterator[T]:
    """A loader's batches.

    Raises:
        StepFault: a process that loads them was killed.
    """
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise StepFault(
            f"A process that loads the data has ended ({str(error).splitlines()[0]}). Where memory is short, give "
            f"fewer data.num_workers."
        ) from error


def out_of_memory(step: nn.Module, draws: Draws, parts: int, accelerator: Accelerator) -> StepFault:
    """The error for a step that had no room in so many parts, with the number of parts that has; it is tried.

    Call it out of the `except` block, whose traceback holds what was computed.
    """
    share = len(draws.x_start)
    loss, tried = accelerator.unwrap_model(step), parts
    while tried < share:
        tried = next(count for count in range(2 * tried, share + 1) if share % count == 0)
        _forget_gradients(loss)
        if _has_room(loss, draws.rows(slice(0, share // tried)), accelerator):
            _forget_gradients(loss)
            return StepFault(
                f"Out of memory with {share // parts} images at a time; {share // tried} fit: give "
                f"--training.gradient_accumulation_steps={tried}, the same batch in smaller parts, or "
                f"--training.gradient_checkpointing."
            )
    _forget_gradients(loss)
    return StepFault(
        f"Out of memory with {share // parts} images at a time, and with one alone: give "
        f"--training.gradient_checkpointing, or hold the model in less memory (docs/memory.md)."
    )


def _has_room(loss: nn.Module, draws: Draws, accelerator: Accelerator) -> bool:
    try:
        accelerator.backward(loss(*draws.tensors())[0])
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True


def _forget_gradients(loss: nn.Module) -> None:
    for parameter in loss.parameters():
        parameter.grad = None
    clear_device_cache(garbage_collection=True)

"""A frozen base that no device need hold: each process keeps a share of it (FSDP2, PyTorch's `fully_shard`)."""

import os
from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from stagepatch.checkpoints import has_plain_weights
from stagepatch.core import UserError, processes
from stagepatch.families import describe


def check_launch() -> None:
    """Refuse accelerate's own FSDP, under which transformers would leave the text encoders of all but one process
    without weights.

    Raises:
        UserError: it is on.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError(
            "accelerate's --use_fsdp shards what trains too: launch without it, and give --training.shard_base true, "
            "which shares the frozen base alone."
        )


def shard_base(model: nn.Module) -> None:
    """Freeze a model, and leave each process with its share of every weight, on its device.

    A block's weights are whole while it runs, and the others', such as embedders', for the whole of a forward and its
    backward. What a method puts on the model afterwards is whole on each process.

    Raises:
        UserError: there is one process, or the model is quantised.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(model, FSDPModule):  # a run that was stopped goes on in this process
        return
    if processes().num_processes == 1:
        raise UserError(
            "training.shard_base shares the base among processes, and there is one: `accelerate launch "
            "--num_processes 2 -m stagepatch train …`."
        )
    if not has_plain_weights(model):
        raise UserError("training.shard_base takes no quantised base: leave one of the two out.")
    model.requires_grad_(False)
    name = type(model).__name__
    for path in _units(model):
        fully_shard(model.get_submodule(path))
    fully_shard(model)
    type(model).__name__ = name  # by which its family is known; that of FSDP's own subclass is another


def _units(model: nn.Module) -> list[str]:
    """Paths of the blocks, and of what is run out of them before they are: inner ones first."""
    backbone = describe(model)
    blocks = {site.module for site in backbone.sites}
    taps = {backbone.time_tap, *backbone.condition_taps}
    inside = {path for path in taps if path.startswith(tuple(f"{block}." for block in blocks))}
    return sorted(blocks | inside, key=lambda path: -path.count("."))


def check_whole(parameters: Sequence[nn.Parameter]) -> None:
    """Refuse a method that trains the base's own weights, of which each process has a share.

    Raises:
        UserError: it does.
    """
    if any(isinstance(parameter.data, DTensor) for parameter in parameters):
        raise UserError(
            "training.shard_base is for methods that leave the base frozen, and this one trains its weights: take "
            "dmp, prompt_tuning, lora or wavelet, or leave it out."
        )

"""LoRAs of the stages into one LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stagepatch.core.errors import UserError
from stagepatch.core.files import read_tensors, write_tensors


def merge_loras(stages: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """Σ w_i B_i A_i as one LoRA, exactly: the ranks stand side by side, so its rank is the sum of theirs.

    Args:
        stages: files of PEFT's form, names ending in 'lora_A.weight' and 'lora_B.weight', alpha equal to the rank.

    Raises:
        UserError: other than one weight a stage, or LoRAs on other layers.
    """
    if len(stages) != len(weights) or not stages:
        raise UserError(f"{len(weights)} weights for {len(stages)} stages: give one weight for each.")
    loaded = [read_tensors(path)[0] for path in stages]
    for path, tensors in zip(stages, loaded, strict=True):
        if set(tensors) != set(loaded[0]):
            odd = sorted(set(tensors) ^ set(loaded[0]))
            raise UserError(f"'{path}' is on other layers than '{stages[0]}': first '{odd[0]}'.")
    merged = {}
    for name in loaded[0]:
        if name.endswith("lora_A.weight"):
            merged[name] = torch.cat([tensors[name] for tensors in loaded], dim=0)
        else:
            scaled = [weight * tensors[name] for tensors, weight in zip(loaded, weights, strict=True)]
            merged[name] = torch.cat(scaled, dim=1)
    write_tensors(output, merged)

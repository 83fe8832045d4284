"""LoRAs of the stages into one LoRA: summed, or side by side under a router."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stagepatch.core import UserError, read_tensors, write_json, write_tensors
from stagepatch.merging.config import SUM, MergeMethod, check_weights
from stagepatch.merging.dare import drop
from stagepatch.methods import LoRA, LoRAConfig
from stagepatch.methods.lora import CONFIG_NAME, FILE_NAME, MODEL_CLASS, read_config


def read_loras(stages: Sequence[Path]) -> tuple[LoRAConfig, list[dict[str, Tensor]]]:
    """The choices of the merged LoRA, whose rank is the sum of the stages', and the stages' tensors.

    Args:
        stages: directories of LoRAs, whose files have PEFT's form: names ending in 'lora_A.weight' and
            'lora_B.weight', alpha equal to the rank.

    Raises:
        UserError: LoRAs on other layers, or of several maps that are mixed over the noise level.
    """
    loras = [read_tensors(stage / FILE_NAME)[0] for stage in stages]
    for stage, tensors in zip(stages, loras, strict=True):
        odd = sorted(set(tensors) ^ set(loras[0]))
        if odd:
            raise UserError(f"'{stage}' is on other layers than '{stages[0]}': first '{odd[0]}'.")
    choices = [read_config(stage) for stage in stages]
    mixed = [stage for stage, choice in zip(stages, choices, strict=True) if choice.is_weighed]
    if mixed:
        raise UserError(f"'{mixed[0]}' is weighed by the noise level: its ranks do not add up to others'.")
    return replace(choices[0], rank=sum(choice.rank for choice in choices), min_rank=0), loras


def combine_loras(
    loras: Sequence[Mapping[str, Tensor]], weights: Sequence[float], method: MergeMethod = SUM
) -> dict[str, Tensor]:
    """Σ w_i B_i A_i as one LoRA, exactly: the ranks stand side by side, so its rank is the sum of theirs.

    By DARE, each B_i and each A_i is dropped and rescaled, as in peft's merging of adapters: of B_i A_i itself, what
    is left would be no LoRA. They are drawn independently, so the expectation is the sum.

    Args:
        method: 'sum' or 'dare'; see `check_lora_method`.
    """
    merged = {}
    for name in loras[0]:
        parts = [lora[name] for lora in loras]
        if method.dare_drop:
            parts = drop(parts, method, name)
        is_down = name.endswith("lora_A.weight")
        if not is_down:
            parts = [weight * part for part, weight in zip(parts, weights, strict=True)]
        merged[name] = torch.cat(parts, dim=0 if is_down else 1)
    return merged


def check_lora_method(method: MergeMethod) -> None:
    """Refuse a method whose result is no LoRA.

    Raises:
        UserError: it is not.
    """
    if method.kind not in ("sum", "dare"):
        raise UserError(f"LoRAs merged by '{method.kind}' would not be a LoRA: choose merge_method 'sum' or 'dare'.")


def merge_loras(stages: Sequence[Path], weights: Sequence[float], output: Path, method: MergeMethod = SUM) -> None:
    """`combine_loras` of directories into a directory.

    Raises:
        UserError: other than one weight a stage, a method whose result is no LoRA, or LoRAs on other layers.
    """
    check_weights(stages, weights)
    check_lora_method(method)
    config, loras = read_loras(stages)
    _, metadata = read_tensors(stages[0] / FILE_NAME)
    known = {name: metadata[name] for name in ("format", MODEL_CLASS) if name in metadata}
    write_tensors(output / FILE_NAME, combine_loras(loras, weights, method), known)
    write_json(output / CONFIG_NAME, asdict(config))


def assemble_loras(experts: Sequence[Path], config: LoRAConfig, model: nn.Module, output: Path) -> None:
    """LoRAs side by side, as one of several maps whose gate has yet to learn: what assembling starts from.

    Args:
        experts: directories, those of the first of `config.scales` first, from the image's end to the noise's.
        config: of the result.
        model: that the LoRAs are for; it gets the result.

    Raises:
        UserError: LoRAs on other layers, or another number or rank of them than the config says.
    """
    _, loras = read_loras(experts)
    ranks = [next(value for name, value in lora.items() if name.endswith("lora_A.weight")).shape[0] for lora in loras]
    if ranks != [config.rank] * config.num_maps:
        raise UserError(
            f"LoRAs of ranks {ranks} are not the {config.num_maps} of rank {config.rank} that lora "
            f"scales={config.scales} has."
        )
    method = LoRA(config)
    method.prepare(model)
    method.load_maps(combine_loras(loras, [1.0] * len(loras)), experts[0] / FILE_NAME)
    method.save(output)

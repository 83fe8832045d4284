"""Merge stages."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from stagepatch import config as configs
from stagepatch.backbones.loading import find_model
from stagepatch.commands.common import RUN_CONFIG
from stagepatch.errors import UserError
from stagepatch.files import read_json, write_json, write_text
from stagepatch.merging import Ties, merge_loras, merge_models
from stagepatch.methods import LoRAConfig
from stagepatch.methods.lora import CONFIG_NAME as LORA_CONFIG
from stagepatch.methods.lora import FILE_NAME as LORA_FILE


def merge(config: configs.MergeConfig, resolved: str) -> None:
    """Merge stages, a tensor at a time."""
    output, stages = Path(config.output_dir), [Path(stage) for stage in config.stages]
    if not 0.0 <= config.ties_keep <= 1.0:
        raise UserError(f"ties_keep={config.ties_keep} must be a share from 0 to 1.")
    loras = [(stage / LORA_CONFIG).exists() for stage in stages]
    if stages and all(loras):
        if config.ties_keep:
            raise UserError("TIES-merging of LoRAs would not be a LoRA: set ties_keep to 0.")
        merge_loras([stage / LORA_FILE for stage in stages], config.weights, output / LORA_FILE)
        ranks = [LoRAConfig(**read_json(stage / LORA_CONFIG)) for stage in stages]
        merged = replace(ranks[0], rank=sum(lora.rank for lora in ranks), min_rank=0)
        write_json(output / LORA_CONFIG, asdict(merged))
    else:
        ties = Ties(config.ties_keep) if config.ties_keep else None
        merge_models(find_model(config.base), [find_model(stage) for stage in stages], config.weights, output, ties)
    write_text(output / RUN_CONFIG, resolved)
    print(f"The merged {'LoRA' if stages and all(loras) else 'model'} is in '{output}'.")

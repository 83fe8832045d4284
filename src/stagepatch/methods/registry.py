"""Methods by name, and what a directory holds of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json
from stagepatch.methods.base import Method
from stagepatch.methods.config import LoRAConfig
from stagepatch.methods.dmp import DMP
from stagepatch.methods.finetune import BitFit, Finetune
from stagepatch.methods.lora import CONFIG_NAME as LORA_CONFIG
from stagepatch.methods.lora import LoRA
from stagepatch.methods.untrained import Untrained
from stagepatch.methods.weights import WEIGHTS_NAME
from stagepatch.patch import PatchConfig

METHODS = ("dmp", "prompt_tuning", "finetune", "bitfit", "lora", "none")


def make_method(name: str, patch: PatchConfig, lora: LoRAConfig, facts: dict[str, str] | None = None) -> Method:
    """A method that is yet to be trained.

    Args:
        patch: of 'dmp', and of 'prompt_tuning' but for its gate.
        lora: of 'lora'.
        facts: how it is trained, in words.

    Raises:
        UserError: an unknown name.
    """
    if name == "dmp":
        return DMP(patch, facts)
    if name == "prompt_tuning":
        return DMP(replace(patch, gate="none"), facts)
    if name == "finetune":
        return Finetune()
    if name == "bitfit":
        return BitFit()
    if name == "lora":
        return LoRA(lora)
    if name == "none":
        return Untrained()
    raise UserError(f"No method '{name}'. Methods: {', '.join(METHODS)}.")


def load_learned(model: nn.Module, directory: Path) -> Method:
    """Put on a model what a method saved: a patch, a LoRA, or weights.

    Raises:
        UserError: no such directory, or it holds none of them, or one for another model.
    """
    if not directory.is_dir():
        raise UserError(f"No patch at '{directory}': no such directory.")
    method: Method
    if (directory / LORA_CONFIG).exists():
        method = LoRA(LoRAConfig())
    elif (directory / WEIGHTS_NAME).exists():
        method = Finetune()
    elif (directory / "config.json").exists() and "patch" in read_json(directory / "config.json"):
        method = DMP(PatchConfig())
    else:
        raise UserError(f"'{directory}' holds nothing that a method learned: no patch, no LoRA, no weights.")
    method.load(model, directory)
    return method

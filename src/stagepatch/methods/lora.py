"""LoRA (arXiv 2106.09685) through peft, with ranks masked by timestep (T-LoRA, arXiv 2507.05964) as an option."""

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from stagepatch.checkpoints import component_for
from stagepatch.core import UserError, as_user_error, read_json, read_tensors, write_json, write_tensors
from stagepatch.families.registry import family_of
from stagepatch.methods.base import Method
from stagepatch.methods.config import LoRAConfig, MethodConfig

ADAPTER = "stagepatch"
# The name that `pipe.load_lora_weights` looks for.
FILE_NAME, CONFIG_NAME = "pytorch_lora_weights.safetensors", "lora.json"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "attn.qkv", "attn.proj")


class LoRA(Method):
    """Trains adapters on a frozen model, and saves them as diffusers does."""

    name = "lora"
    kind = "LoRA"
    marker = CONFIG_NAME

    def __init__(self, config: LoRAConfig | None = None) -> None:
        config = config or LoRAConfig()
        if config.rank < 1 or not 0 <= config.min_rank <= config.rank:
            raise UserError(
                f"lora rank={config.rank} and min_rank={config.min_rank} must have 0 ≤ min_rank ≤ rank ≥ 1."
            )
        self.config = config
        self.model: nn.Module | None = None

    @classmethod
    def from_config(cls, config: MethodConfig, facts: dict[str, str]) -> Self:
        return cls(config.lora)

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        model.requires_grad_(False).eval()
        self._inject(model)
        adapters = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
        for parameter in adapters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return [{"params": adapters, "factor": 1.0}]

    def save(self, directory: Path) -> None:
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, adapter_name=ADAPTER)
        prefix = component_for(self.model)
        write_tensors(directory / FILE_NAME, {f"{prefix}.{name}": value for name, value in state.items()})
        write_json(directory / CONFIG_NAME, asdict(self.config))

    def load(self, model: nn.Module, directory: Path) -> None:
        from peft.utils import set_peft_model_state_dict

        self.config = LoRAConfig(**read_json(directory / CONFIG_NAME))
        tensors, _ = read_tensors(directory / FILE_NAME)
        if self.model is not model:  # else it is another checkpoint of the same run
            self._inject(model)
        state = {name.split(".", 1)[1]: value for name, value in tensors.items()}
        odd: Any = set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
        if odd.unexpected_keys:
            raise UserError(f"'{directory / FILE_NAME}' is of another model: it holds '{odd.unexpected_keys[0]}'.")

    def _inject(self, model: nn.Module) -> None:
        try:
            import peft
        except ImportError as error:
            raise UserError("LoRA needs peft: pip install peft.") from error
        targets = self.config.targets or _targets_of(model)
        config = peft.LoraConfig(r=self.config.rank, lora_alpha=self.config.rank, target_modules=targets)
        with as_user_error(f"lora targets={targets} cannot be had in {type(model).__name__}", ValueError):
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        self.model = model
        if 0 < self.config.min_rank < self.config.rank:
            mask = _Mask(model, self.config)
            model.register_forward_pre_hook(mask.begin, with_kwargs=True)
            for name, module in model.named_modules():
                if name.endswith(f".lora_A.{ADAPTER}"):
                    module.register_forward_hook(mask.apply)


def _targets_of(model: nn.Module) -> list[str]:
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [ending for ending in _ATTENTION if any(path.endswith(f".{ending}") for path in linear)]


def active_ranks(noise_level: Tensor, rank: int, min_rank: int) -> Tensor:
    """Ranks that are on at a noise level t/T in 0…1: ⌊(1 − t/T)·(rank − min_rank)⌋ + min_rank (T-LoRA, Eq. 4)."""
    return torch.floor((1.0 - noise_level) * (rank - min_rank)) + min_rank


class _Mask:
    """The ranks that are on in this forward, for each sample."""

    def __init__(self, model: nn.Module, config: LoRAConfig) -> None:
        self.names = list(inspect.signature(model.forward).parameters)
        self.noise_level = family_of(type(model)).noise_level
        self.config = config
        self.mask: Tensor | None = None

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = (dict(zip(self.names, args, strict=False)) | kwargs)["timestep"]
        level = self.noise_level(torch.as_tensor(timestep).float().view(-1)).clamp(0.0, 1.0)
        active = active_ranks(level, self.config.rank, self.config.min_rank)
        self.mask = (torch.arange(self.config.rank, device=active.device) < active.unsqueeze(1)).float()

    def apply(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        assert self.mask is not None
        mask = self.mask.to(output.device, output.dtype)
        return output * mask.view(len(mask), *[1] * (output.ndim - 2), -1)

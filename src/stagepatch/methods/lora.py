"""LoRA (arXiv 2106.09685) through peft; as options, ranks masked by timestep (T-LoRA, arXiv 2507.05964), stages or
experts by timestep."""

import json
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from stagepatch.checkpoints import component_for, is_offloaded
from stagepatch.core import (
    UserError,
    as_user_error,
    check_values,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from stagepatch.families import input_dtype
from stagepatch.methods.base import Method
from stagepatch.methods.config import ROUTERS, LoRAConfig, MethodConfig
from stagepatch.methods.lora_card import CARD_NAME, lora_card
from stagepatch.methods.lora_router import RoutedRanks, Router, make_router
from stagepatch.methods.lora_stages import (
    GATES,
    Ranks,
    StageGate,
    TableGate,
    Weigh,
    linear_layers_of_blocks,
    rank_mask,
)
from stagepatch.methods.lora_stages import active_ranks as active_ranks

ADAPTER = "stagepatch"
# The name that `pipe.load_lora_weights` looks for.
FILE_NAME, CONFIG_NAME = "pytorch_lora_weights.safetensors", "lora.json"
MODEL_CLASS, FACTS = "model_class", "facts"  # in the file's metadata: the denoiser's class, and how it was trained
_GATE = "stage_gate."
# In a file whose ranks are weighed by timestep: loaders of diffusers, which would run them unweighed, refuse a name
# without "lora"; Flux's, which passes over those, an "alpha" that is no floating-point number.
WEIGHED = "weighed_by_timestep"
_FUSED = (torch.float32, torch.float64)
# Of diffusers' attention; of this DiT; of HiDream, PRX and Kandinsky, which have names of their own.
_ATTENTION = (
    *(
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "attn.qkv",
        "attn.proj",
        "mixer.qkv",
        "mixer.proj",
        "attn1.to_out",
        "img_qkv_proj",
    ),
    *("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
)


def read_config(directory: Path) -> LoRAConfig:
    """What a LoRA's directory says that it is.

    Raises:
        UserError: no such file, or one with other keys or types of values.
    """
    values = read_json(directory / CONFIG_NAME)
    with as_user_error(f"'{directory / CONFIG_NAME}' is not of a LoRA", UserError):
        check_values(values, LoRAConfig, "lora")
        return LoRAConfig(**values)


class LoRA(Method):
    """Trains adapters on a frozen model, and saves them as diffusers does.

    Args:
        facts: how it is trained, in words, for the model card.

    Raises:
        UserError: choices that cannot be.
    """

    name = "lora"
    kind = "LoRA"
    marker = CONFIG_NAME

    def __init__(self, config: LoRAConfig | None = None, facts: dict[str, str] | None = None) -> None:
        self.config = config or LoRAConfig()
        self.facts = facts or {}
        _check(self.config)
        self.goes_by_timestep = self.config.is_weighed
        self.model: nn.Module | None = None
        self.ranks: Ranks | None = None
        self.gate: StageGate | TableGate | Router | None = None

    @classmethod
    def from_config(cls, config: MethodConfig, facts: dict[str, str]) -> Self:
        return cls(config.lora, facts)

    def prepare(self, model: nn.Module) -> list[dict[str, Any]]:
        model.requires_grad_(False).eval()
        self._inject(model)
        adapters = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
        are_frozen = self.config.stage_gate in ROUTERS
        for parameter in adapters:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(not are_frozen)
        groups = [] if are_frozen else [{"params": adapters, "factor": 1.0}]
        if learned := self._learned_by_gate():
            groups.append({"params": learned, "factor": self.config.gate_learning_rate_factor})
        return groups

    def _learned_by_gate(self) -> list[nn.Parameter]:
        return [] if self.gate is None else [value for value in self.gate.parameters() if value.requires_grad]

    def check_start(self, start_from: str) -> None:
        if self.config.stage_gate in ROUTERS and not start_from:
            raise UserError(
                "a router learns to mix LoRA experts that were trained before: `stagepatch assemble` trains both; or "
                "give as start_from what it wrote."
            )

    def extra_loss(self) -> tuple[Tensor | None, dict[str, Tensor]]:
        if not isinstance(self.gate, TableGate) or not self.config.gate_prior:
            return None, {}
        prior = self.gate.prior_loss()
        return self.config.gate_prior * (1.0 - self.progress) * prior, {"gate_prior": prior.detach()}

    def merge(self, enabled: bool = True) -> None:
        """Whether sampling is done with weights that have the adapters in them, at the base's cost; see `Ranks.merge`.

        With stages it is, but for a router that reads inputs, whose weights are of each token; for the others it
        changes the last digits, so it has to be asked for.
        """
        assert self.ranks is not None, "prepare or load comes first"
        self.ranks.merge(enabled)

    def fuse(self) -> None:
        """Put the adapters into the weights, and take them off: a step then costs what the base's does.

        That is for good, and for sampling. The weights are replaced, not written to: a model that shares them keeps
        them. What cannot be fused without loss stays an adapter: one whose ranks differ by timestep, and layers whose
        weights are quantised, offloaded or in half precision, which would round a small change away.
        """
        assert self.model is not None, "prepare or load comes first"
        assert self.ranks is not None
        if self.ranks.weigh is not None:
            return
        for path, layer in list(self.model.named_modules()):
            if ADAPTER not in getattr(layer, "lora_A", ()):
                continue
            base: Any = layer.base_layer
            is_held = "forward" in vars(base)  # cast or moved as it computes
            if not is_held and type(base.weight) is nn.Parameter and base.weight.dtype in _FUSED:
                with torch.no_grad():
                    fused = base.weight + layer.get_delta_weight(ADAPTER)
                base.weight = nn.Parameter(fused, requires_grad=False)
                self.model.set_submodule(path, base)

    def save(self, directory: Path) -> None:
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, adapter_name=ADAPTER)
        if self.gate is not None and self._learned_by_gate():
            state |= {f"{_GATE}{name}": value for name, value in self.gate.state_dict().items()}
        assert self.ranks is not None
        if self.ranks.weigh is not None:
            state[f"{WEIGHED}_alpha"] = torch.ones(1, dtype=torch.int32)
        prefix, model_class = component_for(self.model), type(self.model).__name__
        tensors = {f"{prefix}.{name}": value for name, value in state.items()}
        metadata = {"format": "pt", MODEL_CLASS: model_class, FACTS: json.dumps(self.facts)}
        write_tensors(directory / FILE_NAME, tensors, metadata)
        write_text(directory / CARD_NAME, lora_card(self.config, model_class, self.facts))
        write_json(directory / CONFIG_NAME, asdict(self.config))

    def load(self, model: nn.Module, directory: Path) -> None:
        config = read_config(directory)
        tensors, _ = read_tensors(directory / FILE_NAME)
        _check_sizes(config, tensors, directory / FILE_NAME)
        if self.model is not model:
            self.config = config
            self._inject(model)
        elif config != self.config:  # it is another checkpoint of the same run, or what a run starts from
            raise UserError(f"'{directory}' holds a LoRA of other choices: {config}, expected {self.config}.")
        gate = {name: tensors.pop(name) for name in list(tensors) if name.partition(".")[2].startswith(_GATE)}
        self.load_maps(tensors, directory / FILE_NAME)
        if self.gate is not None and self._learned_by_gate():
            with as_user_error(f"'{directory / FILE_NAME}' has no whole gate of its stages", RuntimeError):
                self.gate.load_state_dict({name.split(f".{_GATE}", 1)[1]: value for name, value in gate.items()})

    def load_maps(self, tensors: dict[str, Tensor], path: Path) -> None:
        """After `prepare` or `load`: take the maps of a file, whose names have the component's before them.

        Args:
            path: of the file, for messages.
        """
        from peft.utils import set_peft_model_state_dict

        state = {name.partition(".")[2]: value for name, value in tensors.items() if WEIGHED not in name}
        with as_user_error(f"'{path}' does not hold this LoRA", RuntimeError):
            odd: Any = set_peft_model_state_dict(self.model, state, adapter_name=ADAPTER)
        if odd.unexpected_keys:
            raise UserError(f"'{path}' is of another model: it holds '{odd.unexpected_keys[0]}'.")

    def _inject(self, model: nn.Module) -> None:
        import peft  # slow to import

        choices, device = self.config, next(model.parameters()).device
        if choices.targets in ("all", ["all"]):
            targets = linear_layers_of_blocks(model)
        else:
            targets = list(choices.targets or _targets_of(model))
        rank = choices.rank * choices.num_maps
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        with as_user_error(f"lora targets={targets} cannot be had in {type(model).__name__}", ValueError):
            peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
        adapters = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
        for parameter in adapters:  # peft keeps them as their layers are kept, which may be away, or in 8 bits
            dtype = input_dtype(model) if parameter.element_size() == 1 else parameter.dtype
            parameter.data = parameter.data.to(device if is_offloaded(model) else parameter.device, dtype)
        weigh: Weigh | None = None
        self.model, self.gate = model, None
        if choices.stage_gate in ROUTERS:
            self.gate = router = make_router(model, ADAPTER, choices.stage_gate, choices.scales, choices.rank)
            self.ranks = RoutedRanks(model, ADAPTER, router)
        else:
            if choices.num_stages > 1:
                weigh = self.gate = _make_gate(choices).to(device)
            elif 0 < choices.min_rank < choices.rank:
                weigh = partial(rank_mask, rank=choices.rank, min_rank=choices.min_rank)
            self.ranks = Ranks(model, ADAPTER, weigh)
        self.ranks.merge(choices.num_maps > 1)


def _check_sizes(config: LoRAConfig, tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse a file of other sizes than its config's, before memory is taken for these."""
    ranks = {value.shape[:1] for name, value in tensors.items() if ".lora_A." in name}
    tables = {value.shape[:1] for name, value in tensors.items() if name.endswith(f".{_GATE}logits")}
    rank = config.rank * config.num_maps
    if ranks != {(rank,)} or (config.stage_gate == "table" and tables != {(config.num_ranges,)}):
        raise UserError(f"'{path}' does not hold this LoRA, of rank {rank} in all by its config.")


def _make_gate(config: LoRAConfig) -> StageGate | TableGate:
    if config.stage_gate == "table":
        return TableGate(config.num_stages, config.rank, config.num_ranges)
    return StageGate(config.num_stages, config.rank, config.stage_gate)


def _check(config: LoRAConfig) -> None:
    rank, min_rank, stages = config.rank, config.min_rank, config.num_stages
    if rank < 1 or not 0 <= min_rank <= rank:
        raise UserError(f"lora rank={rank} and min_rank={min_rank} must have 0 ≤ min_rank ≤ rank ≥ 1.")
    if stages < 1:
        raise UserError(f"lora num_stages={stages} must be at least 1.")
    gates = (*GATES, "table", *ROUTERS)
    if config.stage_gate not in gates:
        raise UserError(f"lora stage_gate='{config.stage_gate}' is none of: {', '.join(gates)}.")
    _check_scales(config)
    if config.num_maps > 1 and 0 < min_rank < rank:
        name = f"scales={config.scales}" if config.scales else f"num_stages={stages}"
        raise UserError(f"lora {name} and min_rank={min_rank} weigh the ranks by timestep in two ways: leave one out.")
    if config.stage_gate == "table" and config.num_ranges < stages:
        raise UserError(f"lora num_ranges={config.num_ranges} must be at least num_stages={stages}.")
    for name in ("gate_prior", "gate_learning_rate_factor"):
        if getattr(config, name) < 0.0:
            raise UserError(f"lora {name}={getattr(config, name)} must not be negative.")
    if isinstance(config.targets, str) and config.targets != "all":
        raise UserError(f"lora targets='{config.targets}' must be 'all', or a list of names.")


def _check_scales(config: LoRAConfig) -> None:
    scales, is_routed = config.scales, config.stage_gate in ROUTERS
    if scales and not is_routed:
        raise UserError(f"lora scales={scales} are a router's: set stage_gate='{config.stage_gate}' to router.")
    if not is_routed:
        return
    if len(scales) < 2 or scales[-1] < 1 or any(after >= before for before, after in pairwise(scales)):
        raise UserError(
            f"lora scales={scales} must be at least two numbers of experts, falling, such as [8, 4, 2, 1]."
        )
    if config.num_stages != 1:
        raise UserError(f"lora num_stages={config.num_stages} is not of a router, which has the experts of `scales`.")


def _targets_of(model: nn.Module) -> list[str]:
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [ending for ending in _ATTENTION if any(path.endswith(f".{ending}") for path in linear)]

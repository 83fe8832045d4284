"""The methods by name, and their choices."""

from dataclasses import dataclass, field
from typing import Literal

from stagepatch.core import UserError, check_numbers
from stagepatch.patch import PatchConfig

# A method is a class and a line here; its config is a field of MethodConfig.
METHODS = {
    "dmp": "stagepatch.methods.dmp:DMP",
    "prompt_tuning": "stagepatch.methods.dmp:PromptTuning",
    "finetune": "stagepatch.methods.finetune:Finetune",
    "joint": "stagepatch.methods.joint:Joint",
    "bitfit": "stagepatch.methods.finetune:BitFit",
    "lora": "stagepatch.methods.lora:LoRA",
    "wavelet": "stagepatch.methods.wavelet:Wavelet",
    "none": "stagepatch.methods.finetune:Untrained",
}
# Gates of a LoRA that mix experts which were trained before.
ROUTERS = ("router", "time_router")


@dataclass
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685), by peft.

    Args:
        rank: r of every adapter, or of each of its maps; the adapters are not scaled.
        targets: names, or ends of names, of the layers; by default the attention's projections. 'all': all linear
            layers inside the model's blocks (attention, MLP, modulation by the condition; a U-Net's blocks are its
            stages), not its embedders and its final layer.
        min_rank: ranks that are on at pure noise; the others come on in proportion as noise falls (T-LoRA,
            arXiv 2507.05964, without its orthogonal initialisation). 0, or `rank`, is plain LoRA.
        num_stages: K low-rank maps a layer, mixed by the noise level: W x + Σ_k w_k(t) B_k A_k x. 1 is plain LoRA.
        stage_gate: w_k. 'gaussian': Gaussians around (k + ½)/K, normalised; 'learned': a softmax that starts as
            these and is trained with the maps; 'ranges': each stage alone in its K-th of the noise levels; 'table':
            a softmax of K numbers for each of `num_ranges` ranges, trained with the maps (Remix-DiT, arXiv
            2412.05628). 'router': the maps are experts of `scales`, frozen, and what mixes them is trained alone
            (TimeStep Master, arXiv 2503.07416); 'time_router': the same without the layer's input, so that it can be
            merged. `stagepatch assemble` trains the experts and the router.
        num_ranges: N of a table (Remix-DiT: 20).
        gate_prior: weight of the cross-entropy between a table and one stage a range, which falls linearly to zero
            over training (Remix-DiT, Eq. 6; released code: 1e-4).
        gate_learning_rate_factor: on the rate of what a gate learns (Remix-DiT's released code: 500).
        scales: of a router, how many experts share the noise levels, from the finest scale to the coarsest: [8, 4, 2,
            1] are 15 experts.
    """

    rank: int = 8
    targets: Literal["all"] | list[str] | None = None
    min_rank: int = 0
    num_stages: int = 1
    stage_gate: Literal["gaussian", "learned", "ranges", "table", "router", "time_router"] = "gaussian"
    num_ranges: int = 20
    gate_prior: float = 1e-4
    gate_learning_rate_factor: float = 1.0
    scales: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        limits = dict.fromkeys(("rank", "num_stages", "num_ranges", "scales"), 1)
        check_numbers(self, "lora.", **limits, min_rank=0, gate_prior=0, gate_learning_rate_factor=0)

    @property
    def num_maps(self) -> int:
        """Low-rank maps of a layer."""
        return sum(self.scales) or self.num_stages

    @property
    def is_weighed(self) -> bool:
        """Whether its ranks count by the noise level."""
        return self.num_maps > 1 or 0 < self.min_rank < self.rank


@dataclass
class WaveletConfig:
    """Gates on the wavelet bands of what enters each block (Spectral Diffusion, arXiv 2211.17106).

    Args:
        gate_input: what a gate sees: 'features', the mean of the hidden states over their places, as in the paper,
            which know the timestep once a block has told them; 'timestep', the model's embedding of it; or 'both'.
        hidden_channels: of a gate's hidden layer.
    """

    gate_input: Literal["features", "timestep", "both"] = "features"
    hidden_channels: int = 64

    def __post_init__(self) -> None:
        if self.gate_input not in ("features", "timestep", "both"):
            raise UserError(f"wavelet gate_input='{self.gate_input}' is none of features, timestep, both.")
        check_numbers(self, "wavelet.", hidden_channels=1)


@dataclass
class MethodConfig:
    """What is learned on top of a model.

    Args:
        method: 'dmp', a patch on the frozen model (arXiv 2405.17825); 'prompt_tuning', one without a gate (Eq. 2);
            'finetune', all weights; 'joint', all weights and a patch together (Table 6 of DMP); 'bitfit', biases and
            norms (arXiv 2106.10199); 'lora' (arXiv 2106.09685); 'wavelet', gates on the wavelet bands of what enters
            each block (arXiv 2211.17106).
        patch: what a patch learns.
        lora: what a LoRA learns.
        wavelet: what wavelet gates learn.
    """

    method: str = "dmp"
    patch: PatchConfig = field(default_factory=PatchConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    wavelet: WaveletConfig = field(default_factory=WaveletConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"No method '{self.method}'. Methods: {', '.join(METHODS)}.")

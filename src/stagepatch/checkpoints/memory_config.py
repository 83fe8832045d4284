"""How a base that stays frozen is held in memory."""

from dataclasses import dataclass
from typing import Literal

from stagepatch.core.errors import UserError


@dataclass
class MemoryConfig:
    """A frozen base in less memory; docs/memory.md says what each takes and costs.

    Args:
        quantization: of the weights of linear layers in the model's blocks, through diffusers: 'bitsandbytes_nf4' (4
            bit, arXiv 2305.14314), 'bitsandbytes_int8', 'torchao_int8' or 'torchao_fp8'. They compute in `dtype`.
        gguf: a GGUF file of the denoiser's weights, read in place of its own.
        layerwise_casting: keep the weights of these layers as 8 bit floats, each cast to `dtype` while it computes.
        group_offload: keep the weights of these layers in the CPU's memory, and each on the accelerator while it
            computes.

    Raises:
        UserError: two of these that do not go together.
    """

    quantization: Literal["none", "bitsandbytes_nf4", "bitsandbytes_int8", "torchao_int8", "torchao_fp8"] = "none"
    gguf: str = ""
    layerwise_casting: bool = False
    group_offload: bool = False

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value not in ("none", "", False)]
        if len(given) > 1:
            raise UserError(f"memory.{given[0]} and memory.{given[1]} are two ways to hold one base: leave one out.")

    @property
    def needs_checkpointing(self) -> bool:
        """Whether a backward pass keeps the weights that its forward computed with, in `dtype`: all of a model's, or
        with gradient checkpointing one block's. bitsandbytes makes them anew."""
        return self != MemoryConfig() and not self.quantization.startswith("bitsandbytes")

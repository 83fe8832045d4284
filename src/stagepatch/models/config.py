"""The size of a model that is trained from scratch."""

from dataclasses import dataclass, field
from typing import Any, Literal

from stagepatch.core import check_numbers


@dataclass
class ModelConfig:
    """Size and conditioning of a DiT (arXiv 2212.09748), or of a U-Net as DDPM's (arXiv 2006.11239).

    Args:
        name: 'DiT-S/2' to 'DiT-XL/8', which sets patch_size, hidden_size, num_layers and num_attention_heads; empty
            to give these yourself.
        sample_size: height and width [pixels] of the inputs.
        patch_size: side [pixels] of a token.
        in_channels: channels of the input (latents: 4).
        hidden_size: channels D of a token.
        num_layers: number L of transformer blocks.
        num_attention_heads: must divide hidden_size.
        mlp_ratio: hidden channels of a block's MLP over hidden_size.
        convolved_heads: of a block's heads, how many are convolved in place of attending, or a list of one number for
            each block (as in the experts of MEME, arXiv 2306.04990).
        conditioning: 'none', 'class' or 'text' (of a DiT a pooled embedding).
        num_classes: classes, without the null label.
        learn_sigma: also predict the variance (improved DDPM, arXiv 2102.09672; DiT: on).
        routed_share: share β of the channels that the blocks work on at a timestep (DTR, arXiv 2310.07138: 0.8); 1 is
            all of them, without routing.
        routing_shift: α of how the routed channels move with the timestep (DTR: 4).
        block_out_channels: channels of a U-Net's stages, from the finest on, in place of a DiT. Of text it attends to
            the tokens of the text encoder in `parts`, as Stable Diffusion's; of classes it has no label for none:
            none is dropped, and it cannot be guided.
        layers_per_block: residual layers of a U-Net's stage.
        attention_stages: numbers of the U-Net's stages that have attention, the finest 0.
        unet_options: more arguments of diffusers' UNet2DModel, such as {attention_head_dim: null}, one head; of text,
            of its UNet2DConditionModel.
    """

    name: str = ""
    sample_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    num_layers: int = 12
    num_attention_heads: int = 6
    mlp_ratio: float = 4.0
    convolved_heads: int | list[int] = 0
    conditioning: Literal["none", "class", "text"] = "class"
    num_classes: int = 1000
    learn_sigma: bool = True
    routed_share: float = 1.0
    routing_shift: float = 4.0
    block_out_channels: list[int] = field(default_factory=list)
    layers_per_block: int = 2
    attention_stages: list[int] = field(default_factory=lambda: [1])
    unet_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = ("patch_size", "in_channels", "hidden_size", "num_layers", "num_attention_heads", "layers_per_block")
        amounts = ("convolved_heads", "num_classes", "mlp_ratio", "routing_shift", "attention_stages")
        limits = dict.fromkeys((*counts, "sample_size", "block_out_channels"), 1) | dict.fromkeys(amounts, 0)
        check_numbers(self, "model.", **limits, routed_share=(0, 1))

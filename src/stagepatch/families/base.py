"""The vocabulary of a backbone's description."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from stagepatch.core import UserError

Grid = tuple[int, ...]
"""Height and width of hidden states; for video frames, height and width."""


@dataclass(frozen=True)
class Attention:
    """A block's self-attention, by paths of its modules, for prompts that are prepended behind a gate.

    Args:
        query, key, value: the linear layers; one path for all three where they are fused in one layer.
        out: the linear layer that takes the heads' outputs [B, N, heads · d].
        heads: number of heads.
        query_norm, key_norm: norms on the heads [B, heads, N, d]; '' where there are none.
    """

    query: str
    key: str
    value: str
    out: str
    heads: int
    query_norm: str = ""
    key_norm: str = ""


@dataclass(frozen=True)
class Site:
    """A place where hidden states enter a block.

    Args:
        name: how the site is called in a patch's file, such as 'blocks.0'.
        module: path of the block in the model; its first input (or `argument`) is the hidden states.
        index: the block's number, which the gate sees.
        channels: D.
        grid: of the hidden states at the reference size.
        layout: 'tokens' [B, N, D] with N = the product of the grid, 'sequence' [N, B, D], or 'map' [B, D, height,
            width].
        argument: the hidden states' name where the block takes them by keyword.
        kind: 'block' of a transformer; a U-Net has sites at each 'stage' and at each 'attention'.
        image_tokens: where the image lies among tokens of text and other images: 'first', 'last', or 'after_text',
            which differs from sample to sample.
        attention: the block's self-attention, where prompts can be prepended to it.
    """

    name: str
    module: str
    index: int
    channels: int
    grid: Grid
    layout: Literal["tokens", "sequence", "map"] = "tokens"
    argument: str = "hidden_states"
    kind: Literal["block", "stage", "attention"] = "block"
    image_tokens: Literal["first", "last", "after_text"] = "first"
    attention: Attention | None = None

    @property
    def num_tokens(self) -> int:
        """N at the reference size."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Extent:
    """What one forward works on.

    Args:
        grid: of the image tokens.
        text_lengths: tokens of text before the image's in each sample, [B], for sites 'after_text'.
        rows: of the taps' outputs, which are the samples' own, where the model embeds other timesteps with them.
    """

    grid: Grid
    text_lengths: Tensor | None = None
    rows: slice | None = None


# Called before each forward with the model and its arguments by name.
Begin = Callable[[Any, dict[str, Any]], Extent]
# A tap's output as one row a sample, [B, C].
Reduce = Callable[[Tensor], Tensor]


def last_token(output: Tensor) -> Tensor:
    """A model that is told a timestep a token (Wan 2.2 TI2V, whose first frame may be given and clean) embeds each,
    [B, N, C]: the last token's, which is never given, stands for all."""
    return output[:, -1] if output.ndim == 3 else output


@dataclass(frozen=True)
class Backbone:
    """Where a model can be patched.

    Args:
        model_class: the model's class.
        sites: in the order in which the forward pass meets them. The first one's kind is what 'all' means.
        time_tap: path of the module whose output [B, C] is the timestep embedding t.
        condition_taps: paths of the modules whose outputs [B, C], summed and added to t, give t+c.
        condition_channels: C.
        grid: reference grid of the gate's logits.
        begin: reads the extent of a forward off its arguments. It may run a tapped module early, in a model that
            would run it too late for the first site.
        reduce: of each tap's output. A patch's file does not hold it, nor `begin`.
        is_found: the description was found in the model's structure, not written: what arrives at each site is held
            against it.
    """

    model_class: str
    sites: tuple[Site, ...]
    time_tap: str
    condition_taps: tuple[str, ...]
    condition_channels: int
    grid: Grid
    begin: Begin | None = field(default=None, compare=False, repr=False)
    reduce: Reduce = field(default=last_token, compare=False, repr=False)
    is_found: bool = False


Size = int | Sequence[int]
"""A number for height and width, or a number for each dimension."""


def reference_size(given: Size | None, default: Size) -> Grid:
    """Size of the model's input [latent pixels] that grids are counted at.

    Raises:
        UserError: as many numbers as the model has dimensions were not given.
    """
    default = square(default)
    if given is None:
        return default
    size = (*default[:-2], given, given) if isinstance(given, int) else tuple(given)
    if len(size) != len(default) or any(type(number) is not int or number < 1 for number in size):
        names = "frames, height and width" if len(default) == 3 else "height and width"
        raise UserError(f"sample_size={given} must be one number, or {names}, each at least 1.")
    return size


def square(side: Size) -> Grid:
    """A number for each dimension."""
    return (side, side) if isinstance(side, int) else tuple(side)


def patches(size: Sequence[int], patch_size: Size) -> Grid:
    """Tokens along each dimension of an input."""
    return tuple(length // patch for length, patch in zip(size, square(patch_size), strict=True))


def self_attention(block: nn.Module, name: str, path: str) -> Attention:
    """Description of a block's attention module `name`: diffusers' usual one, or one whose layers are fused.

    Args:
        path: of the block in the model.
    """
    module: Any = block.get_submodule(name)
    path = f"{path}.{name}" if name else path
    if hasattr(module, "qkv"):
        fused = f"{path}.qkv"
        return Attention(fused, fused, fused, f"{path}.proj", module.num_attention_heads)
    norms = [f"{path}.{norm}" if getattr(module, norm, None) is not None else "" for norm in ("norm_q", "norm_k")]
    return Attention(f"{path}.to_q", f"{path}.to_k", f"{path}.to_v", f"{path}.to_out.0", module.heads, *norms)

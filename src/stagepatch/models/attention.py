"""How the tokens of a block hear of each other: attention, or convolution for the channels of some heads."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.core import UserError


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: [B, N, D] -> [B, N, D]"""

    def __init__(self, hidden_size: int, num_attention_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.qkv = nn.Linear(hidden_size, 3 * num_attention_heads * head_dim)
        self.proj = nn.Linear(num_attention_heads * head_dim, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        attended: Tensor = self.proj(_attend(self.qkv(hidden_states), self.num_attention_heads))
        return attended


class Mixer(nn.Module):
    """The channels of some heads convolved, those of the others attended to (the Inception mixer of iFormer, arXiv
    2205.12956, which MEME's experts have, arXiv 2306.04990): [B, N, D] -> [B, N, D].

    Of the convolved channels C, one half is mapped to C and convolved 3×3, each channel alone; the other half is
    max-pooled 3×3 and mapped to C; both go through GELU. These and what was attended to are convolved once more, each
    channel alone, which is added, and mapped to D.

    Args:
        hidden_size: D.
        num_attention_heads: that the channels are cut into.
        convolved_heads: how many of them, the first, are convolved; at least one, and one is left.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, convolved_heads: int) -> None:
        super().__init__()
        channels = convolved_heads * (hidden_size // num_attention_heads)
        attended = hidden_size - channels
        width = 2 * channels + attended
        self.num_attention_heads = num_attention_heads - convolved_heads
        self.split = [channels, attended]
        self.expand = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pooled = nn.Conv2d(channels // 2, channels, 1)
        self.qkv = nn.Linear(attended, 3 * attended)
        self.fuse = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.proj = nn.Linear(width, hidden_size)

    def forward(self, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        """
        Args:
            grid: height and width of the tokens.

        Raises:
            UserError: other tokens than those of the grid.
        """
        if hidden_states.shape[1] != grid[0] * grid[1]:
            raise UserError(
                f"A DiT with convolved_heads takes the image's {grid[0]} × {grid[1]} tokens alone, not "
                f"{hidden_states.shape[1]}: no prompts can be prepended."
            )
        high, low = hidden_states.split(self.split, dim=2)
        convolved, pooled = high.transpose(1, 2).unflatten(2, grid).chunk(2, dim=1)
        convolved = F.gelu(self.depthwise(self.expand(convolved)))
        pooled = F.gelu(self.pooled(F.max_pool2d(pooled, 3, stride=1, padding=1)))
        attended = _attend(self.qkv(low), self.num_attention_heads).transpose(1, 2).unflatten(2, grid)
        mixed = torch.cat([convolved, pooled, attended], dim=1)
        mixed = mixed + self.fuse(mixed)
        projected: Tensor = self.proj(mixed.flatten(2).transpose(1, 2))
        return projected


def _attend(qkv: Tensor, heads: int) -> Tensor:
    """Queries, keys and values side by side, [B, N, 3 · heads · d], to what each token heard, [B, N, heads · d]."""
    batch, tokens, _ = qkv.shape
    query, key, value = qkv.view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).reshape(batch, tokens, -1)

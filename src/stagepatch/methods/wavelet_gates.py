"""Wavelet gates: the four sub-bands of hidden states, each channel of each weighed anew at every step (Spectral
Diffusion, arXiv 2211.17106)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.core import UserError
from stagepatch.families import Backbone, Extent, Site, check_found
from stagepatch.methods.config import WaveletConfig

# Of 2×2 places, row by row, to the bands LL, LH, HL, HH; symmetric, and its own inverse.
_HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))


def haar(maps: Tensor) -> Tensor:
    """Orthonormal Haar wavelets of one level: [B, C, H, W], both sides even, to [B, C, 4, H/2, W/2].

    The bands are LL, LH, HL and HH, the first letter of the height: LH is high along the width.
    """
    return _combine(F.pixel_unshuffle(maps, 2).unflatten(1, (-1, 4)))


def inverse_haar(bands: Tensor) -> Tensor:
    """[B, C, 4, H/2, W/2] to [B, C, H, W]."""
    return F.pixel_shuffle(_combine(bands).flatten(1, 2), 2)


def _combine(four: Tensor) -> Tensor:
    return torch.einsum("fg,bcghw->bcfhw", four.new_tensor(_HAAR) / 2, four)


class WaveletGates(nn.Module):
    """A gate before each block of a frozen model: X + IDWT((g − 1) ⊙ DWT(X)), which is IDWT(g ⊙ DWT(X)).

    g = 2·sigmoid(FFN(z)), [B, 4, C], is 1 at the start, so that the model is as it was. z is the mean of X over its
    places, the condition embedding, or both. Odd sides are continued by their last row or column.

    Args:
        config: choices.
        backbone: description of the model it is for, whose sites are all taken.

    Raises:
        UserError: sites whose hidden states do not lie on one grid of height and width, or share it with others'.
    """

    def __init__(self, config: WaveletConfig, backbone: Backbone) -> None:
        super().__init__()
        odd = [site.name for site in backbone.sites if site.layout == "sequence" or site.image_tokens != "first"]
        if odd or len(backbone.grid) != 2:
            raise UserError(
                f"method='wavelet' needs feature maps, or tokens that begin with an image's; "
                f"{backbone.model_class} has others."
            )
        self.config, self.backbone = config, backbone
        self.enabled = True
        self.extent: Extent | None = None
        self.observed_rows = 0
        self.seen: Tensor | None = None
        self.gates = nn.ModuleList(_new_gate(config, backbone, site) for site in backbone.sites)

    @property
    def condition(self) -> str:
        """Which embedding the gates see, if any."""
        return "t"

    def observe(self, condition: Tensor) -> None:
        """See the condition embedding [B, C] of a forward, before any site."""
        self.observed_rows = len(condition)
        self.seen = condition.detach()

    def enter(self, position: int, hidden_states: Tensor) -> Tensor:
        """Hidden states of the position-th site, their bands weighed; laid out, and of the dtype, as before."""
        site = self.backbone.sites[position]
        if site.layout == "map":
            return hidden_states + self._change(position, hidden_states)
        grid = site.grid if self.extent is None else self.extent.grid
        if self.backbone.is_found:
            check_found(self.backbone.model_class, site, hidden_states, grid, self.observed_rows)
        image = hidden_states[:, : math.prod(grid)]
        maps = image.transpose(1, 2).unflatten(2, grid)
        changed = image + self._change(position, maps).flatten(2).transpose(1, 2)
        return torch.cat([changed, hidden_states[:, math.prod(grid) :]], dim=1)

    def _change(self, position: int, maps: Tensor) -> Tensor:
        """What the position-th gate adds to maps [B, C, H, W]."""
        height, width = maps.shape[2:]
        even = F.pad(maps, (0, width % 2, 0, height % 2), mode="replicate")
        change = inverse_haar((self.weigh(position, maps) - 1.0).to(maps.dtype)[..., None, None] * haar(even))
        return change[..., :height, :width]

    def weigh(self, position: int, maps: Tensor) -> Tensor:
        """Weights g of the position-th site's bands, [B, C, 4], for its maps [B, C, H, W]."""
        gate = self.gates[position]
        if next(gate.parameters()).device != maps.device:
            self.to(maps.device)  # the model was moved, or is offloaded and computes elsewhere
        dtype = next(gate.parameters()).dtype
        features, seen = [], self.seen
        if self.config.gate_input != "timestep":
            features.append(maps.mean(dim=(2, 3)).to(dtype))
        if self.config.gate_input != "features" and seen is not None:
            features.append(seen.to(dtype).expand(len(maps), -1))
        with torch.autocast(maps.device.type, enabled=False):
            logits: Tensor = gate(torch.cat(features, dim=1))
        return 2.0 * torch.sigmoid(logits.view(len(logits), -1, 4))


def _new_gate(config: WaveletConfig, backbone: Backbone, site: Site) -> nn.Sequential:
    channels = {
        "features": site.channels,
        "timestep": backbone.condition_channels,
        "both": site.channels + backbone.condition_channels,
    }[config.gate_input]
    last = nn.Linear(config.hidden_channels, 4 * site.channels)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(channels, config.hidden_channels), nn.SiLU(), last)

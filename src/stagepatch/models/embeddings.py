"""The conditioning embeddings of DiT: timestep, pooled text, and fixed positions."""

import torch
from diffusers.models.embeddings import Timesteps, get_1d_sincos_pos_embed_from_grid
from torch import Tensor, nn


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep through a two-layer MLP: [B] -> [B, D]."""

    def __init__(self, hidden_size: int, downscale_freq_shift: float = 0.0) -> None:
        super().__init__()
        self.features = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=downscale_freq_shift)
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(self.features(timesteps).to(self.mlp[0].weight.dtype))  # type: ignore[no-any-return]


class TextEmbedder(nn.Module):
    """Pooled text embeddings [B, E], projected to [B, D]; a row of NaN (or dropout) takes the null vector."""

    def __init__(self, projection_dim: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.dropout_prob = dropout_prob
        self.proj = nn.Linear(projection_dim, hidden_size)
        self.null = nn.Parameter(torch.zeros(projection_dim))

    def forward(self, pooled_projections: Tensor) -> Tensor:
        dropped = pooled_projections.isnan().any(dim=1)
        if self.training and self.dropout_prob > 0:
            dropped = dropped | (torch.rand(dropped.shape, device=dropped.device) < self.dropout_prob)
        return self.proj(torch.where(dropped[:, None], self.null, pooled_projections))  # type: ignore[no-any-return]


def sincos_positions(hidden_size: int, height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Fixed sine-cosine positions of a height × width grid, one unit a token: [1, height·width, D].

    The first half of the channels encodes the column, the second half the row, as in the DiT checkpoints.
    """
    # float64 on the CPU, then moved: accelerators without float64 get the same values.
    where = "meta" if device is not None and torch.device(device).type == "meta" else "cpu"
    rows = torch.arange(height, device=where, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, device=where, dtype=torch.float64).repeat(height)
    halves = [get_1d_sincos_pos_embed_from_grid(hidden_size // 2, grid) for grid in (columns, rows)]
    return torch.cat(halves, dim=1).float().unsqueeze(0).to(device)

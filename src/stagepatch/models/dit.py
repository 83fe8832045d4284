"""DiT, the diffusion transformer of Peebles & Xie (arXiv 2212.09748), with adaLN-Zero blocks.

Parameter names are those of the authors' checkpoints, so these load without a table of renames.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import LabelEmbedding, PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.models import convert
from stagepatch.models.attention import Attention, Mixer
from stagepatch.models.embeddings import TextEmbedder, TimestepEmbedder, sincos_positions
from stagepatch.models.sizes import DIT_SIZES

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

# What a DiT's names begin with.
_PARTS = ("x_embedder.", "t_embedder.", "y_embedder.", "blocks.", "final_layer.")
_MOST_POSITIONS = 2**28  # numbers: 1 GiB; of DiT-XL, 480 tokens a side


class DiT(ModelMixin, ConfigMixin):  # type: ignore[misc, unused-ignore]
    """A diffusion transformer for images or latents of any height and width.

    Args:
        sample_size: height and width [pixels] of the inputs it is trained on.
        patch_size: side [pixels] of the square that makes one token.
        in_channels: channels C of the input.
        hidden_size: channels D of a token.
        num_layers: number L of transformer blocks.
        num_attention_heads: must divide `hidden_size`, but where `attention_head_dim` is given.
        mlp_ratio: hidden channels of a block's MLP over D.
        conditioning: 'none', 'class' (labels [B]) or 'text' (pooled text embedding [B, E]).
        num_classes: labels run from 0 to num_classes − 1; num_classes is the null label.
        class_dropout_prob: share of labels (or texts) dropped in train mode, one draw per forward.
        pooled_projection_dim: E.
        learn_sigma: predict the variance's interpolation too (2C output channels).
        downscale_freq_shift: 0 as in the authors' code, 1 as in diffusers' DiT.
        norm_eps: of the norm before each MLP: 1e-6 as in the authors' code, 1e-5 in diffusers' DiT.
        attention_head_dim: channels of a head; by default `hidden_size` over `num_attention_heads`. A model that was
            pruned has fewer heads of the same size.
        convolved_heads: of a block's heads, how many do not attend, but are convolved (see `Mixer`), or a list of one
            number for each block.

    Raises:
        UserError: sizes that do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DiTBlock",)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        conditioning: Literal["none", "class", "text"] = "class",
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        pooled_projection_dim: int = 768,
        learn_sigma: bool = True,
        downscale_freq_shift: float = 0.0,
        norm_eps: float = 1e-6,
        attention_head_dim: int | None = None,
        convolved_heads: int | list[int] = 0,
    ) -> None:
        super().__init__()
        if (attention_head_dim is None and hidden_size % num_attention_heads) or hidden_size % 4:
            raise UserError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_attention_heads} "
                f"and of 4 (positions)."
            )
        head_dim = attention_head_dim or hidden_size // num_attention_heads
        if sample_size % patch_size:
            raise UserError(f"sample_size={sample_size} is not a multiple of patch_size={patch_size}.")
        if (sample_size // patch_size) ** 2 * hidden_size > _MOST_POSITIONS:
            raise UserError(
                f"sample_size={sample_size} by patch_size={patch_size} is more tokens of {hidden_size} channels than "
                f"their positions are kept for."
            )
        if conditioning not in ("none", "class", "text"):
            raise UserError(f"conditioning='{conditioning}' is none of 'none', 'class', 'text'.")
        convolved = convolved_heads if isinstance(convolved_heads, list) else [convolved_heads] * num_layers
        _check_convolved(convolved, num_layers, num_attention_heads, head_dim, hidden_size)
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, hidden_size, pos_embed_type=None
        )
        self.t_embedder = TimestepEmbedder(hidden_size, downscale_freq_shift=downscale_freq_shift)
        self.y_embedder: nn.Module | None = None
        if conditioning == "class":
            self.y_embedder = LabelEmbedding(num_classes, hidden_size, class_dropout_prob)
        elif conditioning == "text":
            self.y_embedder = TextEmbedder(pooled_projection_dim, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_attention_heads, head_dim, mlp_ratio, norm_eps, count) for count in convolved
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._base_grid = (sample_size // patch_size, sample_size // patch_size)
        self.register_buffer("positions", sincos_positions(hidden_size, *self._base_grid), persistent=False)
        self._initialize()

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> DiT:
        """One of the named sizes, 'DiT-S/2' to 'DiT-XL/8'; further arguments as in `DiT`.

        Raises:
            UserError: unknown name.
        """
        if name not in DIT_SIZES:
            raise UserError(f"No DiT is named '{name}'. Choose one of: {', '.join(DIT_SIZES)}.")
        model: DiT = cls(**{**DIT_SIZES[name], **overrides})
        return model

    @classmethod
    def from_original(cls, checkpoint: str | Path | Mapping[str, Any], num_attention_heads: int | None = None) -> DiT:
        """Read a checkpoint with the key names of facebookresearch/DiT, also under `ema` or `model`.

        Args:
            checkpoint: a `.pt` or `.safetensors` file, or a state dict.
            num_attention_heads: needed where width and depth are none of the named sizes.

        Raises:
            UserError: no such file, keys or shapes that are none of a DiT's, or a head count that cannot be inferred.
        """
        state = convert.load_original_state_dict(checkpoint)
        return cls._of_weights(convert.original_config(state, num_attention_heads), state)

    @classmethod
    def from_diffusers(cls, model: DiTTransformer2DModel) -> DiT:
        """Convert diffusers' `DiTTransformer2DModel`; outputs agree to 1e-5 in float32.

        Raises:
            UserError: a configuration that this DiT cannot express.
        """
        return cls._of_weights(*convert.read_diffusers(model))

    @classmethod
    def _of_weights(cls, config: dict[str, Any], state: Mapping[str, Tensor]) -> DiT:
        """A model in eval mode; what is beside its parts, such as `pos_embed`, is left out."""
        with torch.device("meta"):  # no memory is taken for sizes that the tensors do not have
            expected = cls(**config).state_dict()
        missing = sorted(set(expected) - set(state))
        if missing:
            raise UserError(f"Not a whole DiT checkpoint: {len(missing)} keys are missing, first '{missing[0]}'.")
        odd = sorted(name for name in set(state) - set(expected) if name.startswith(_PARTS))
        if odd:
            raise UserError(f"Not a DiT checkpoint: {len(odd)} keys are none of a DiT's, first '{odd[0]}'.")
        for name, tensor in expected.items():
            if not state[name].is_floating_point():
                raise UserError(f"Not a DiT checkpoint: '{name}' is {state[name].dtype}, expected floating point.")
            if state[name].shape != tensor.shape:
                raise UserError(
                    f"Not a DiT checkpoint of this shape: '{name}' is {list(state[name].shape)}, expected "
                    f"{list(tensor.shape)}."
                )
        model: DiT = cls(**config)
        model.load_state_dict({name: state[name] for name in expected})
        model.eval()
        return model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        pooled_projections: Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict noise (and the variance's interpolation) of a noisy sample.

        Args:
            sample: [B, C, H, W], H and W multiples of `patch_size`.
            timestep: [B], or one number for the whole batch.
            class_labels: [B], for conditioning 'class'.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.
            pooled_projections: [B, E], for conditioning 'text'; a row of NaN stands for no text.

        Raises:
            UserError: a shape or condition that the model does not take.
        """
        if sample.ndim != 4 or sample.shape[1] != self.in_channels:
            raise UserError(f"Input of shape {list(sample.shape)}: expected [B, {self.in_channels}, H, W].")
        batch, _, height, width = sample.shape
        if height % self.patch_size or width % self.patch_size:
            raise UserError(f"Input of {height}×{width} is not a multiple of patch_size={self.patch_size}.")
        grid = (height // self.patch_size, width // self.patch_size)
        timesteps = torch.as_tensor(timestep, device=sample.device)
        if timesteps.ndim > 1 or timesteps.numel() not in (1, batch):
            raise UserError(f"Timesteps of shape {list(timesteps.shape)}: expected one number, or [{batch}].")
        timesteps = timesteps.expand(batch)

        hidden_states = self.x_embedder(sample) + self._positions(grid).to(sample.dtype)
        hidden_states = hidden_states.contiguous()  # of a convolution: without it, channel by channel in every block
        conditioning = self.t_embedder(timesteps)
        if self.y_embedder is not None:
            condition = self._condition(batch, class_labels, pooled_projections)
            conditioning = conditioning + self.y_embedder(condition)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning, grid)
            else:
                hidden_states = block(hidden_states, conditioning, grid)
        output = self._unpatchify(self.final_layer(hidden_states, conditioning), grid)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _condition(self, batch: int, class_labels: Tensor | None, pooled_projections: Tensor | None) -> Tensor:
        name, condition, width = "class_labels", class_labels, []
        if self.config.conditioning == "text":
            name, condition, width = "pooled_projections", pooled_projections, [self.config.pooled_projection_dim]
        if condition is None:
            raise UserError(f"This DiT is conditioned on {self.config.conditioning}: pass `{name}`.")
        if condition.ndim == 0 or condition.shape[0] not in (1, batch) or list(condition.shape[1:]) != width:
            raise UserError(f"`{name}` of shape {list(condition.shape)}: expected {[batch, *width]}.")
        return condition

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self._base_grid:
            return self.positions  # type: ignore[no-any-return]
        return sincos_positions(self.hidden_size, *grid, device=self.positions.device)

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h·w, p·p·C] -> [B, C, h·p, w·p]"""
        p = self.patch_size
        tokens = tokens.reshape(-1, *grid, p, p, self.out_channels)
        return tokens.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, grid[0] * p, grid[1] * p)

    def _initialize(self) -> None:
        """As in arXiv 2212.09748: Xavier for linear layers, zero for what must start as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        if isinstance(self.y_embedder, LabelEmbedding):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.startswith("t_embedder.mlp") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            elif "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)


class DiTBlock(nn.Module):
    """Attention, or a mixer in its place, and MLP, each scaled, shifted and gated by the conditioning (adaLN-Zero)."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        head_dim: int,
        mlp_ratio: float,
        norm_eps: float,
        convolved_heads: int,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.is_mixed = convolved_heads > 0
        if self.is_mixed:
            self.mixer = Mixer(hidden_size, num_attention_heads, convolved_heads)
        else:
            self.attn = Attention(hidden_size, num_attention_heads, head_dim)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm_eps)
        mlp_size = round(hidden_size * mlp_ratio)
        fc1, fc2 = nn.Linear(hidden_size, mlp_size), nn.Linear(mlp_size, hidden_size)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(approximate="tanh"), fc2=fc2))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, hidden_states: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        modulation = self.adaLN_modulation(conditioning).unsqueeze(1).chunk(6, dim=2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        normed = _modulate(self.norm1(hidden_states), shift_attn, scale_attn)
        heard = self.mixer(normed, grid) if self.is_mixed else self.attn(normed)
        hidden_states = torch.addcmul(hidden_states, gate_attn, heard)
        normed = _modulate(self.norm2(hidden_states), shift_mlp, scale_mlp)
        return torch.addcmul(hidden_states, gate_mlp, self.mlp(normed))


class FinalLayer(nn.Module):
    """[B, N, D] -> [B, N, p·p·C_out]"""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, hidden_states: Tensor, conditioning: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(conditioning).unsqueeze(1).chunk(2, dim=2)
        return self.linear(_modulate(self.norm_final(hidden_states), shift, scale))  # type: ignore[no-any-return]


def _check_convolved(counts: list[int], num_layers: int, num_heads: int, head_dim: int, hidden_size: int) -> None:
    """Refuse numbers of convolved heads that cannot be."""
    if len(counts) != num_layers or not all(0 <= count < num_heads for count in counts):
        raise UserError(
            f"convolved_heads={counts} must be from 0 to {num_heads - 1}, one less than the heads, or a list of "
            f"{num_layers}, one for each block."
        )
    if any(counts) and (head_dim * num_heads != hidden_size or any(count * head_dim % 2 for count in counts)):
        raise UserError(
            f"convolved_heads={counts} of {head_dim} channels each need heads that make up hidden_size={hidden_size}, "
            f"and an even number of channels."
        )


def _modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, hidden_states, 1 + scale)

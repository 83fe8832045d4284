"""The description that most transformers share, as data: where their blocks are, and their embeddings."""

from dataclasses import dataclass
from typing import Any, Literal

from stagepatch.families.base import (
    Backbone,
    Begin,
    Extent,
    Grid,
    Reduce,
    Site,
    Size,
    last_token,
    patches,
    reference_size,
    self_attention,
)
from stagepatch.families.registry import make_backbone


@dataclass(frozen=True)
class Blocks:
    """A list of blocks, with a site before each.

    Args:
        path: of the list in the model.
        image_tokens: where the image lies in the blocks' input; see `Site`.
        attention: path in a block of its self-attention, where prompts can be prepended to it.
        layout: of the blocks' input; see `Site`.
    """

    path: str
    image_tokens: Literal["first", "last", "after_text"] = "first"
    attention: str = ""
    layout: Literal["tokens", "sequence"] = "tokens"


def own_patch_size(model: Any, dimensions: int) -> Size:
    """Of a model's tokens, by its config; of those of videos over time too, 1 where the config does not say."""
    size: Size = model.config.patch_size
    if isinstance(size, int) and dimensions == 3:
        return (model.config.get("patch_size_t") or 1, size, size)
    return size


def image_extent(model: Any, arguments: dict[str, Any]) -> Extent:
    """That of a model that cuts an image or video, [B, C, H, W] or [B, C, F, H, W], into patches."""
    image = arguments["hidden_states"] if "hidden_states" in arguments else arguments["sample"]
    size = image.shape[2:]
    return Extent(patches(size, own_patch_size(model, len(size))))


@dataclass(frozen=True)
class Transformer:
    """Describes the transformers of a class; see `Describe`.

    Their config has `hidden_size`, `dim` or `model_dim`, or `num_attention_heads` and `attention_head_dim`.

    Args:
        blocks: in the order of the forward.
        time_tap, condition_taps, begin, reduce: see `Backbone`.
        optional_taps: condition taps that only some models of the class have.
        sample_size: of the model's input [latent pixels], where its config has none.
        patch_size: of a token, where it is not the config's.
    """

    blocks: tuple[Blocks, ...]
    time_tap: str
    condition_taps: tuple[str, ...] = ()
    optional_taps: tuple[str, ...] = ()
    sample_size: Grid | None = None
    patch_size: Grid | None = None
    begin: Begin = image_extent
    reduce: Reduce = last_token

    def __call__(self, model: Any, sample_size: Size | None = None) -> Backbone:
        config = model.config
        size = reference_size(sample_size, self.sample_size or config.sample_size)
        grid = patches(size, self.patch_size or own_patch_size(model, len(size)))
        widths = (config.get(name) for name in ("hidden_size", "dim", "model_dim"))
        width = next(filter(None, widths), None) or config.num_attention_heads * config.attention_head_dim
        sites: list[Site] = []
        for blocks in self.blocks:
            for number, block in enumerate(model.get_submodule(blocks.path)):
                path = f"{blocks.path}.{number}"
                has_attention = blocks.attention and hasattr(block, blocks.attention.split(".")[0])
                attention = self_attention(block, blocks.attention, path) if has_attention else None
                place = (path, path, len(sites), width, grid, blocks.layout)
                sites.append(Site(*place, image_tokens=blocks.image_tokens, attention=attention))
        taps = (self.time_tap, self.condition_taps, self.optional_taps)
        return make_backbone(model, sites, grid, self.begin, *taps, self.reduce)

"""A description found in a denoiser's own structure, for a class that has no row.

It is taken only where enough is seen: one list of blocks, one embedding of the timestep, and latents that the model
itself cuts into patches. What cannot be seen, that a block's input is the image's tokens alone, is held against what
arrives at each site (`check_found`).
"""

import inspect
import math
from functools import partial
from typing import Any

from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from stagepatch.core import UserError
from stagepatch.families.base import Backbone, Extent, Grid, Site, Size, patches, reference_size, square

_SAMPLES, _TIMESTEPS = ("hidden_states", "sample"), ("timestep", "timesteps")  # of a model's forward
_TOKENS = ("hidden_states", "x")  # of a block's forward
_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}


def describe_structure(model: Any, sample_size: Size | None = None) -> Backbone:
    """The description of a model of no known class; see `Describe`. Its t+c is not looked for.

    Raises:
        UserError: what was found, and what is missing.
    """
    name = type(model).__name__
    lists = _lists_of_blocks(model)
    taps, taps_in_blocks = _time_taps(model, lists)
    patch_size, width = _patches_of(model, lists)
    missing = [*_flaws_of_forward(model), *_flaws_of_lists(lists)]
    if len(taps) != 1:
        where = "it is in the blocks" if taps_in_blocks and not taps else f"{len(taps)} modules may be it"
        missing.append(f"one TimestepEmbedding before the blocks ({where})")
    if not patch_size and not _is_unet(lists):
        missing.append(
            "the grid (no layer cuts latents of the config's in_channels into patches of its patch_size, as where "
            "they come packed)"
        )
    elif len(patch_size) == 2 and "3D" in name:
        missing.append("where a video's frames are (patches are of pictures)")
    if missing:
        found = [f"blocks '{path}' ({len(blocks)} {type(blocks[0]).__name__})" for path, blocks in lists.items()]
        found += [f"timestep's embedding '{path}'" for path in taps]
        found += [f"patches of {patch_size}"] if patch_size else []
        raise UserError(
            f"No description of {name} is known, and its structure does not show enough of one. Found: "
            f"{', '.join(found) or 'nothing'}. Missing: {'; '.join(missing)}. {_way_out(name)}"
        )
    ((path, blocks),) = lists.items()
    grid = patches(_reference(name, sample_size, model.config.get("sample_size"), len(patch_size)), patch_size)
    argument = _parameters(blocks[0])[0]
    sites = [
        Site(f"{path}.{number}", f"{path}.{number}", number, width, grid, argument=argument)
        for number in range(len(blocks))
    ]
    *_, last = (layer for layer in model.get_submodule(taps[0]).modules() if isinstance(layer, nn.Linear))
    begin = partial(_extent, patch_size)
    return Backbone(name, tuple(sites), taps[0], (), last.out_features, grid, begin, is_found=True)


def check_found(model_class: str, site: Site, hidden_states: Any, grid: Grid, rows: int) -> None:
    """Hold what arrives at a site against a description that was found.

    Args:
        grid: of the image in this forward.
        rows: of the timestep's embedding; 0 where it has not been computed yet.

    Raises:
        UserError: other tokens than the image's alone, or an embedding that is not of one row a sample.
    """
    arrived = tuple(hidden_states.shape) if isinstance(hidden_states, Tensor) else type(hidden_states).__name__
    tokens = math.prod(grid)
    if not isinstance(hidden_states, Tensor) or arrived[1:] != (tokens, site.channels):
        raise UserError(
            f"The description of {model_class} was found from its structure, and does not hold: at site '{site.name}' "
            f"arrived {arrived}, where [B, {tokens}, {site.channels}] was expected, an image of "
            f"{' × '.join(map(str, grid))} tokens and nothing else. {_way_out(model_class)}"
        )
    if rows not in (1, len(hidden_states)):
        raise UserError(
            f"The description of {model_class} was found from its structure, and does not hold: its timestep's "
            f"embedding has {rows} rows for the {len(hidden_states)} samples at site '{site.name}'. "
            f"{_way_out(model_class)}"
        )


def _way_out(name: str) -> str:
    return (
        f"Describe it with stagepatch.families.register('{name}', Transformer(...)), which names its blocks, where "
        f"the image's tokens lie and its timestep's embedding, as docs/adding-a-family.md shows."
    )


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _lists_of_blocks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The model's own lists of modules that are more than one layer."""
    lists = {path: child for path, child in model.named_children() if isinstance(child, nn.ModuleList)}
    return {path: blocks for path, blocks in lists.items() if any(any(block.children()) for block in blocks)}


def _is_unet(lists: dict[str, nn.ModuleList]) -> bool:
    return bool({"down_blocks", "up_blocks"} & set(lists))


def _flaws_of_forward(model: nn.Module) -> list[str]:
    """Why a model is none of a sample and a timestep."""
    own = _parameters(model)
    if set(own) & set(_TIMESTEPS) and set(own) & set(_SAMPLES):
        return []
    return [f"a forward of {' or '.join(_SAMPLES)} and {' or '.join(_TIMESTEPS)} (it takes {', '.join(own[:5])})"]


def _flaws_of_lists(lists: dict[str, nn.ModuleList]) -> list[str]:
    """Why the lists are not one whose blocks take tokens."""
    if _is_unet(lists):
        return ["blocks that take tokens (a U-Net's sites are maps, of several sizes; see families/unet.py)"]
    if len(lists) != 1:
        return [f"one list of blocks (of {len(lists)}, order and the places of the image's tokens do not show)"]
    ((path, blocks),) = lists.items()
    classes, first = {type(block).__name__ for block in blocks}, _parameters(blocks[0])[:1]
    if len(classes) > 1:
        return [f"blocks of one class (those of '{path}' are {', '.join(sorted(classes))})"]
    if not set(first) & set(_TOKENS):
        return [f"blocks whose first input is {' or '.join(_TOKENS)} (those of '{path}' take {', '.join(first)})"]
    return []


def _time_taps(model: nn.Module, lists: dict[str, nn.ModuleList]) -> tuple[list[str], bool]:
    """Paths of embeddings that may be the timestep's, of several those so called; whether blocks have such."""
    paths = [path for path, module in model.named_modules() if isinstance(module, TimestepEmbedding)]
    taps = [path for path in paths if path.split(".")[0] not in lists]
    called_so = [path for path in taps if "time" in path.split(".")[-1]]
    return called_so if len(taps) > 1 else taps, len(taps) < len(paths)


def _patches_of(model: Any, lists: dict[str, nn.ModuleList]) -> tuple[Grid, int]:
    """Size of patches and width of tokens, of the one layer outside of the blocks that makes these of those.

    ((), 0) where there is none, or layers that differ, or one that takes latents as they are, which come packed.
    """
    size, channels = model.config.get("patch_size"), model.config.get("in_channels")
    if not size or not channels or not lists:
        return (), 0
    frames = model.config.get("patch_size_t")
    size = (frames, *square(size)) if frames and isinstance(size, int) else square(size)
    own_widths = {length for parameter in next(iter(lists.values()))[0].parameters() for length in parameter.shape}
    embeds = [path for path, module in model.named_modules() if isinstance(module, TimestepEmbedding)]
    found = set()
    for path, layer in model.named_modules():
        if path.split(".")[0] in lists or path.rpartition(".")[0] in embeds:
            continue
        found.add(_width_of(layer, size, channels, own_widths))
    found.discard(0)
    return (size, found.pop()) if len(found) == 1 and -1 not in found else ((), 0)


def _width_of(layer: nn.Module, patch_size: Grid, channels: int, widths: set[int]) -> int:
    """Which of these widths a layer makes of a patch; -1 where it makes one of a latent pixel, 0 where none."""
    if isinstance(layer, _CONVOLUTIONS.get(len(patch_size), ())):
        is_of_patches = layer.in_channels == channels and layer.kernel_size == layer.stride == patch_size
        return int(layer.out_channels) if is_of_patches and layer.out_channels in widths else 0
    if not isinstance(layer, nn.Linear) or layer.out_features not in widths:
        return 0
    if layer.in_features == channels:
        return -1
    return layer.out_features if layer.in_features == channels * math.prod(patch_size) else 0


def _reference(name: str, given: Size | None, own: Any, dimensions: int) -> Grid:
    """The reference size; of a model whose config has none, what is given for all dimensions.

    Raises:
        UserError: none is given.
    """
    default = square(own) if own else ()
    if len(default) == dimensions:
        return reference_size(given, default)
    if given is None or (isinstance(given, int) and dimensions == 3):
        size = "[frames, height, width]" if dimensions == 3 else "[height, width]"
        raise UserError(
            f"{name} is patched as its structure says, but its config does not say how large its samples are: give "
            f"PatchConfig(sample_size={size}), in latent pixels."
        )
    return reference_size(given, (1,) * dimensions)


def _extent(patch_size: Grid, model: Any, arguments: dict[str, Any]) -> Extent:
    """Read off latents [B, C, H, W] or [B, C, F, H, W].

    Raises:
        UserError: something else is given.
    """
    latents = arguments["hidden_states"] if "hidden_states" in arguments else arguments["sample"]
    given = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
    channels = model.config["in_channels"]
    if not isinstance(latents, Tensor) or latents.ndim != 2 + len(patch_size) or latents.shape[1] != channels:
        name = type(model).__name__
        expected = f"[B, {channels}, {'frames, ' if len(patch_size) == 3 else ''}height, width]"
        raise UserError(
            f"The description of {name} was found from its structure, and does not hold: it was given {given}, where "
            f"latents {expected} were expected. {_way_out(name)}"
        )
    return Extent(patches(latents.shape[2:], patch_size))

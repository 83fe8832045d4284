"""Images or videos and captions encoded once: a directory of safetensors files, each whole or absent.

`plan.json` says what the cache is of, `latents-*.safetensors` and `captions-*.safetensors` hold it, and
`index.safetensors`, which comes last, says where each item is. A build that was stopped goes on where it was.
"""

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from stagepatch.checkpoints import sampled_fingerprint
from stagepatch.core import UserError, processes, progress_bar, read_json, read_tensors, write_json, write_tensors
from stagepatch.data.images import Images
from stagepatch.data.latents import encode_images
from stagepatch.data.masks import to_weights

T = TypeVar("T")
IMAGES_PER_FILE = 256
CAPTIONS_PER_FILE = 64
PLAN_NAME, INDEX_NAME = "plan.json", "index.safetensors"

# captions -> condition, each tensor a row per caption; or captions with the pictures that each is about; or pictures
EncodeCaptions = Callable[..., dict[str, Tensor]]
Reads = Literal["captions", "references", "image", "captions and image"]
# A caption, and the item whose pictures it is read with; −1 where captions are read alone
Text = tuple[str, int]


def build_cache(
    directory: Path,
    key: dict[str, str],
    load_images: Callable[[], Images],
    load_vae: Callable[[], Any],
    load_captioner: Callable[[], EncodeCaptions] | None,
    batch_size: int,
    reads: Reads = "captions",
    has_blank_reference: bool = False,
) -> None:
    """Encode what is not yet encoded. Processes under `accelerate launch` share the files.

    Args:
        key: what the cache is of, by part; see `cache_key`.
        load_images: called once where the cache is not whole.
        load_vae: one that gives None keeps pixels.
        load_vae, load_captioner: called once where there is something to encode; what they give is freed after. No
            `load_captioner`: the model takes no captions.
        batch_size: images, or frames of videos, encoded at a time, but a video at least; captions by eights.
        has_blank_reference: a blank one is encoded before each image's own.
        reads: what conditions are made of. Each caption may be encoded with the 'references' of its image, or with the
            image itself ('captions and image'), and so is the empty one; or the 'image' is, in place of captions, and
            None in place of the empty one.

    Raises:
        UserError: the directory holds the cache of something else.
    """
    state = processes()
    if any((directory / name).exists() for name in (PLAN_NAME, INDEX_NAME)):
        _check_key(directory, key)
    if (directory / INDEX_NAME).exists():
        return
    images = load_images()
    if state.is_main_process:
        write_json(directory / PLAN_NAME, key)
    state.wait_for_everyone()
    frames = images.config.num_frames
    batch_size, per_file = max(1, batch_size // frames), max(1, IMAGES_PER_FILE // frames)
    image_files = [file for group in indices_by_size(images.sizes()) for file in _chunks(group, per_file)]
    of_items = _texts(images, reads)
    texts = list(dict.fromkeys(text for each in of_items for text in each))
    if reads in ("captions", "image"):
        texts = [("", -1), *sorted({*texts} - {("", -1)})]
    text_files = _chunks(texts, CAPTIONS_PER_FILE) if load_captioner is not None else []
    with progress_bar(disable=not state.is_main_process) as progress:
        task = progress.add_task(f"{images.noun}s", total=len(images), status="")
        encode_file = partial(_encode_images, images, has_blank_reference, batch_size, partial(progress.advance, task))
        _write_missing(directory, "latents", image_files, load_vae, encode_file)
        if load_captioner is not None:
            task = progress.add_task("captions", total=len(texts), status="")
            encode_file = partial(_encode_captions, images, reads, partial(progress.advance, task))
            _write_missing(directory, "captions", text_files, load_captioner, encode_file)
    state.wait_for_everyone()
    if state.is_main_process:
        lengths = json.dumps(_longest(directory))
        index = _index(images, image_files, texts, of_items)
        write_tensors(directory / INDEX_NAME, index, {"lengths": lengths})
    state.wait_for_everyone()


def cache_key(source_stamps: list[str], preprocessing: dict[str, Any], encoders: dict[str, Path]) -> dict[str, str]:
    """What a cache is of, by part: 'images', 'preprocessing', and each encoder by name.

    Args:
        source_stamps: a string for each image that changes with it.
        encoders: directories of their files.
    """
    key = {
        "images": hashlib.sha256("\n".join(source_stamps).encode()).hexdigest(),
        "preprocessing": json.dumps(preprocessing, sort_keys=True),
    }
    return key | {name: sampled_fingerprint(directory) for name, directory in encoders.items()}


def _check_key(directory: Path, key: dict[str, str]) -> None:
    """Refuse a cache of something else, by name of what differs."""
    plan = read_json(directory / PLAN_NAME)
    changed = [part for part in sorted(set(plan) | set(key)) if plan.get(part) != key.get(part)]
    if "preprocessing" in changed:
        then, now = (json.loads(each["preprocessing"]) for each in (plan, key))
        changed.remove("preprocessing")
        names = [name for name in {**now, **then} if then.get(name) != now.get(name)]
        changed += [f"{name} ({then.get(name)} then, {now.get(name)} now)" for name in names]
    if changed:
        raise UserError(
            f"The cache at '{directory}' is of something else: changed since are {'; '.join(changed)}. Give another "
            f"directory, or delete this one to make it anew."
        )


def indices_by_size(sizes: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Indices of items with images of one size each."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return list(groups.values())


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _write_missing(
    directory: Path,
    kind: str,
    files: list[list[T]],
    load: Callable[[], Any],
    encode: Callable[[Any, list[T]], dict[str, Tensor]],
) -> None:
    """Encode this process's files that are not there; what encodes is loaded for it and freed after."""
    state = processes()
    paths = [(directory / f"{kind}-{number:05d}.safetensors", items) for number, items in enumerate(files)]
    missing = [each for each in paths[state.process_index :: state.num_processes] if not each[0].exists()]
    if missing:
        encoder = load()
        for path, items in missing:
            write_tensors(path, encode(encoder, items))
        del encoder
    gc.collect()


def _encode_images(
    images: Images,
    has_blank_reference: bool,
    batch_size: int,
    advance: Callable[[int], None],
    vae: Any,
    indices: list[int],
) -> dict[str, Tensor]:
    """float16: 'mean', 'std' [B, C, h, w], of videos [B, C, f, h, w], and the same of the mirrored ones; without a VAE
    'mean' alone, the pixels.

    Of masked images 'mask' [B, 1, h, w] too; of edits 'references' [B, R, C, h, w], the means, and those mirrored.
    """
    parts: dict[str, list[Tensor]] = {}
    for batch in _chunks(indices, batch_size):
        items = [images[index] for index in batch]
        pixels = torch.stack([item["image"] for item in items])
        mean = pixels
        if vae is None:
            parts.setdefault("mean", []).append(mean.half())
        else:
            for ending, shown in (("", pixels), ("_flipped", pixels.flip(-1))):
                mean, std = encode_images(vae, shown)
                parts.setdefault(f"mean{ending}", []).append(mean.half().cpu())
                parts.setdefault(f"std{ending}", []).append(std.half().cpu())
        if images.source.has_masks:
            masks = torch.stack([item["mask"] for item in items])
            parts.setdefault("mask", []).append(to_weights(masks, mean).half())
        references = [item["references"] for item in items if "references" in item]
        if has_blank_reference:
            blank = torch.zeros_like(pixels[:1])
            references = [torch.cat([blank, each]) for each in references] or [blank] * len(items)
        if references:
            for ending, given in _encode_references(vae, torch.stack(references)).items():
                parts.setdefault(f"references{ending}", []).append(given.half().cpu())
        advance(len(pixels))
    return {name: torch.cat(values) for name, values in parts.items()}


def _encode_references(vae: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Means [B, R, C, h, w] of what is given with images [B, R, 3, H, W], and of their mirror images."""
    shown = {"": pixels.flatten(0, 1), "_flipped": pixels.flatten(0, 1).flip(-1)}
    return {ending: encode_images(vae, each)[0].unflatten(0, pixels.shape[:2]) for ending, each in shown.items()}


def _texts(images: Images, reads: Reads) -> list[list[Text]]:
    """Of each item; read with pictures, the empty one is the first of each."""
    if reads == "image":
        return [[("", index)] for index in range(len(images))]
    if reads == "captions":
        return [[(caption, -1) for caption in each] for each in images.captions()]
    return [[(caption, index) for caption in ["", *each]] for index, each in enumerate(images.captions())]


def _encode_captions(
    images: Images, reads: Reads, advance: Callable[[int], None], encode: EncodeCaptions, of_file: list[Text]
) -> dict[str, Tensor]:
    """'{row}.{name}' for each tensor of each caption's condition."""
    tensors: dict[str, Tensor] = {}
    for number, texts in enumerate(_chunks(of_file, 8)):
        captions = [caption for caption, _ in texts]
        given: list[list[Any]] = [captions]
        if reads == "references":
            given.append([images[index]["references"] for _, index in texts])
        elif reads == "captions and image":
            given.append([images[index]["image"][None] for _, index in texts])
        elif reads == "image":
            given = [[images[index]["image"] if index >= 0 else None for _, index in texts]]
        with torch.no_grad():
            condition = encode(*given)
        for name, value in condition.items():
            tensors |= {f"{8 * number + row}.{name}": _compact(of_caption) for row, of_caption in enumerate(value)}
        advance(len(texts))
    return tensors


def _compact(value: Tensor) -> Tensor:
    """In float16 where that holds it."""
    half = value.half()
    return half if value.is_floating_point() and bool(half.isfinite().all()) else value


def _longest(directory: Path) -> dict[str, int]:
    """Most rows that each tensor of a caption's condition has."""
    longest: dict[str, int] = {}
    for path in sorted(directory.glob("captions-*.safetensors")):
        for key, value in read_tensors(path)[0].items():
            name = key.split(".", 1)[1]
            longest[name] = max(longest.get(name, 0), len(value))
    return longest


def _index(
    images: Images, image_files: list[list[int]], texts: list[Text], texts_of_items: list[list[Text]]
) -> dict[str, Tensor]:
    """Of each item: where it is, and the number of its caption; where some have several, of all of these in a row.

    Where captions are read with pictures, the number of the empty one too.
    """
    number = {text: place for place, text in enumerate(texts)}
    places = {index: (file, row) for file, indices in enumerate(image_files) for row, index in enumerate(indices)}
    files, rows = zip(*(places[index] for index in range(len(images))), strict=True)
    of_items = [[number[text] for text in each] for each in texts_of_items]
    several: dict[str, Tensor] = {}
    if texts[0][1] >= 0:
        several["null_caption"] = torch.tensor([each[0] for each in of_items])
        of_items = [each[1:] for each in of_items]
    if any(len(each) > 1 for each in of_items):
        several["caption_count"] = torch.tensor([len(each) for each in of_items])
        several["captions"] = torch.tensor([caption for each in of_items for caption in each])
    return several | {
        "size": torch.tensor(images.sizes()),
        "file": torch.tensor(files),
        "row": torch.tensor(rows),
        "label": torch.tensor(images.labels()),
        "key": torch.tensor(images.keys()),
        "caption": torch.tensor([each[0] for each in of_items]),
    }

"""Images and captions encoded once: a directory of safetensors files, each whole or absent.

`plan.json` says what the cache is of, `latents-*.safetensors` and `captions-*.safetensors` hold it, and
`index.safetensors`, which comes last, says where each item is. A build that was stopped goes on where it was.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagepatch.core.errors import UserError
from stagepatch.core.files import read_json, read_tensors, write_json, write_tensors
from stagepatch.core.processes import processes
from stagepatch.data.images import Images
from stagepatch.data.latents import encode_images

IMAGES_PER_FILE = 256
CAPTIONS_PER_FILE = 64
PLAN_NAME, INDEX_NAME = "plan.json", "index.safetensors"

# captions -> condition, each tensor a row per caption
EncodeCaptions = Callable[[list[str]], dict[str, Tensor]]


def build_cache(
    directory: Path,
    images: Images,
    key: dict[str, str],
    load_vae: Callable[[], Any],
    load_captioner: Callable[[], EncodeCaptions] | None,
    batch_size: int,
    on_image: Callable[[int], None] = lambda count: None,
    on_caption: Callable[[int], None] = lambda count: None,
) -> None:
    """Encode what is not yet encoded. Processes under `accelerate launch` share the files.

    Args:
        key: what the cache is of, by part; see `cache_key`.
        load_vae, load_captioner: called once where there is something to encode; what they give is freed after. No
            `load_captioner`: the model takes no captions.
        batch_size: images encoded at a time; captions by eights.
        on_image, on_caption: called with the number done.

    Raises:
        UserError: the directory holds the cache of something else.
    """
    state = processes()
    if state.is_main_process:
        _claim(directory, key)
    state.wait_for_everyone()
    if (directory / INDEX_NAME).exists():
        return
    has_captions = load_captioner is not None
    image_files = _image_files(images)
    captions = ["", *sorted(set(images.captions()) - {""})]
    caption_files = [
        captions[first : first + CAPTIONS_PER_FILE] for first in range(0, len(captions), CAPTIONS_PER_FILE)
    ]

    missing = _missing(directory, "latents", image_files)
    if missing:
        vae = load_vae()
        for path, indices in missing:
            write_tensors(path, _encode_images(vae, images, indices, batch_size, on_image))
        del vae
        gc.collect()
    missing_captions = _missing(directory, "captions", caption_files) if has_captions else []
    if missing_captions:
        assert load_captioner is not None
        encode = load_captioner()
        for path, texts in missing_captions:
            write_tensors(path, _encode_captions(encode, texts, on_caption))
        del encode
    gc.collect()
    state.wait_for_everyone()
    if state.is_main_process:
        lengths = _longest(directory, len(caption_files)) if has_captions else {}
        write_tensors(directory / INDEX_NAME, _index(images, image_files, captions), {"lengths": json.dumps(lengths)})
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
    return key | {name: _fingerprint(directory) for name, directory in encoders.items()}


def check_key(directory: Path, key: dict[str, str]) -> None:
    """Refuse a cache of something else, by name of what differs.

    Raises:
        UserError: it is of something else, or not whole.
    """
    if not (directory / PLAN_NAME).exists():
        raise UserError(f"No cache at '{directory}': make one with stagepatch cache.")
    plan = read_json(directory / PLAN_NAME)
    changed = [part for part in sorted(set(plan) | set(key)) if plan.get(part) != key.get(part)]
    if "preprocessing" in changed:
        then, now = (json.loads(each["preprocessing"]) for each in (plan, key))
        changed.remove("preprocessing")
        changed += [f"{name} ({then.get(name)} then, {now[name]} now)" for name in now if then.get(name) != now[name]]
    if changed:
        raise UserError(
            f"The cache at '{directory}' is of something else: changed since are {'; '.join(changed)}. Give another "
            f"directory, or delete this one to make it anew."
        )


def _claim(directory: Path, key: dict[str, str]) -> None:
    if (directory / PLAN_NAME).exists():
        check_key(directory, key)
    else:
        write_json(directory / PLAN_NAME, key)


def _fingerprint(directory: Path) -> str:
    """Of a directory's files: names, sizes and samples of the content, since weights are many gigabytes."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory)} {size}\n".encode())
        with open(path, "rb") as file:
            for place in range(17):
                file.seek(max(0, size - 65536) * place // 16)
                digest.update(file.read(65536))
    return digest.hexdigest()


def _image_files(images: Images) -> list[list[int]]:
    """Indices of each file's images, all of one size."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(images.sizes()):
        by_size.setdefault(size, []).append(index)
    return [
        group[first : first + IMAGES_PER_FILE]
        for group in by_size.values()
        for first in range(0, len(group), IMAGES_PER_FILE)
    ]


def _missing(directory: Path, name: str, files: list[Any]) -> list[tuple[Path, Any]]:
    """This process's files that are not there."""
    state = processes()
    paths = [(directory / f"{name}-{number:05d}.safetensors", content) for number, content in enumerate(files)]
    return [
        (path, content) for path, content in paths[state.process_index :: state.num_processes] if not path.exists()
    ]


def _encode_images(
    vae: Any, images: Images, indices: list[int], batch_size: int, on_image: Callable[[int], None]
) -> dict[str, Tensor]:
    """float16: 'mean', 'std' [B, C, h, w], and the same of the mirrored images."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("mean", "std", "mean_flipped", "std_flipped")}
    for first in range(0, len(indices), batch_size):
        pixels = torch.stack([images[index]["image"] for index in indices[first : first + batch_size]])
        for ending, shown in (("", pixels), ("_flipped", pixels.flip(-1))):
            mean, std = encode_images(vae, shown)
            parts[f"mean{ending}"].append(mean.half().cpu())
            parts[f"std{ending}"].append(std.half().cpu())
        on_image(len(pixels))
    return {name: torch.cat(values) for name, values in parts.items()}


def _encode_captions(
    encode: EncodeCaptions, captions: list[str], on_caption: Callable[[int], None]
) -> dict[str, Tensor]:
    """'{row}.{name}' for each tensor of each caption's condition."""
    tensors = {}
    for first in range(0, len(captions), 8):
        texts = captions[first : first + 8]
        with torch.no_grad():
            condition = encode(texts)
        for name, value in condition.items():
            for row, of_caption in enumerate(value):
                tensors[f"{first + row}.{name}"] = _compact(of_caption)
        on_caption(len(texts))
    return tensors


def _compact(value: Tensor) -> Tensor:
    """In float16 where that holds it."""
    half = value.half()
    return half if value.is_floating_point() and bool(half.isfinite().all()) else value


def _longest(directory: Path, files: int) -> dict[str, int]:
    """Most rows that each tensor of a caption's condition has."""
    longest: dict[str, int] = {}
    for number in range(files):
        tensors, _ = read_tensors(directory / f"captions-{number:05d}.safetensors")
        for key, value in tensors.items():
            name = key.split(".", 1)[1]
            longest[name] = max(longest.get(name, 0), len(value))
    return longest


def _index(images: Images, image_files: list[list[int]], captions: list[str]) -> dict[str, Tensor]:
    number = {caption: place for place, caption in enumerate(captions)}
    places = {index: (file, row) for file, indices in enumerate(image_files) for row, index in enumerate(indices)}
    files, rows = zip(*(places[index] for index in range(len(images))), strict=True)
    return {
        "size": torch.tensor(images.sizes()),
        "file": torch.tensor(files),
        "row": torch.tensor(rows),
        "label": torch.tensor(images.labels()),
        "caption": torch.tensor([number[caption] for caption in images.captions()]),
    }

"""WebDataset tar shards, with random access."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from stagepatch.core import UserError, as_user_error
from stagepatch.data.source import Source, as_captions

_IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Sample:
    """Members of a shard that share a name up to the first dot.

    Args:
        key: that name, with its folder.
        members: offset and size [bytes] in the shard, by extension.
    """

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]


class WebDatasetSource(Source):
    """Samples of tar shards that have an image (jpg, jpeg, png or webp).

    The caption is the member .txt, else 'caption' or 'text' in .json: a string, or a list of several. The label is
    .cls, else 'label' in .json.

    Args:
        path: a directory of *.tar, or one .tar file; not compressed.

    Raises:
        UserError: no shard, no image in them, or a shard that is not whole.
    """

    def __init__(self, path: Path) -> None:
        shards = find_shards(path)
        if not shards:
            raise UserError(f"No tar shard at '{path}': give a directory of *.tar, or one .tar file.")
        samples = [sample for shard in shards for sample in read_index(shard)]
        self.samples = [sample for sample in samples if _image_extension(sample)]
        if not self.samples:
            raise UserError(f"No image in '{path}': looked in its tar shards for {', '.join(_IMAGES)}.")

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> Image.Image:
        sample = self.samples[index]
        return Image.open(io.BytesIO(_read(sample, _image_extension(sample))))

    def label(self, index: int) -> int:
        sample = self.samples[index]
        value = _read_text(sample, "cls").strip() if "cls" in sample.members else _read_json(sample).get("label", 0)
        try:
            label = int(value)
        except (TypeError, ValueError):
            label = -1
        if label < 0:
            raise UserError(f"The label of {self.name(index)} is {value!r}: a label is a whole number from 0.")
        return label

    def captions(self, index: int) -> list[str]:
        sample = self.samples[index]
        if "txt" in sample.members:
            return [_read_text(sample, "txt").strip()]
        values = _read_json(sample)
        caption = values.get("caption", values.get("text"))
        with as_user_error(f"The caption of {self.name(index)} is {caption!r}", ValueError):
            return as_captions(caption)

    def name(self, index: int) -> str:
        sample = self.samples[index]
        return f"'{sample.key}.{_image_extension(sample)}' in '{sample.shard}'"

    def key(self, index: int) -> str:
        sample = self.samples[index]
        return f"{sample.shard.name}/{sample.key}"

    def stamp(self) -> list[str]:
        shards = {sample.shard for sample in self.samples}
        stats = {shard: shard.stat() for shard in shards}
        prefixes = {shard: f"{shard.name}:{stat.st_size}:{stat.st_mtime_ns}" for shard, stat in stats.items()}
        return [f"{prefixes[sample.shard]}:{sample.key}" for sample in self.samples]


def find_shards(path: Path) -> list[Path]:
    """The .tar file, or those in the directory by name."""
    if path.is_dir():
        return sorted(shard for shard in path.glob("*.tar") if shard.is_file())
    return [path] if path.suffix == ".tar" and path.is_file() else []


def read_index(shard: Path) -> list[Sample]:
    """Samples of a shard, in its order, from its members' headers.

    Raises:
        UserError: the shard is truncated, or not an uncompressed tar.
    """
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                if member.isreg() and not member.issparse() and stem:  # the size of a sparse one is not in the shard
                    members = groups.setdefault(str(path.with_name(stem)), {})
                    members[extension.lower()] = (member.offset_data, member.size)
            end = tar.offset
        with open(shard, "rb") as file:
            file.seek(end)
            # Where the last member ends, tarfile takes the end of the file for the end of the archive.
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError("no end-of-archive block")
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(
            f"'{shard}' is not a whole, uncompressed tar ({error}): it may be truncated; fetch or write it again."
        ) from error
    return [Sample(shard, key, members) for key, members in groups.items()]


def _image_extension(sample: Sample) -> str:
    return next((extension for extension in _IMAGES if extension in sample.members), "")


def _read(sample: Sample, extension: str) -> bytes:
    offset, size = sample.members[extension]
    with open(sample.shard, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise UserError(f"'{sample.shard}' was cut short since it was opened: fetch or write it again.")
    return content


def _read_text(sample: Sample, extension: str) -> str:
    with as_user_error(f"'{sample.key}.{extension}' in '{sample.shard}' is not UTF-8 text", UnicodeDecodeError):
        return _read(sample, extension).decode()


def _read_json(sample: Sample) -> dict[str, Any]:
    if "json" not in sample.members:
        return {}
    with as_user_error(f"'{sample.key}.json' in '{sample.shard}' is not JSON", json.JSONDecodeError):
        values = json.loads(_read_text(sample, "json"))
    return values if isinstance(values, dict) else {}

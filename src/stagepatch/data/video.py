"""Clips of videos: some frames of each, decoded by PyAV, as images are otherwise."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from stagepatch.core import UserError, as_user_error
from stagepatch.data import preprocess
from stagepatch.data.config import DataConfig
from stagepatch.data.folder import VIDEOS, FolderSource
from stagepatch.data.images import Images
from stagepatch.data.source import BROKEN


class VideoFolder(FolderSource):
    """Videos under a folder, with captions as `FolderSource` finds them; its pictures are left alone."""

    noun: ClassVar[str] = "video"
    suffixes: ClassVar[set[str]] = VIDEOS


class Clips(Images):
    """Items as those of `Images`, but "image" [C, F, H, W]: a clip of a video.

    A video that is too short for one is left out like one that cannot be read.

    Args:
        source: of videos.
        config: frames of a clip, how many a second, and clips of a video besides what `Images` takes.

    Raises:
        UserError: see `Images`; or PyAV is not installed.
    """

    noun: ClassVar[str] = "video"
    source: VideoFolder

    def __init__(self, source: VideoFolder, config: DataConfig) -> None:
        self._times: list[list[int]] = []
        super().__init__(source, config)

    def _look_at(self, index: int) -> tuple[tuple[int, int], int]:
        path, config = self.source.paths[index], self.config
        times, end, unit = frame_times(path)
        clips = choose_frames(times, end, config.num_frames, Fraction(config.fps) * unit, config.num_clips)
        if not clips:
            rate = f" at {config.fps:g} a second" if config.fps else ""
            length = float((end - times[0]) * unit) if times else 0.0
            raise ValueError(f"{len(times)} frames in {length:.2f} s, too short for {config.num_frames}{rate}")
        (first,) = read_frames(path, times[:1])
        self._times += [[times[number] for number in clip] for clip in clips]
        return (first.height, first.width), len(clips)

    def _check_reference(self, path: Path) -> None:
        """It is read with its clip."""

    def _pixels(self, item: int, size: tuple[int, int]) -> Tensor:
        return self._clip(self.source.paths[self._indices[item]], item, size)

    def _reference(self, path: Path, item: int, size: tuple[int, int]) -> Tensor:
        """The frames of another video that are shown at the same times.

        Raises:
            UserError: it lacks some.
        """
        with as_user_error(f"'{path}' does not go with the video beside it, frame by frame", *BROKEN):
            return self._clip(path, item, size)

    def _clip(self, path: Path, item: int, size: tuple[int, int]) -> Tensor:
        frames = read_frames(path, self._times[item])
        mode = "L" if self.config.channels == 1 else "RGB"
        cropped = [self._cropped(frame.convert(mode), size) for frame in frames]
        return torch.stack([preprocess.to_tensor(frame) for frame in cropped], dim=1)


def choose_frames(times: Sequence[int], end: int, num_frames: int, rate: Fraction, num_clips: int) -> list[list[int]]:
    """Numbers of the frames of each clip; no clip where the video is too short for one.

    A clip begins with a frame, and goes on with what is shown 1/rate, 2/rate, … after it. Where a video has fewer
    frames than that, they come again.

    Args:
        times: when each frame is first shown, rising.
        end: when the last one is no longer.
        rate: frames in a unit of these times; 0 takes all, one after the other.
        num_clips: the first at the beginning, the last at the end, the others evenly between; less those that are
            the same.
    """
    if not times:
        return []
    # Times are rounded to whole units: a frame may come that much later than it should.
    late = min(Fraction(1), Fraction(end - times[0], 4 * len(times)))
    steps = [number / rate + late for number in range(num_frames)] if rate else []
    last = bisect_left(times, end - steps[-1]) - 1 if rate else len(times) - num_frames
    if last < 0:
        return []
    firsts = sorted({last * number // max(1, num_clips - 1) for number in range(num_clips)})
    if not rate:
        return [list(range(first, first + num_frames)) for first in firsts]
    return [[bisect_right(times, times[first] + step) - 1 for step in steps] for first in firsts]


def frame_times(path: Path) -> tuple[list[int], int, Fraction]:
    """When each frame of a video is first shown, when the last one is no longer, and the unit of these [seconds].

    Nothing is decoded.

    Raises:
        ValueError: it cannot be read.
        UserError: PyAV is not installed.
    """
    with _opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard]
        ends = {packet.pts: packet.pts + (packet.duration or 1) for packet in packets}
        return sorted(ends), ends[max(ends)] if ends else 0, stream.time_base


def read_frames(path: Path, times: Sequence[int]) -> list[Image.Image]:
    """The frames that are first shown at these times, turned as the video says; decoded from its beginning.

    Raises:
        ValueError: it cannot be read, or has not all of them.
        UserError: PyAV is not installed.
    """
    wanted, found = set(times), dict[int, Image.Image]()
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            if frame.pts in wanted:
                found[frame.pts] = frame.to_image().rotate(frame.rotation, expand=True)
                if len(found) == len(wanted):
                    return [found[time] for time in times]
    raise ValueError(f"{len(wanted) - len(found)} of {len(wanted)} frames cannot be decoded")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A file and its first stream of pictures; PyAV's errors are ValueErrors."""
    try:
        import av
    except ImportError as error:
        raise UserError("Videos are read by the package av (PyAV): pip install 'stagepatch[video]'") from error
    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise ValueError("there are no pictures in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(error.strerror or str(error)) from error

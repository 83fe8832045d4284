"""Images as they are, to be measured: none is cropped, so all must be of one size."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image

from stagepatch.core import UserError
from stagepatch.data import preprocess
from stagepatch.data.config import DataConfig
from stagepatch.data.images import Images
from stagepatch.data.source import Source

_CHANNELS = {"L": 1, "RGB": 3}
_MODES = {"L": "grey", "RGB": "in colour", "RGBA": "in colour with transparency", "P": "with a palette"}


class Pictures(Images):
    """`Images` of which nothing is changed that was not asked for.

    Args:
        config: image_size 0 leaves them at their own size, and 0 channels at their own mode, grey or colour.

    Raises:
        UserError: images of several sizes, or of several modes, or one that is neither; see also `Images`.
    """

    def __init__(self, source: Source, config: DataConfig) -> None:
        self._first_of_size: dict[tuple[int, int], int] = {}
        self._first_of_mode: dict[str, int] = {}
        self._is_cropped = config.image_size > 0
        super().__init__(source, replace(config, image_size=config.image_size or 1))
        if not self._is_cropped:
            self._refuse_several_sizes()
        if not config.channels:
            self._refuse_several_modes()
        channels = config.channels or _CHANNELS[next(iter(self._first_of_mode))]
        self.config = replace(config, channels=channels)

    def _look_at(self, index: int) -> tuple[tuple[int, int], int]:
        with self.source.load(index) as file:
            size, mode = preprocess.upright_size(file), file.mode
            file.verify()
        self._first_of_size.setdefault(size, index)
        self._first_of_mode.setdefault(mode, index)
        return size, 1

    def _cropped(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        return super()._cropped(image, size) if self._is_cropped else image

    def _refuse_several_sizes(self) -> None:
        if len(self._first_of_size) > 1:
            each = [
                f"'{self.source.name(index)}' has {width}×{height} pixels"
                for (height, width), index in self._first_of_size.items()
            ]
            raise UserError(
                f"Images of {len(each)} sizes: {each[0]}, {each[1]}. --data.image_size=256 resizes all to so many, "
                f"cropped to squares."
            )

    def _refuse_several_modes(self) -> None:
        modes = self._first_of_mode
        if len(modes) > 1 or not {*modes} <= {*_CHANNELS}:
            named = {self.source.name(index): _MODES.get(mode, f"of mode {mode}") for mode, index in modes.items()}
            each = ", ".join(f"'{name}' is {mode}" for name, mode in named.items())
            raise UserError(f"Images are measured all grey or all in colour: {each}. --data.channels=3 makes all so.")

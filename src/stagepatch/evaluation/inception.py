"""The Inception-v3 that FID is defined by: TensorFlow's of 2015-12-05, with the parameter names of its PyTorch port.

It is not the Inception-v3 of torchvision and timm, and transformers has none: average pools leave the padding out, the
last block has a max pool in place of an average one, and there are 1,008 classes. pytorch-fid and torch-fidelity
distribute the converted weights (`pt_inception-2015-12-05-6726825d.pth`, `weights-inception-2015-12-05-6726825d.pth`),
which are loaded as they are. `make test-inception` holds it against torch-fidelity's, layer by layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stagepatch.core import UserError, as_user_error

SIZE = 299
VARIABLE = "STAGEPATCH_INCEPTION"
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
_SPATIAL = 7
Layer = tuple[Any, ...]


class Conv(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        # What keeps the size is padded, but for the convolutions of the stem and those with a stride.
        self.conv = nn.Conv2d(channels, out, (height, width), stride, (height // 2, width // 2), bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)
        if stride > 1:
            self.conv.padding = (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches of convolutions side by side, and a pool.

    Args:
        channels: in.
        branches: of each, its layers: name, channels out, kernel and, where it is not 1, stride. Layers of one name
            with 'a' and 'b' at its end stand beside each other.
        pool: 'average' or 'max', with a convolution of so many channels, or 0 for a max pool of stride 2 without one.
    """

    def __init__(self, channels: int, branches: list[list[Layer]], pool: str, pool_channels: int) -> None:
        super().__init__()
        self.pool, self.branches = pool, [[layer[0] for layer in branch] for branch in branches]
        for branch in branches:
            width = channels
            for name, *layer in branch:
                self.add_module(name, Conv(width, *layer))
                width = width if name.endswith("a") else layer[0]
        if pool_channels:
            self.branch_pool = Conv(channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for branch in self.branches:
            value = x
            for name in branch:
                if name.endswith("a"):
                    found.append(self.get_submodule(name)(value))
                else:
                    value = self.get_submodule(name)(value)
            found.append(value)
        return torch.cat([*found, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if not hasattr(self, "branch_pool"):
            return F.max_pool2d(x, 3, 2)
        average = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # as TensorFlow's, without the padding
        pooled: Tensor = self.branch_pool(average if self.pool == "average" else F.max_pool2d(x, 3, 1, 1))
        return pooled


def _block_a(channels: int, pool: int) -> Block:
    triple = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]
    pair = [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)]
    return Block(channels, [[("branch1x1", 64, 1)], pair, triple], "average", pool)


def _block_b(channels: int) -> Block:
    triple = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)]
    return Block(channels, [[("branch3x3", 384, 3, 2)], triple], "max", 0)


def _block_c(channels: int, width: int) -> Block:
    row, column = (1, 7), (7, 1)
    pair = [("branch7x7_1", width, 1), ("branch7x7_2", width, row), ("branch7x7_3", 192, column)]
    long: list[Layer] = [("branch7x7dbl_1", width, 1)]
    long += [(f"branch7x7dbl_{place}", width, kernel) for place, kernel in ((2, column), (3, row), (4, column))]
    return Block(channels, [[("branch1x1", 192, 1)], pair, [*long, ("branch7x7dbl_5", 192, row)]], "average", 192)


def _block_d(channels: int) -> Block:
    pair = [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)]
    long: list[Layer] = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1))]
    return Block(channels, [pair, [*long, ("branch7x7x3_4", 192, 3, 2)]], "max", 0)


def _block_e(channels: int, pool: str) -> Block:
    wide = [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]
    long: list[Layer] = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)]
    long += [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]
    return Block(channels, [[("branch1x1", 320, 1)], wide, long], pool, 192)


class Inception(nn.Module):
    """Images [B, 3, 299, 299] of 0 to 255 to `features` [B, 2048], `spatial` [B, 2023] and `logits` [B, 1008].

    `spatial` is what sFID is of (arXiv 2103.03841, as ADM measures it): the first seven channels of the sixth mixed
    block's first branch, row by row. `logits` are without the bias, as Inception scores are computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _unpadded(Conv(3, 32, 3, 2))
        self.Conv2d_2a_3x3 = _unpadded(Conv(32, 32, 3))
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _unpadded(Conv(80, 192, 3))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = _block_b(288), _block_c(768, 128), _block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _block_c(768, 160), _block_c(768, 192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _block_d(768), _block_e(1280, "average"), _block_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """The three outputs of pixels in 0 … 255, which need not be whole numbers."""
        x = (pixels - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :_SPATIAL]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))
        features = self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))
        return {
            "features": features,
            "spatial": spatial.permute(0, 2, 3, 1).flatten(1),
            "logits": features @ self.fc.weight.mT,
        }


def _unpadded(layer: Conv) -> Conv:
    layer.conv.padding = (0, 0)
    return layer


def resize_as_tensorflow(pixels: Tensor, size: int = SIZE) -> Tensor:
    """Bilinear without antialiasing, its corners not aligned: TensorFlow 1's, which legacy FIDs are of.

    Args:
        pixels: [B, C, H, W], floating point.
    """

    def places(length: int) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.arange(size, device=pixels.device) * torch.tensor(length / size, device=pixels.device)
        low = exact.long()
        return low, (low + 1).clamp(max=length - 1), (exact - low).to(pixels)

    top, bottom, down = places(pixels.shape[2])
    left, right, across = places(pixels.shape[3])
    upper, lower = pixels[:, :, top], pixels[:, :, bottom]
    rows = [row[..., left] + (row[..., right] - row[..., left]) * across for row in (upper, lower)]
    return rows[0] + (rows[1] - rows[0]) * down.unsqueeze(1)


def find_weights(path: str = "") -> Path:
    """The weights' file: the one that is named, $STAGEPATCH_INCEPTION, or one that another package has downloaded.

    Raises:
        UserError: there is none.
    """
    named = path or os.environ.get(VARIABLE, "")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [Path(named)] if named else [cache / name for name in FILES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    where = f"'{named}' is no file" if named else f"none is in '{cache}'"
    raise UserError(
        f"The weights of FID's Inception-v3 are not here ({where}). Download '{FILES[0]}' (releases of "
        f"mseitzer/pytorch-fid on GitHub, 91 MB) into that folder, or name its place: ${VARIABLE} or inception:/path."
    )


def load_inception(path: str = "") -> Inception:
    """The network with its weights, which are read without unpickling code.

    Raises:
        UserError: no such file, or it holds something else.
    """
    file = find_weights(path)
    with as_user_error(f"'{file}' does not hold Inception-v3's weights", Exception):
        state: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        model = Inception()
        # Counters of batches, which some of the files lack, are of training alone.
        counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("batches_tracked")}
        model.load_state_dict({**counters, **state})
    return model.eval()

"""Makes the bundled 16×16 copy of Fashion-MNIST from the four published files.

    apt install dataset-fashion-mnist && python experiments/make_fashion.py

A path to the files may be given, where they are not Debian's. Resized by Pillow's antialiased bicubic filter, to 128
grey levels, which keeps the copy under 10 MB.
"""

import gzip
import hashlib
import lzma
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from stagepatch.core import write_atomically
from stagepatch.data.fashion import ASSET, SIZE

_HASHES = {
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "pb": 0}]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist")
    images, labels = [], []
    for name in ("train", "t10k"):
        images.append(_read(folder / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28))
        labels.append(_read(folder / f"{name}-labels-idx1-ubyte.gz", 8))
    small = [_shrink(image) for image in np.concatenate(images)]
    data = np.concatenate([np.stack(small).flatten(), *labels])
    packed = lzma.compress(data.tobytes(), filters=_FILTERS)
    write_atomically(ASSET, lambda path: path.write_bytes(packed))
    print(ASSET, ASSET.stat().st_size, "bytes, sha256", hashlib.sha256(ASSET.read_bytes()).hexdigest())


def _read(path: Path, header: int) -> np.ndarray:
    data = gzip.decompress(path.read_bytes())
    if hashlib.sha256(data).hexdigest() != _HASHES[path.name]:
        raise SystemExit(f"'{path}' is not the published file.")
    return np.frombuffer(data, np.uint8, offset=header)


def _shrink(image: np.ndarray) -> np.ndarray:
    small = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return (small // 2 * 2 + small // 128).astype(np.uint8)  # 128 levels from 0 to 255


if __name__ == "__main__":
    main()

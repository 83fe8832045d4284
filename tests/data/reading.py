"""What tests of the sources share: flat images, which are told apart by their values."""

import io

from PIL import Image

from stagepatch.data import DataConfig, load_dataset


def load(path, **choices):
    """Small grey images, unless other is chosen."""
    return load_dataset(DataConfig(source=str(path), **{"image_size": 8, "channels": 1, **choices}))


def picture(value, size=(8, 8)):
    return Image.new("RGB", size, (value, value, value))


def encoded(value, kind="PNG"):
    buffer = io.BytesIO()
    picture(value).save(buffer, kind)
    return buffer.getvalue()


def shown(item):
    """The value of a flat image, which tells which one an item shows."""
    return round((float(item["image"].mean()) + 1) * 127.5)


def summary(dataset):
    """Value, label and caption of every item."""
    items = [dataset[index] for index in range(len(dataset))]
    return [(shown(item), item["label"], item["caption"]) for item in items]

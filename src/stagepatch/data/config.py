"""Where images come from."""

from dataclasses import dataclass, field
from typing import Literal

from stagepatch.core import UserError, check_numbers

IMAGE_SIZE = 256  # where no model in pixels says otherwise


@dataclass
class TagsConfig:
    """Captions of tags, separated by commas: variants of each are encoded with the cache, and each step draws one.

    Args:
        variants: of each caption, the first being itself; 1 leaves captions as they are.
        shuffle: the others have their tags in another order.
        dropout: probability that the others lack a tag, of each tag. Whole captions are dropped by
            training.label_dropout.
        keep_tokens: so many tags at the start stay where they are, and are never left out.
    """

    variants: int = 1
    shuffle: bool = True
    dropout: float = 0.0
    keep_tokens: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, "data.tags.", variants=1, dropout=(0, 1), keep_tokens=0)


@dataclass
class SourceConfig:
    """One of several data sets.

    Args:
        source: as data.source, none of the bundled ones.
        repeats: how often an epoch shows each of its items.
        masks: as data.masks.
        references: as data.references.
    """

    source: str = ""
    repeats: int = 1
    masks: str = ""
    references: str = ""

    def __post_init__(self) -> None:
        check_numbers(self, "data.sources: ", repeats=1)


@dataclass
class DataConfig:
    """Training images.

    Args:
        source: bundled data, 'digits' (scikit-learn's at 8×8, two thirds to train on) or 'fashion' (Fashion-MNIST at
            16×16); a folder of images, a dataset of Hugging Face `datasets` (a saved one's directory, a .parquet file,
            or a name on the Hub, or name@revision), WebDataset tar shards (their directory, or one .tar file), or an
            array of images: a .npz, a .npy or an IDX file as MNIST's, with labels beside it.
        sources: several data sets in place of `source`, such as [{source: A, repeats: 10}, {source: B}]; all else here
            is for each of them.
        image_size: height and width [pixels] to which images are resized and centre-cropped; with crop 'buckets',
            an image has at most that square's area. 0 is the model's own size where it works in pixels, and 256 where
            it has a VAE.
        num_frames: above 1, `source` is a folder of videos, to train a model of videos on clips of so many frames, as
            many as its VAE takes: of Wan, CogVideoX and HunyuanVideo 4·k + 1, of Mochi 6·k + 1, of LTX 8·k + 1.
        fps: frames of a clip a second, by the video's own clock; 0 takes every frame.
        num_clips: of a video, spread from its beginning to its end; fewer where it has no room for as many.
        channels: 3 for colour, 1 for grey; 0 is as the model's images have.
        horizontal_flip: mirror each image with probability ½ (DMP: on; never for the bundled data).
        num_workers: loading processes beside the main one.
        format: what `source` is; 'auto' looks at what lies there. The Hub is asked only with 'datasets'.
        split: of a Hugging Face dataset that has splits.
        image_column: of a Hugging Face dataset, or the name of an array in a .npz.
        caption_column: of a Hugging Face dataset, or of a folder's metadata.jsonl or metadata.csv; '' for no captions.
            Strings, or lists of them, as COCO's five: each step then draws one, and samples take the first. A folder
            without metadata has them in captions*.json, as COCO does, or in a .txt beside each image, one a line.
        label_column: of a Hugging Face dataset, or the name of an array in a .npz; '' for no labels.
        crop: 'center' makes squares; 'buckets' keeps an image's shape as near as multiples of `bucket_step` can.
        bucket_step: what height and width of a bucket are multiples of [pixels].
        masks: folder of masks for a folder of images, by the images' paths; without, an image's mask is
            NAME-masklabel.png beside it. White counts fully in the loss, black not at all.
        references: for a model that edits pictures, the folder of those that the images are edits of, by the images'
            paths; without, they are NAME-source.png beside NAME.png, then NAME-source2.png, ….
        tags: variants of captions that are tags; for a model with a cache.
        max_broken: images that cannot be read, and videos that are too short, are named and left out, up to so many.
        in_memory: training in pixels, images of one size are decoded once and kept as bytes, if all of them take at
            most so much memory [GiB, of each process]; 0 reads the files at every step.
        held_out: share of the images that is not trained on, chosen by a hash of their names; see
            `validation.loss_every`. The bundled data have images of their own for that, whatever this says.
    """

    source: str = "digits"
    sources: list[SourceConfig] = field(default_factory=list)
    image_size: int = 0
    num_frames: int = 1
    fps: float = 0.0
    num_clips: int = 1
    channels: int = 0
    horizontal_flip: bool = False
    num_workers: int = 0
    format: Literal["auto", "folder", "datasets", "webdataset", "arrays"] = "auto"
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    label_column: str = "label"
    crop: Literal["center", "buckets"] = "center"
    bucket_step: int = 64
    masks: str = ""
    references: str = ""
    tags: TagsConfig = field(default_factory=TagsConfig)
    max_broken: int = 10
    in_memory: float = 2.0
    held_out: float = 0.0

    def __post_init__(self) -> None:
        """Name several data sets in `source`, and refuse numbers that make no sense.

        Raises:
            UserError: they are given beside another `source`, or numbers make no sense.
        """
        amounts = dict.fromkeys(("image_size", "num_workers", "max_broken", "in_memory", "fps", "channels"), 0)
        counts = dict.fromkeys(("num_frames", "num_clips", "bucket_step"), 1)
        check_numbers(self, "data.", **amounts, **counts, held_out=(0, 1))
        if not self.sources:
            return
        named = ", ".join(each.source for each in self.sources)
        if self.source not in ("digits", named) or self.masks or self.references:
            raise UserError(
                "data.sources stands in place of data.source, data.masks and data.references: give the one or the "
                "other."
            )
        for each in self.sources:
            if not each.source:
                raise UserError("data.sources: each names a source.")
        self.source = named

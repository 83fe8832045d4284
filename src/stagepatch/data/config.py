"""Where images come from."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class DataConfig:
    """Training images.

    Args:
        source: bundled data, 'digits' (scikit-learn's at 8×8, two thirds to train on) or 'fashion' (Fashion-MNIST at
            16×16); a folder of images, a dataset of Hugging Face `datasets` (a saved one's directory, or a name on the
            Hub), or WebDataset tar shards (their directory, or one .tar file).
        image_size: height and width [pixels] to which images are resized and centre-cropped; with crop 'buckets',
            an image has at most that square's area.
        num_frames: above 1, `source` is a folder of videos, to train a model of videos on clips of so many frames, as
            many as its VAE takes: of Wan, CogVideoX and HunyuanVideo 4·k + 1, of Mochi 6·k + 1, of LTX 8·k + 1.
        fps: frames of a clip a second, by the video's own clock; 0 takes every frame.
        num_clips: of a video, spread from its beginning to its end; fewer where it has no room for as many.
        channels: 3 for colour, 1 for grey; 0 is as the model's images have.
        horizontal_flip: mirror each image with probability ½ (DMP: on; never for the bundled data).
        num_workers: loading processes beside the main one.
        format: what `source` is; 'auto' looks at what lies there. The Hub is asked only with 'datasets'.
        split: of a Hugging Face dataset that has splits.
        image_column: of a Hugging Face dataset.
        caption_column: of a Hugging Face dataset, or of a folder's metadata.jsonl or metadata.csv; '' for no captions.
            Strings, or lists of them, as COCO's five: each step then draws one, and samples take the first. A folder
            without metadata has them in captions*.json, as COCO does, or in a .txt beside each image, one a line.
        label_column: of a Hugging Face dataset; '' for no labels.
        crop: 'center' makes squares; 'buckets' keeps an image's shape as near as multiples of `bucket_step` can.
        bucket_step: what height and width of a bucket are multiples of [pixels].
        max_broken: images that cannot be read, and videos that are too short, are named and left out, up to so many.
        held_out: share of the images that is not trained on, chosen by a hash of their names; see
            `validation.loss_every`. The bundled data have images of their own for that, whatever this says.
    """

    source: str = "digits"
    image_size: int = 256
    num_frames: int = 1
    fps: float = 0.0
    num_clips: int = 1
    channels: int = 0
    horizontal_flip: bool = False
    num_workers: int = 0
    format: Literal["auto", "folder", "datasets", "webdataset"] = "auto"
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    label_column: str = "label"
    crop: Literal["center", "buckets"] = "center"
    bucket_step: int = 64
    max_broken: int = 10
    held_out: float = 0.0

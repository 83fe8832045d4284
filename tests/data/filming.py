"""What tests of videos share: films of given pictures, written by PyAV."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image

from tests.data.reading import picture


def film(path, pictures, rate=24, codec="ffv1", pix_fmt="bgr0", times=None, rotation=0, **options):
    """A video of pictures, or of flat ones of these values, at a rate or at these times [units of 1/rate s]; by
    default without loss.
    """
    pictures = [each if isinstance(each, Image.Image) else picture(each, (16, 16)) for each in pictures]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        (stream.width, stream.height), stream.pix_fmt = pictures[0].size, pix_fmt
        stream.codec_context.time_base = Fraction(1, rate)
        if rotation:
            stream.set_display_rotation(rotation)
        for time, each in zip(times or range(len(pictures)), pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(np.asarray(each), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

"""Crops and buckets."""

from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.core.errors import UserError
from stagepatch.data import bucket_sizes, center_crop_adm, fit_to_bucket, nearest_bucket, to_tensor


def pixels(image):
    return np.asarray(image).astype(int)


def crop(image, size=8):
    return pixels(center_crop_adm(Image.fromarray(image), size))


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (8, 8), (9, 8), (8, 11)])
def test_of_the_right_smaller_side_the_centre_is_cut_out_as_it_is(shape):
    # Nothing is resized, so the crop is those very pixels; of an odd margin the larger half is right and below.
    image = noise(*shape)
    top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
    assert (crop(image) == image[top : top + 8, left : left + 8]).all()


def test_halving_is_by_means_of_four_pixels():
    image = noise(16, 24)
    means = image.reshape(8, 2, 12, 2).mean((1, 3))[:, 2:10]
    # Pillow rounds after each of the two directions.
    assert abs(crop(image) - means).max() <= 1


def test_halving_repeats_and_bicubic_does_the_rest():
    # 44 → 22 → 11 by halves, as 11 is less than twice 8; then 8 by bicubic.
    image = noise(44, 44)
    halves = Image.fromarray(image.reshape(22, 2, 22, 2).mean((1, 3)).round().astype(np.uint8))
    quarters = np.asarray(halves).reshape(11, 2, 11, 2).mean((1, 3)).round().astype(np.uint8)
    expected = Image.fromarray(quarters).resize((8, 8), Image.Resampling.BICUBIC)
    # A mean that ends in one half may be rounded either way.
    assert abs(crop(image) - pixels(expected)).max() <= 2


@pytest.mark.parametrize("shape", [(5, 3), (8, 9), (15, 40), (16, 17), (100, 33), (1, 1)])
def test_any_image_becomes_the_square(shape):
    assert center_crop_adm(Image.fromarray(noise(*shape)), 8).size == (8, 8)


def test_the_middle_of_a_large_image_is_the_middle():
    image = np.zeros((99, 300), np.uint8)
    image[:, 100:200] = 255
    assert (crop(image, 16)[:, 1:-1] == 255).all()


def test_buckets_of_a_small_size():
    # At most 16 units: 1:2 at 2×4, 3:5 as 3×6 would have 18, and the square.
    assert bucket_sizes(256, 64) == [(128, 256), (192, 320), (256, 256), (320, 192), (256, 128)]


@pytest.mark.parametrize(("size", "step"), [(512, 64), (1024, 64), (1000, 48), (64, 8), (64, 64)])
def test_buckets_keep_within_their_limits(size, step):
    buckets = bucket_sizes(size, step)
    aspects = [Fraction(height, width) for height, width in buckets]
    for (height, width), aspect in zip(buckets, aspects, strict=True):
        assert height % step == width % step == 0
        assert height * width <= size * size
        assert Fraction(1, 2) <= aspect <= 2
    assert aspects == sorted(set(aspects))
    assert {(width, height) for height, width in buckets} == set(buckets)


@pytest.mark.parametrize(("size", "step"), [(512, 64), (1024, 64), (1000, 48)])
def test_no_bucket_could_be_larger_at_its_aspect(size, step):
    units = range(1, 2 * size // step + 1)
    area = size * size // step**2
    # Of shapes of one aspect the last, which is the largest, stays.
    shapes = [(height, width) for height, width in product(units, units) if height * width <= area]
    largest = {Fraction(height, width): (height * step, width * step) for height, width in shapes}
    buckets = bucket_sizes(size, step)
    assert buckets == [largest[Fraction(*bucket)] for bucket in buckets]
    assert (step * (size // step), step * (size // step)) in buckets
    # No shape between 1:2 and 2:1 is far from all of them.
    ratios = [height / width for height, width in buckets]
    assert (ratios[0], ratios[-1]) == (0.5, 2.0)
    assert max(after / before for before, after in pairwise(ratios)) < 1.4


@pytest.mark.parametrize("step", [0, 65])
def test_steps_without_buckets(step):
    with pytest.raises(UserError, match=f"bucket_step={step} must be from 1 to image_size=64"):
        bucket_sizes(64, step)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (300, 300, (256, 256)),
        (4000, 2000, (128, 256)),
        (9000, 100, (128, 256)),
        (500, 300, (192, 320)),
        (300, 500, (320, 192)),
        # By factor 3:4 is nearer to 3:5 (1.25) than to 1:1 (1.33); by difference too. 7:9 is nearer to 1:1 by both.
        (400, 300, (192, 320)),
        (900, 700, (256, 256)),
        # Height 1.32 times the width: by difference it is nearest to 1:1, by factor to 5:3.
        (100, 132, (320, 192)),
    ],
)
def test_nearest_bucket(width, height, expected):
    assert nearest_bucket(width, height, bucket_sizes(256, 64)) == expected


def test_fit_to_bucket_covers_and_keeps_the_centre():
    # Columns in three colours, 30 wide each: of a wide image the bucket keeps the middle one.
    image = np.zeros((30, 90), np.uint8)
    image[:, 30:60], image[:, 60:] = 100, 200
    fitted = pixels(fit_to_bucket(Image.fromarray(image), (20, 10)))
    assert fitted.shape == (20, 10)
    assert (fitted == 100).all()


def test_fit_to_bucket_of_the_same_shape_crops_nothing():
    image = np.zeros((20, 40), np.uint8)
    image[:, 20:] = 200
    fitted = pixels(fit_to_bucket(Image.fromarray(image), (10, 20)))
    assert (fitted[:, :8] == 0).all()
    assert (fitted[:, 12:] == 200).all()


def test_tensors_are_channels_first_in_the_range():
    colours = np.array([[[0, 255, 51], [255, 0, 102]]], np.uint8)
    expected = torch.tensor([[[-1.0, 1.0]], [[1.0, -1.0]], [[-0.6, -0.2]]])
    torch.testing.assert_close(to_tensor(Image.fromarray(colours)), expected)
    assert to_tensor(Image.fromarray(colours[..., 0])).shape == (1, 1, 2)

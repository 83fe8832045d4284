"""Statistics as others write them, and for others to read."""

import zipfile

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from stagepatch.core import UserError
from stagepatch.evaluation.statistics import Statistics, frechet_distance
from stagepatch.evaluation.statistics_file import (
    StatisticsFile,
    check_extractor,
    has_images,
    is_statistics,
    read_statistics,
    write_statistics,
)


class Extractor:
    name, fingerprint, preprocessing, num_features = "Net", "a", "resized", 12


def features(seed, count=400):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(12, 12, generator=generator)
    return torch.randn(count, 12, generator=generator) @ mixed + seed


def by_recipe(path, values, **more):
    """As pytorch-fid's `save_fid_stats` does."""
    array = values.double().numpy()
    np.savez_compressed(path, mu=np.mean(array, axis=0), sigma=np.cov(array, rowvar=False), **more)
    return path


def test_a_file_by_pytorch_fids_recipe_gives_the_fid_that_torchmetrics_gives(tmp_path):
    one, other = features(0), features(1, 300)
    identity = torch.nn.Identity()
    identity.num_features = 12
    metric = FrechetInceptionDistance(feature=identity).set_dtype(torch.float64)
    metric.update(one.double(), real=True)
    metric.update(other.double(), real=False)
    expected = float(metric.compute())
    files = [read_statistics(by_recipe(tmp_path / f"{seed}.npz", each)) for seed, each in enumerate((one, other))]
    assert frechet_distance(*(file.statistics["features"] for file in files)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(files[0].statistics["features"], Statistics.of(other)) == pytest.approx(expected, rel=1e-6)
    assert files[0].statistics["features"].count == 0


def test_adms_reference_batch_has_spatial_features_and_images_too(tmp_path):
    spatial = np.zeros(7), np.eye(7)
    images = np.zeros((5, 8, 8, 3), np.uint8)
    path = by_recipe(tmp_path / "adm.npz", features(0), mu_s=spatial[0], sigma_s=spatial[1], arr_0=images)
    assert is_statistics(path)
    assert has_images(path)
    assert [len(each.mean) for each in read_statistics(path).statistics.values()] == [12, 7]
    assert "taken on trust" in check_extractor(path, read_statistics(path), Extractor)


def test_what_is_written_is_read_back_and_by_pytorch_fids_code(tmp_path):
    path, statistics = tmp_path / "own.npz", Statistics.of(features(0))
    write_statistics(
        path, StatisticsFile({"features": statistics, "spatial": statistics}, "Net", "a", "resized", "photos")
    )
    with np.load(path) as file:  # as pytorch-fid's `compute_statistics_of_path` does
        mean, covariance = file["mu"][:], file["sigma"][:]
    np.testing.assert_allclose(mean, features(0).double().numpy().mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features(0).double().numpy(), rowvar=False), rtol=1e-9, atol=1e-9)
    back = read_statistics(path)
    assert (back.extractor, back.preprocessing, back.source) == ("Net", "resized", "photos")
    for name in ("features", "spatial"):
        assert back.statistics[name].count == 400
        assert torch.equal(back.statistics[name].covariance, statistics.covariance)
    assert check_extractor(path, back, Extractor) == ""
    assert not has_images(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extractor": "Other"}, "statistics of Other, not of Net"),
        ({"fingerprint": "b"}, "Net with other weights"),
        ({"preprocessing": "cropped"}, "prepared otherwise .'cropped', here 'resized'"),
    ],
)
def test_a_reference_of_something_else_is_refused(tmp_path, changes, message):
    said = {"extractor": "Net", "fingerprint": "a", "preprocessing": "resized", **changes}
    with pytest.raises(UserError, match=message):
        check_extractor(tmp_path, StatisticsFile({"features": Statistics.of(features(0))}, **said), Extractor)


def test_a_foreign_file_of_other_dimensions_is_refused(tmp_path):
    file = StatisticsFile({"features": Statistics.of(features(0)[:, :5])})
    with pytest.raises(UserError, match="5 features, but Net has 12"):
        check_extractor(tmp_path, file, Extractor)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.full(3, np.nan), np.eye(3), "holds NaN"),
        (np.zeros(3), np.full((3, 3), np.inf), "holds NaN or infinity"),
        (np.zeros(3), np.eye(4), r"'mu' \[3\] and 'sigma' \[4, 4\]"),
        (np.zeros(3), np.array([[1, 2, 0], [0, 1, 0], [0, 0, 1.0]]), "no covariance"),
        (np.zeros(3), -np.eye(3), "no covariance"),
        (np.array({"a": 1}), np.eye(3), "Cannot read"),  # would have to be unpickled
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path, mean, covariance, message):
    np.savez(tmp_path / "bad.npz", mu=mean, sigma=covariance)
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("header", "broken"),
    [(b"}   ", b"}  }"), (b"<f8", b"<,8"), (b"(3,)", b"(%d,)" % 10**40), (b"(3,)", b"(1%s,)" % (b"0" * 12))],
    ids=["no Python", "no dtype", "more than 64 bits", "more than there is memory for"],
)
def test_a_broken_header_is_no_more_than_a_message(tmp_path, header, broken):
    np.savez(path := tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(3))
    with zipfile.ZipFile(path) as file:
        content = {name: file.read(name) for name in file.namelist()}
    assert header in content["mu.npy"]
    content["mu.npy"] = content["mu.npy"].replace(header, broken, 1)
    with zipfile.ZipFile(path, "w") as file:
        for name, each in content.items():
            file.writestr(name, each)
    with pytest.raises(UserError, match="Cannot read"):
        read_statistics(path)


def test_a_broken_zip_file_is_no_more_than_a_message(tmp_path):
    np.savez(path := tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.eye(3))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 6] = 233  # the version that is needed to unpack it
    path.write_bytes(content)
    assert not is_statistics(path)
    with pytest.raises(UserError, match="Cannot read"):
        read_statistics(path)


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"as \.npz"):
        write_statistics(tmp_path / "statistics.npy", StatisticsFile({"features": Statistics.of(features(0))}))
    assert not is_statistics(tmp_path / "nowhere.npz")

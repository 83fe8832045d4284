"""Which format is taken for what lies at a path."""

from types import SimpleNamespace

import pytest
from PIL import Image

from stagepatch.core.errors import UserError
from stagepatch.data import DataConfig, FolderSource, fit_to_model, in_memory, load_dataset, open_source
from stagepatch.data.dataset import find_format


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["a.png"], "folder"),
        ([], "folder"),
        (["a.png", "b.tar"], "webdataset"),
        (["dataset_info.json", "state.json"], "datasets"),
        (["dataset_dict.json"], "datasets"),
        (["dataset_info.json", "a.png"], "folder"),
    ],
)
def test_formats_of_directories(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    assert find_format(tmp_path) == expected


def test_formats_of_files(tmp_path):
    (tmp_path / "a.tar").touch()
    (tmp_path / "a.zip").touch()
    assert find_format(tmp_path / "a.tar") == "webdataset"
    with pytest.raises(UserError, match=r"No images at .*a\.zip"):
        find_format(tmp_path / "a.zip")


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(UserError) as refusal:
        load_dataset(DataConfig(source=str(tmp_path / "none")))
    assert str(refusal.value).startswith(f"No images at '{tmp_path / 'none'}'")
    assert all(
        option in str(refusal.value) for option in ("'digits'", "folder", "saved", ".tar", "data.format=datasets")
    )


def test_a_given_format_is_not_questioned(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.tar").write_bytes(b"")
    assert isinstance(open_source(DataConfig(source=str(tmp_path), format="folder")), FolderSource)
    with pytest.raises(UserError, match=r"b\.tar"):
        open_source(DataConfig(source=str(tmp_path)))


def test_digits_have_images_and_labels_alone():
    dataset = load_dataset(DataConfig())
    assert set(dataset[0]) == {"image", "label"}
    assert in_memory(dataset) is dataset
    assert (len(dataset), len(load_dataset(DataConfig(), "held_out"))) == (1198, 599)


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        ({"in_channels": 1, "sample_size": 28}, 0, 28),
        ({"in_channels": 3, "sample_size": [48, 64]}, 0, 64),
        ({"in_channels": 3, "sample_size": None}, 0, 256),
        ({"in_channels": 3, "sample_size": 28}, 36, 36),
    ],
    ids=str,
)
def test_images_are_of_the_models_own_size_unless_another_is_given(config, given, expected):
    data = fit_to_model(DataConfig(source="images", image_size=given), "", SimpleNamespace(config=config))
    assert (data.image_size, data.channels) == (expected, config["in_channels"])

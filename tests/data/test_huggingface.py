"""Datasets of Hugging Face `datasets`, built here; nothing is fetched."""

import sys
from unittest.mock import Mock

import pytest

from stagepatch.core.errors import UserError
from stagepatch.data import DataConfig, HuggingFaceSource
from tests.data.reading import encoded, load, picture, shown, summary

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def build(columns=None, values=(10, 20, 30), image="image"):
    rows = {image: [picture(value) for value in values], **(columns or {})}
    return datasets.Dataset.from_dict(rows).cast_column(image, datasets.Image())


@pytest.fixture
def saved(tmp_path):
    def save(dataset):
        dataset.save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def test_saved_dataset(saved):
    dataset = build({"text": ["a", "", None], "label": [2, 0, 1]})
    path = saved(dataset.cast_column("label", datasets.ClassLabel(names=["x", "y", "z"])))
    assert summary(load(path)) == [(10, 2, "a"), (20, 0, ""), (30, 1, "")]


def test_columns_by_other_names(saved):
    others = {"text": ["", "", ""], "label": [0, 0, 0]}
    dataset = build({"said": ["a", "b", "c"], "kind": [5, 6, 7], **others}, image="img")
    choices = {"image_column": "img", "caption_column": "said", "label_column": "kind"}
    assert summary(load(saved(dataset), **choices)) == [(10, 5, "a"), (20, 6, "b"), (30, 7, "c")]


def test_absent_and_unwanted_columns(saved, tmp_path):
    assert summary(load(saved(build()))) == [(10, 0, ""), (20, 0, ""), (30, 0, "")]
    build({"text": ["a", "b", "c"], "label": ["x", "y", "z"]}).save_to_disk(tmp_path / "other")
    choices = {"caption_column": "", "label_column": ""}
    assert summary(load(tmp_path / "other", **choices)) == [(10, 0, ""), (20, 0, ""), (30, 0, "")]


def test_splits_of_a_saved_dict(saved):
    path = saved(datasets.DatasetDict({"train": build(), "test": build(values=(70,))}))
    assert len(load(path)) == 3
    assert shown(load(path, split="test")[0]) == 70
    with pytest.raises(UserError, match=r"no split 'validation'.*train, test"):
        load(path, split="validation")


def test_files_in_a_folder_by_load_dataset(tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    build({"text": ["a", "b", "c"]}).to_parquet(tmp_path / "files" / "part.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = load(tmp_path / "files", format="datasets")
    own = datasets.load_dataset(str(tmp_path / "files"), split="train")._fingerprint
    assert dataset.source.stamp()[0].startswith(f"{own}:")  # caches that were made with it still open
    assert [caption for _, _, caption in summary(dataset)] == ["a", "b", "c"]


def test_a_name_goes_to_the_hub_only_when_asked_to(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)) or build())
    with pytest.raises(UserError, match=r"No images at 'someone/images'.*format=datasets"):
        load("someone/images")
    assert asked == []
    assert len(load("someone/images", format="datasets", split="test")) == 3
    assert asked == [("someone/images", "test")]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [({"side_effect": ConnectionError("no network")}, r" \(ConnectionError: no network\)"), ({}, ": it has no rows")],
)
def test_what_the_library_cannot_load_or_has_no_rows(monkeypatch, answer, reason):
    monkeypatch.setattr(datasets, "load_dataset", Mock(return_value=build().select([]), **answer))
    with pytest.raises(UserError, match=f"'someone/images', split 'train'{reason}"):
        load("someone/images", format="datasets")


def test_without_the_library(saved, monkeypatch):
    path = saved(build())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load(path)


def test_broken_rows_are_left_out(saved, caplog):
    rows = {"image": [encoded(10), b"nothing", None, encoded(40)], "label": [1, 2, 3, 4]}
    path = saved(datasets.Dataset.from_dict(rows))
    assert summary(load(path)) == [(10, 1, ""), (40, 4, "")]
    assert all(part in caplog.text for part in ("2 of 4 images", f"row 1 of '{path}'", "row 2"))


def test_a_row_with_neither_bytes_nor_path_is_broken(saved, caplog):
    rows = [{"bytes": encoded(10), "path": None}, {"bytes": None, "path": None}]
    assert summary(load(saved(datasets.Dataset.from_dict({"image": rows})))) == [(10, 0, "")]
    assert "the row has no image" in caplog.text


def test_images_by_path(tmp_path, saved):
    picture(90).save(tmp_path / "a.png")
    dataset = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]})
    assert shown(load(saved(dataset))[0]) == 90


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"image_column": "img"}, r"no column 'img': choose data\.image_column from image, text, label, many"),
        ({"image_column": "label"}, "column 'label' .*not images"),
        ({"caption_column": "said"}, r"no column 'said': choose data\.caption_column"),
        ({"label_column": "kind"}, r"no column 'kind': choose data\.label_column"),
        ({"caption_column": "label"}, r"not strings or lists of them: choose data\.caption_column, '' for none"),
        ({"caption_column": "many"}, "not strings"),
        ({"label_column": "text"}, r"not whole numbers .*choose data\.label_column"),
    ],
)
def test_columns_that_do_not_fit(saved, choices, message):
    path = saved(build({"text": ["", "", ""], "label": [0, 0, 0], "many": [[1], [2], [3]]}))
    with pytest.raises(UserError, match=message):
        load(path, **choices)


@pytest.mark.parametrize("label", [-1, None])
def test_rows_without_a_label(saved, label):
    path = saved(build({"label": [0, label, 0]}))
    with pytest.raises(UserError, match=f"row 1 of .* has the label {label}"):
        load(path)[1]


def test_stamps_follow_the_content(saved, tmp_path):
    path = saved(build({"text": ["a", "b", "c"]}))
    build({"text": ["a", "b", "d"]}).save_to_disk(tmp_path / "other")
    first, again, other = (HuggingFaceSource(DataConfig(str(it))).stamp() for it in (path, path, tmp_path / "other"))
    assert first[0] == f"{datasets.load_from_disk(path)._fingerprint}:image:text:label:0"
    assert len(set(first)) == 3
    assert again == first
    assert not set(other) & set(first)

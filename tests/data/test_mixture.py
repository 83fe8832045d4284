"""Several data sets as one: how often each is shown, what batches hold, caches that are found again, refusals."""

from collections import Counter

import pytest
import torch
from PIL import Image

from stagepatch.cli import main
from stagepatch.core import UserError
from stagepatch.data import DataConfig, Mixture, Pixels, SourceConfig, key_of, load_dataset, load_training_data
from stagepatch.data.source import KEYS
from stagepatch.evaluation.references import load_references
from stagepatch.training import load_batches
from tests.data.reading import picture, shown
from tests.runs import log_of, options
from tests.tiny_pipelines import PIPELINES

WIDE, SQUARE = (32, 16), (16, 16)


def make(directory, *names, size=SQUARE, first=0, captions=()):
    """Flat images of values that tell them apart; a caption each, where there are any."""
    for number, name in enumerate(names):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(first + 10 * number, size).save(path)
        if captions:
            path.with_suffix(".txt").write_text(captions[number])
    return directory


def mixed(*sources, **choices):
    """Of pairs of a directory and its repeats."""
    named = [SourceConfig(str(source), repeats) for source, repeats in sources]
    return DataConfig(sources=named, **{"image_size": 16, "channels": 1, **choices})


@pytest.fixture
def two(tmp_path):
    """Three classes of images each, the second's twice as wide."""
    names = ["ant/0.png", "bee/1.png", "cat/2.png"]
    return make(tmp_path / "A", *names), make(tmp_path / "B", *names, first=100, size=WIDE)


def values_of(dataset, steps, batch_size=4, **choices):
    loader = load_batches(dataset, batch_size, 0, steps, 0, choices.get("workers", 0))
    return [[round((float(image.mean()) + 1) * 127.5) for image in batch["image"]] for batch in loader]


def test_an_epoch_shows_each_as_often_as_it_is_repeated(two):
    dataset = load_training_data("", mixed((two[0], 3), (two[1], 1)))
    assert isinstance(dataset, Mixture)
    assert [type(part) for part in dataset.datasets] == [Pixels, Pixels]
    seen = [(shown(dataset[index]), int(dataset[index]["label"])) for index in range(len(dataset))]
    assert seen == [(0, 0), (10, 1), (20, 2), (100, 0), (110, 1), (120, 2)]
    assert dataset.labels() == [0, 1, 2, 0, 1, 2]
    epochs = [value for batch in values_of(dataset, 6) for value in batch]
    for epoch in (epochs[:12], epochs[12:]):
        assert Counter(epoch) == {0: 3, 10: 3, 20: 3, 100: 1, 110: 1, 120: 1}
    assert epochs[:12] != epochs[12:]
    assert values_of(dataset, 6, workers=1) == values_of(dataset, 6)


def test_buckets_go_across_data_sets(two, tmp_path):
    make(tmp_path / "C", "ant/0.png", "bee/1.png", first=200, size=WIDE)
    dataset = load_dataset(mixed((two[0], 1), (two[1], 2), (tmp_path / "C", 1), crop="buckets", bucket_step=8))
    square, wide = sorted(dataset.groups(), key=len)
    assert sorted(square) == [0, 1, 2]
    assert sorted(wide) == [3, 3, 4, 4, 5, 5, 6, 7]
    batches = values_of(dataset, 3)
    assert sorted(len({value < 100 for value in batch}) for batch in batches) == [1, 1, 1]
    assert any({value >= 200 for value in batch} == {True, False} for batch in batches)


def test_memory_is_counted_over_all(two):
    size = 6 * 16 * 16 / 2**30
    for share, kind in ((1.0, Pixels), (0.9, object)):
        dataset = load_training_data("", mixed((two[0], 1), (two[1], 1), in_memory=share * size))
        assert isinstance(dataset.datasets[0], kind)
        assert (kind is Pixels) == isinstance(dataset.datasets[1], Pixels)


def test_references_are_of_all_once(two):
    references = load_references(mixed((two[0], 5), (two[1], 1)))
    assert len(references.train) == 6
    assert references.train.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_images_are_held_out_of_each(two):
    part = load_training_data("", mixed((two[0], 3), (two[1], 1), held_out=0.5))
    kept, held_out = ({shown(each[index]) for index in range(len(each))} for each in (part, part.held_out))
    names = {0: "ant/0.png", 10: "bee/1.png", 20: "cat/2.png"}
    assert held_out == {value for value in kept | held_out if key_of(names[value % 100]) < 0.5 * KEYS}
    assert len(kept | held_out) == 6
    counts = Counter(shown(part[index]) for index in part.groups()[0])
    assert counts == {value: 1 if value >= 100 else 3 for value in kept}


def test_masks_of_one_of_them(two):
    Image.new("L", SQUARE, 0).save(two[0] / "ant" / "0-masklabel.png")
    dataset = load_training_data("", mixed((two[0], 1), (two[1], 1)))
    assert [float(dataset[index]["mask"].mean()) for index in range(6)] == [0.0, *[1.0] * 5]


@pytest.mark.parametrize(
    ("files", "captions", "message"),
    [
        (["0.png"], ["a cat"], "'.*B' has captions, but '.*A' has classes and no captions"),
        (["0.png"], [], "'.*A' has classes, but '.*B' has none"),
        (["ant/0.png", "bug/0.png"], [], "Class 1 of '.*A' is 'bee', but of '.*B' it is 'bug'"),
    ],
)
def test_sources_that_mean_different_things_are_refused(two, files, captions, message):
    for path in sorted(two[1].rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    make(two[1], *files, captions=captions)
    with pytest.raises(UserError, match=message):
        load_dataset(mixed((two[0], 1), (two[1], 1)))
    if captions:
        with pytest.raises(UserError, match="has none"):
            load_dataset(mixed((two[0], 1), (two[1], 1), caption_column=""))


def test_names_of_classes_go_across_formats(two, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"image": [picture(1), picture(2)], "label": [2, 0]})
    rows = rows.cast_column("image", datasets.Image())
    for number, names in enumerate((["ant", "bee", "cat"], ["ant", "cat", "bee"])):
        named = rows.cast_column("label", datasets.ClassLabel(names=names))
        named.save_to_disk(tmp_path / f"{number}")
    assert load_dataset(mixed((two[0], 1), (tmp_path / "0", 1))).labels() == [0, 1, 2, 2, 0]
    with pytest.raises(UserError, match=r"Class 1 of '.*A' is 'bee', but of '.*1' it is 'cat'"):
        load_dataset(mixed((two[0], 1), (tmp_path / "1", 1)))


def test_what_cannot_be_is_refused(two):
    for choices, message in (
        ({"sources": [SourceConfig("", 1)]}, "each names a source"),
        ({"sources": [SourceConfig("A")], "source": "B"}, "in place of data.source"),
        ({"sources": [SourceConfig("A")], "masks": "B"}, "data.masks and data.references"),
    ):
        with pytest.raises(UserError, match=message):
            DataConfig(**choices)
    with pytest.raises(UserError, match="repeats=0 must be at least 1"):
        SourceConfig(str(two[0]), 0)
    with pytest.raises(UserError, match="The bundled 'fashion' is trained on alone"):
        load_dataset(mixed((two[0], 1), ("fashion", 1)))


@pytest.fixture
def captioned(tmp_path):
    """A model, and two folders of images with captions, several of one image, and a mask."""
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "sd")
    make(tmp_path / "A", "0.png", "1.png", captions=["a red house", "a blue tree\nphoto of a dog"])
    make(tmp_path / "B", "0.png", "1.png", "2.png", first=100, captions=["photo of a cat", "", "the old house"])
    Image.new("L", SQUARE, 128).save(tmp_path / "A" / "0-masklabel.png")
    return tmp_path


def test_each_has_a_cache_that_is_found_again(captioned, capsys):
    sources = [SourceConfig(str(captioned / "A"), 3), SourceConfig(str(captioned / "B"))]
    data = DataConfig(sources=sources, image_size=16)
    dataset = load_training_data(str(captioned / "sd"), data, str(captioned / "cache"))
    assert dataset.caption_counts.tolist() == [1, 2, 1, 1, 1]
    alone = load_training_data(
        str(captioned / "sd"), DataConfig(str(captioned / "A"), image_size=16), str(captioned / "alone")
    )
    for item in (0, (1, 0), (1, 1)):
        assert torch.equal(dataset[item]["image"], alone[item]["image"])
        own, expected = (each[item]["condition"]["encoder_hidden_states"] for each in (dataset, alone))
        assert torch.equal(own, expected)
    assert [round(float(dataset[index]["mask"].float().mean() * 255)) for index in range(5)] == [128, *[255] * 4]
    assert torch.equal(dataset.null_condition["encoder_hidden_states"], alone.null_condition["encoder_hidden_states"])
    assert Counter(dataset.groups()[0]) == {0: 3, 1: 3, 2: 1, 3: 1, 4: 1}
    caches = {path: path.stat().st_mtime_ns for path in (captioned / "cache").rglob("*.safetensors")}
    assert len({path.parent for path in caches}) == 2
    other = DataConfig(sources=[SourceConfig(str(captioned / "B"), 7)], image_size=16)
    found = load_training_data(str(captioned / "sd"), other, str(captioned / "cache"))
    assert (len(found), {path: path.stat().st_mtime_ns for path in caches}) == (3, caches)


def test_training_draws_the_same_wherever_it_goes_on_and_keeps_to_its_sources(captioned, capsys):
    def train(repeats):
        named = f"[{{source: {captioned / 'A'}, repeats: {repeats}}}, {{source: {captioned / 'B'}}}]"
        given = [f"--model={captioned / 'sd'}", f"--data.sources={named}", "--data.image_size=16"]
        training = {"steps": 2, "batch_size": 4, "log_every": 1, "tensorboard": False}
        output = ["--patch.sample_size=4", "--data.horizontal_flip", f"--output_dir={captioned / 'run'}"]
        return main(["train", *given, *options("training", training), *output])

    assert train(3) == 0
    assert [len(line) > 3 for line in log_of(captioned / "run")] == [True, True]
    assert train(2) == 2
    assert "data.sources was" in capsys.readouterr().err
    sources = [SourceConfig(str(captioned / "A"), 3), SourceConfig(str(captioned / "B"))]
    data = DataConfig(sources=sources, image_size=16)
    dataset = load_training_data(str(captioned / "sd"), data, output_dir=str(captioned / "run"))
    whole = list(load_batches(dataset, 4, 0, 6, 0, 0).batch_sampler)
    assert list(load_batches(dataset, 4, 4, 6, 0, 0).batch_sampler) == whole[4:]

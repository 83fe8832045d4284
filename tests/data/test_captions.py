"""Several captions an image: where they come from, that all are encoded, and that each step draws one."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

from stagepatch.checkpoints import load_captioner
from stagepatch.cli import main
from stagepatch.core import BatchOrder, UserError
from stagepatch.data import CachedLatents, DataConfig, FolderSource, HuggingFaceSource, WebDatasetSource, make_cache
from stagepatch.sampling import latent_sampling
from stagepatch.training import load_batches
from stagepatch.training.draws import WithCaptions
from tests.data.reading import encoded, picture
from tests.data.test_webdataset import write_shard
from tests.runs import Strike, options
from tests.tiny_pipelines import PIPELINES

FIVE = [f"photo of {what}" for what in ("a cat", "a dog", "a red house", "a blue tree", "the old house")]


def said_by(source):
    return [source.captions(index) for index in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    for number in range(4):
        picture(60 * number, (32, 32)).save(directory / f"{number}.png")
    return directory


def write_rows(folder, *captions):
    rows = [json.dumps({"file_name": f"{number}.png", "text": said}) for number, said in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def write_coco(path, *pairs):
    """Annotations of pairs of file name and captions, those of all images mixed, as COCO's are."""
    images = [{"id": 100 + number, "file_name": name} for number, (name, _) in enumerate(pairs)]
    said = [
        {"id": n, "image_id": 100 + i, "caption": c} for i, (_, each) in enumerate(pairs) for n, c in enumerate(each)
    ]
    said.sort(key=lambda annotation: annotation["id"])
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": said}))


def test_metadata_may_have_lists(folder):
    write_rows(folder, FIVE, "one", [], None)
    assert said_by(FolderSource(folder)) == [FIVE, ["one"], [""], [""]]
    first = FolderSource(folder).stamp()
    write_rows(folder, [*FIVE[:4], "another"], "one", [], None)
    assert [old == new for old, new in zip(first, FolderSource(folder).stamp(), strict=True)] == [False, *[True] * 3]
    write_rows(folder, ["alone"], "one", [], None)
    assert FolderSource(folder).stamp()[0].endswith(":alone")  # as where it stands alone: caches go by it


def test_cocos_own_annotations(folder):
    (folder / "sub").mkdir()
    (folder / "3.png").rename(folder / "sub" / "3.png")
    write_coco(folder / "captions_train2014.json", ("0.png", FIVE), ("gone.png", ["none"]), ("sub/3.png", ["by path"]))
    write_coco(folder / "captions_val2014.json", ("1.png", ["val"]))
    assert said_by(FolderSource(folder)) == [FIVE, ["val"], [""], ["by path"]]
    write_coco(folder / "captions_train2014.json", ("3.png", FIVE[:2]))
    assert said_by(FolderSource(folder))[3] == FIVE[:2]  # by its name alone
    assert said_by(FolderSource(folder, "")) == [[""]] * 4
    (folder / "metadata.csv").write_text("file_name,text\n1.png,first\n")
    assert said_by(FolderSource(folder)) == [[""], ["first"], [""], [""]]


def test_texts_beside_images(folder):
    (folder / "1.txt").write_text("one\n\n  two \r\n")
    (folder / "2.txt").write_text("\n")
    (folder / "notes.txt").write_text("of no image")
    assert said_by(FolderSource(folder)) == [[""], ["one", "two"], [""], [""]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no file of captions in COCO's form"),
        ("[]", "is no file of captions in COCO's form"),
        ('{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "is no file of captions in COCO's form"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}', "'a.jpg'"),
        ('{"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": 3}]}', "a string"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(folder, content, message):
    (folder / "captions.json").write_text(content)
    with pytest.raises(UserError, match=message):
        FolderSource(folder)


def test_shards_and_datasets_may_have_lists(tmp_path):
    members = {"1.png": encoded(1), "1.json": json.dumps({"caption": FIVE}), "2.png": encoded(2), "2.txt": "one\ntwo"}
    write_shard(tmp_path / "a.tar", members)
    assert said_by(WebDatasetSource(tmp_path / "a.tar")) == [FIVE, ["one\ntwo"]]  # its .txt is one caption, as ever
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = {"image": [picture(1), picture(2), picture(3)], "text": [FIVE, ["one"], None]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    assert said_by(HuggingFaceSource(DataConfig(str(tmp_path / "saved")))) == [FIVE, ["one"], [""]]


@pytest.fixture
def sd(tmp_path):
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "sd")
    return tmp_path / "sd"


def cached(tmp_path, sd, folder):
    make_cache(tmp_path / "cache", str(sd), DataConfig(str(folder), image_size=32), 4)
    return CachedLatents(tmp_path / "cache")


def test_one_caption_an_image_is_kept_as_before(tmp_path, sd, folder):
    dataset = cached(tmp_path, sd, write_rows(folder, ["one"], "two", [], None))
    assert dataset.caption_counts is None
    assert set(load_file(tmp_path / "cache" / "index.safetensors")) == {
        "size",
        "file",
        "row",
        "label",
        "key",
        "caption",
    }
    assert dataset.index["caption"].tolist() == [1, 2, 0, 0]
    (items,) = load_batches(dataset, 4, 0, 1, 0, 0).batch_sampler
    assert sorted(items) == [0, 1, 2, 3]  # not pairs


def test_drawn_conditions_are_the_encoders_own_of_the_caption_that_was_drawn(tmp_path, sd, folder):
    captions = [FIVE, ["one"], FIVE[:2], ""]
    dataset = cached(tmp_path, sd, write_rows(folder, *captions))
    encode = load_captioner(sd)
    for index, said in enumerate([FIVE, ["one"], FIVE[:2], [""]]):
        for number, caption in enumerate(said):
            with torch.no_grad():
                (own,) = encode([caption])["encoder_hidden_states"]
            stored = dataset[index, number]["condition"]["encoder_hidden_states"]
            torch.testing.assert_close(stored, own, rtol=1e-3, atol=1e-3)
        assert torch.equal(dataset[index]["image"], dataset[index, 0]["image"])
    batches = list(load_batches(dataset, 4, 0, 3, 7, 2))
    order = WithCaptions(BatchOrder([range(4)], 4, 0, 3, 7), dataset.caption_counts)
    for batch, items in zip(batches, order, strict=True):
        expected = torch.stack([dataset[index, n]["condition"]["encoder_hidden_states"] for index, n in items])
        assert torch.equal(batch["condition"]["encoder_hidden_states"], expected)


def test_samples_that_are_measured_take_the_first(tmp_path, sd, folder):
    dataset = cached(tmp_path, sd, write_rows(folder, *[FIVE[index:] + FIVE[:index] for index in range(4)]))
    sampling = latent_sampling(str(sd), DataConfig(str(folder), image_size=32), tmp_path / "cache")
    seen = sampling.captions.of(list(range(4)))["encoder_hidden_states"]
    firsts = torch.stack([dataset[index, 0]["condition"]["encoder_hidden_states"] for index in range(4)])
    assert {tuple(value.flatten().tolist()) for value in seen} == {tuple(value.flatten().tolist()) for value in firsts}


COUNTS = torch.tensor([5, 1, 3, 5, 2, 5, 5, 4])


def drawn(start=0, stop=3000, *share):
    return list(WithCaptions(BatchOrder([range(8)], 8, start, stop, 3, *share), COUNTS))


def test_all_captions_are_drawn_alike_and_apart_from_one_another():
    batches = drawn()
    by_item = {item: [number for batch in batches for index, number in batch if index == item] for item in range(8)}
    for item, count in enumerate(COUNTS.tolist()):
        found = torch.bincount(torch.tensor(by_item[item]), minlength=count)
        assert len(found) == count
        assert count == 1 or stats.chisquare(found.numpy()).pvalue > 1e-3
    pairs = torch.zeros(5, 5)
    for one, other in zip(by_item[0], by_item[3], strict=True):
        pairs[one, other] += 1
    assert stats.chi2_contingency(pairs.numpy()).pvalue > 1e-3


def test_draws_follow_the_iteration_and_not_where_a_run_began_or_how_many_processes_share_it():
    whole = drawn(0, 20)
    assert drawn(13, 20) == whole[13:]
    halves = zip(drawn(0, 20, 0, 2), drawn(0, 20, 1, 2), strict=True)
    assert [one + other for one, other in halves] == whole
    assert [len(batch) for batch in whole] == [8] * 20
    assert len(WithCaptions(BatchOrder([range(8)], 8, 5, 20, 3), COUNTS)) == 15


def train_on_captions(model, folder, output):
    training = {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "learning_rate": 0.1, "tensorboard": False}
    paths = [f"--model={model}", f"--data.source={folder}", f"--output_dir={output}", "--data.image_size=32"]
    given = ["--patch.sample_size=4", "--patch.initialization=normal", "--training.label_dropout=0.2"]
    return main(["train", *paths, *given, *options("training", training)])


def test_training_uses_all_and_killed_draws_the_same(tmp_path, sd, folder, processes):
    write_rows(folder, *[FIVE] * 4)
    paths = {"model": sd, "folder": folder}
    assert train_on_captions(**paths, output=tmp_path / "whole") == 0
    strike = Strike("iteration", 5)
    processes.call(train_on_captions, -signal.SIGKILL, **paths, output=tmp_path / "cut", strike=strike)
    assert train_on_captions(**paths, output=tmp_path / "cut") == 0
    write_rows(folder, *[FIVE[:1]] * 4)
    assert train_on_captions(**paths, output=tmp_path / "first") == 0
    whole, cut, first = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut", "first"))
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    assert any(not torch.equal(first[name], value) for name, value in whole.items())

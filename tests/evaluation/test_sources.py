"""`stagepatch evaluate A B`: any two of a model, images and statistics; stopped anywhere, with the same table."""

import itertools
import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stagepatch.checkpoints import save_denoiser
from stagepatch.cli import evaluate_sources, main
from stagepatch.cli.shown_samples import shown_samples
from stagepatch.core import UserError, read_json, write_tensors
from stagepatch.data import DataConfig, load_digits
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.evaluation import fid, kid, load_extractor, precision, recall
from stagepatch.evaluation.sources import labels_of, load_images, name_source
from stagepatch.methods import DMP, load_learned
from stagepatch.patch import PatchConfig
from stagepatch.report import paired_grids
from stagepatch.sampling import SamplingConfig, generate, generation
from tests.runs import Strike, make_model

FEW = ["--sampling.num_images=100", "--sampling.num_inference_steps=1", "--sampling.batch_size=20"]
SAMPLING = ["--sampling.num_images=600", "--sampling.num_inference_steps=1", "--sampling.batch_size=128"]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STAGEPATCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, a patch of it, and digits in every form."""
    folder = tmp_path_factory.mktemp("sources")
    model = make_model(std=0.1)
    save_denoiser(model, make_scheduler(ObjectiveConfig(), True), folder / "model")
    method = DMP(PatchConfig())
    method.prepare(model)
    with torch.no_grad():
        for parameter in method.patch.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    method.save(folder / "patch")
    pixels = ((load_digits("held_out")[0] + 1) * 127.5).round().byte()[:, 0]
    for number, image in enumerate(pixels[:40]):
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / "photos" / f"{number:03d}.png")
    np.save(folder / "pixels.npy", pixels[:40].numpy())
    np.savez(folder / "pixels.npz", arr_0=pixels[:40].numpy())
    write_tensors(folder / "sample" / "samples.safetensors", {"images": pixels[:40, None].float() / 127.5 - 1.0})
    return folder


def run(tmp_path, *arguments, name="out"):
    assert main(["evaluate", *map(str, arguments), f"--output_dir={tmp_path / name}"]) == 0
    return read_json(tmp_path / name / "metrics.json")


def features(made):
    images = load_images(name_source(str(made / "photos")), DataConfig(image_size=0))
    return load_extractor("digits")(torch.stack([images[index]["image"] for index in range(40)]))


def test_a_folder_against_data_is_what_the_metrics_say_of_the_same_features(made, tmp_path):
    found = run(tmp_path, made / "photos", "digits:train")
    one, other = features(made), load_extractor("digits")(load_digits("train")[0])
    expected = {
        "fid": fid(one, other),
        "kid": kid(one, other),
        "precision": precision(one, other),
        "recall": recall(one, other),
    }
    assert {key: found["metrics"][0][key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert found["a"] == {"source": str(made / "photos"), "kind": "images", "images": 40, "size": [1, 8, 8]}
    assert (found["b"]["images"], found["b"]["split"]) == (1198, "train")
    assert found["seeds"] == []
    assert any("40 images for 48 dimensions" in note for note in found["notes"])
    page = (tmp_path / "out" / "report.html").read_text()
    number = f'data-number="{found["metrics"][0]["fid"]:.4f}'
    for text in (number, "B: digits:train", "40 images for 48 dimensions", "photos"):
        assert text in page


@pytest.mark.parametrize("form", ["pixels.npy", "pixels.npz", "sample"])
def test_the_same_images_in_any_form_are_the_same(made, tmp_path, form):
    expected = run(tmp_path, made / "photos", "digits:held-out")["metrics"]
    assert run(tmp_path, made / form, "digits:held-out")["metrics"] == expected


def test_statistics_are_written_and_measured_against_and_say_what_is_left_out(made, tmp_path, capsys):
    expected = run(tmp_path, made / "photos", "digits:train")["metrics"][0]["fid"]
    saved = tmp_path / "train.npz"
    assert main(["evaluate", "digits:train", f"--save_statistics={saved}", f"--output_dir={tmp_path / 'x'}"]) == 0
    capsys.readouterr()
    found = run(tmp_path, made / "photos", saved)
    shown = capsys.readouterr().out
    assert found["metrics"] == [{"fid": pytest.approx(expected, rel=1e-9)}]
    assert found["b"]["images"] == 1198
    assert "Left out, since they need more than these sources and this extractor give: KID" in shown
    assert "trust" not in shown
    assert run(tmp_path, saved, made / "photos")["metrics"][0]["fid"] == pytest.approx(expected, rel=1e-6)
    foreign = tmp_path / "foreign.npz"
    with np.load(saved) as file:
        np.savez(foreign, mu=file["mu"], sigma=file["sigma"], arr_0=(np.load(made / "pixels.npy")))
    found = run(tmp_path, "digits:held-out", foreign)
    assert {"fid", "kid", "precision"} <= set(found["metrics"][0])
    assert "taken on trust" in capsys.readouterr().out


def test_a_models_samples_are_those_of_the_present_form(made, tmp_path):
    """Of the labels of the data, from the same noise; a patch is put on with a plus."""
    given = [*FEW, "--seeds=[3]"]
    model = made / "model"
    present = run(tmp_path, f"--model={model}", f"--patch={made / 'patch'}", *given)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"{present['patched'][0]['fid_train']:.4f}" in page
    assert "over the images of one sampling seed" in page
    assert "Differences are paired by image" in page
    assert page.count('type="range"') == 1
    base = run(tmp_path, model, "digits:train", *given)
    patched = run(tmp_path, f"{model}+{made / 'patch'}", "digits:train", *given)
    for found, name in ((base, "base"), (patched, "patched")):
        assert found["metrics"][0]["fid"] == pytest.approx(present[name][0]["fid_train"], rel=1e-6)
    assert base["metrics"] != patched["metrics"]
    assert patched["a"]["learned"]
    assert "labels of 'digits:train'" in patched["a"]["conditions"]
    both = run(tmp_path, model, model, *given)
    assert (both["b"]["seed"], both["metrics"][0]["fid"] > 0) == (4, True)  # other noise
    assert (tmp_path / "out" / "report.html").read_text().count('type="range"') == 1
    assert not (tmp_path / "out" / "features").exists()


class Stopped(BaseException):
    """As a signal, it is not caught."""


@pytest.mark.parametrize("second", [["digits:held-out"], []])
def test_stopped_it_ends_with_the_same_table(made, tmp_path, monkeypatch, second):
    """Against a source, and against its training images; at a shard of each seed, and at the result."""
    monkeypatch.setattr(evaluate_sources, "_IN_SHARD", 40)
    given = ["evaluate", str(made / "model"), *second, *FEW, "--seeds=[0,1]"]
    assert main([*given, f"--output_dir={tmp_path / 'whole'}"]) == 0
    sampled, replace = [], Path.replace
    original = generation.in_batches
    monkeypatch.setattr(generation, "in_batches", lambda *given: sampled.append(given[-1]) or original(*given))

    def stop_at(due):
        counted = itertools.count(1)

        def replace_or_stop(path, target):
            if tmp_path / "cut" in Path(target).parents and next(counted) == due:
                raise Stopped
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", replace_or_stop)

    for due in (4, 3, 2):  # with the plan and two shards; with two more; with one more: each time the next is lost
        stop_at(due)
        with pytest.raises(Stopped):
            main([*given, f"--output_dir={tmp_path / 'cut'}"])
    monkeypatch.setattr(Path, "replace", replace)
    assert main([*given, f"--output_dir={tmp_path / 'cut'}"]) == 0
    assert (tmp_path / "cut" / "metrics.json").read_bytes() == (tmp_path / "whole" / "metrics.json").read_bytes()
    assert len(sampled) == 6 + 3  # three shards a seed, and those that were lost


def test_the_page_shows_both_models_from_the_noise_of_the_first(made, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(evaluate_sources, "shown_samples", lambda *given: shown.append(shown_samples(*given)) or [])
    patched = f"{made / 'model'}+{made / 'patch'}"
    run(tmp_path, made / "model", patched, *FEW, "--seeds=[3,4]", "--metrics=[fid]")
    monkeypatch.setattr(evaluate_sources, "shown_samples", shown_samples)
    ((comparison,),) = shown
    assert comparison.labels == (str(made / "model"), patched)
    model, scheduler = make_model(std=0.1), make_scheduler(ObjectiveConfig(), True)
    sampling = SamplingConfig(num_images=100, num_inference_steps=1, batch_size=20, seed=3)
    images = [generate(model, scheduler, sampling)]
    load_learned(model, made / "patch")
    images.append(generate(model, scheduler, sampling))
    assert [comparison.before, comparison.after] == [*paired_grids(images[0][:40], images[1][:40])]


def test_images_by_number_are_those_of_the_whole():
    model, scheduler = make_model(), make_scheduler(ObjectiveConfig(), True)
    config = SamplingConfig(num_images=10, num_inference_steps=2, batch_size=4)
    whole, part = (generate(model, scheduler, config, numbers=numbers) for numbers in (None, range(4, 9)))
    torch.testing.assert_close(part, whole[4:9])


def cut(made, out, strikes, processes):
    given = ["evaluate", str(made / "model"), "digits:held-out", *SAMPLING, "--seeds=[0,1]", f"--output_dir={out}"]
    for strike in strikes:
        processes.call(main, -signal.SIGKILL, arguments=given, strike=strike)
    processes.call(main, arguments=given)
    return (out / "metrics.json").read_bytes()


def test_killed_at_ten_random_points_it_ends_with_the_same_table(made, tmp_path, processes):
    whole = cut(made, tmp_path / "whole", [], processes)
    chance = random.Random(0)
    names = ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    for number in range(10):
        where, name = chance.choice(["half", "written", "renamed"]), chance.choice(names)
        strike = Strike(where, chance.choice([1, 2]), name)  # of the first seed, of the second
        assert cut(made, tmp_path / f"cut-{number}", [strike], processes) == whole
    assert cut(made, tmp_path / "result", [Strike("renamed", 1, "metrics.json")], processes) == whole


def test_two_processes_give_the_table_of_one(made, tmp_path, processes):
    given = [str(made / "model"), "digits:held-out", *SAMPLING, "--seeds=[0]"]
    processes.call(main, arguments=["evaluate", *given, f"--output_dir={tmp_path / 'one'}"])
    processes.call_together(main, 2, arguments=["evaluate", *given, f"--output_dir={tmp_path / 'two'}"])
    assert (tmp_path / "one" / "metrics.json").read_bytes() == (tmp_path / "two" / "metrics.json").read_bytes()


def test_stopped_it_does_not_go_on_with_other_settings(made, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("stagepatch.cli.evaluate_sources.Reference", stop)
    given = ["evaluate", str(made / "model"), "digits:held-out", *FEW, f"--output_dir={tmp_path}", "--seeds=[0]"]
    assert main(given) == 130
    assert main([*given, "--sampling.num_inference_steps=2"]) == 2
    assert "sampling.num_inference_steps was 1, is 2" in capsys.readouterr().err


def fails(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("stagepatch evaluate: ")
    assert len(message.splitlines()) <= 2
    return message


def test_mistakes_have_messages_of_their_own(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(made)
    (tmp_path / "empty").mkdir()
    two = tmp_path / "two"
    two.mkdir()
    for number, (mode, size) in enumerate([("L", 8), ("L", 9)]):
        Image.new(mode, (size, size)).save(two / f"{number}.png")
    modes = tmp_path / "modes"
    modes.mkdir()
    for number, mode in enumerate(["L", "RGB", "L"]):
        Image.new(mode, (8, 8)).save(modes / f"{number}.png")
    few = tmp_path / "few"
    few.mkdir()
    for number in range(3):
        Image.new("L", (8, 8), number).save(few / f"{number}.png")
    np.savez(tmp_path / "nan.npz", mu=np.full(48, np.nan), sigma=np.eye(48))
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    expected = [
        (["photoz", "digits:train"], "Nothing at 'photoz'. Did you mean 'photos'?"),
        (["photos", "digits:trian"], "Did you mean 'digits:train'?"),
        (["photos:held-out", "digits:train"], "--data.held_out=0.1"),
        (["photos:tune", "digits:train"], "only fashion"),
        (["patch", "digits:train"], "goes on a model: give MODEL+patch"),
        (["model+pach", "digits:train"], "Nothing at 'pach'"),
        ([tmp_path / "empty", "digits:train"], "No image in"),
        ([two, "digits:train"], "0.png' has 8×8 pixels"),
        ([modes, "digits:train"], "all grey or all in colour"),
        ([few, "digits:train"], "has 3 images: too few to measure, give at least 4"),
        (["photos", tmp_path / "nan.npz"], "holds NaN"),
        (["photos", tmp_path / "other.npz"], "2,048 features, but digits features has 48"),
        (["photos", "digits:train", "--patch=patch"], "photos+patch"),
        (["photos", "digits:train", "--extractor=fashion"], "set extractor to: digits"),
        (["photos"], "say what its images are measured against"),
        (["model+patch"], "Give --patch patch, or what"),
        (["photos", "--save_statistics=x.npy"], "written as .npz"),
    ]
    for arguments, message in expected:
        assert message in fails(capsys, *arguments, f"--output_dir={tmp_path / 'out'}"), arguments
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_mixed_images_are_measured_once_a_size_and_channels_are_given(tmp_path):
    for number in range(8):
        mode = ["L", "RGB"][number % 2]
        Image.effect_noise((9 + number, 12), 50).convert(mode).save(tmp_path / f"{number}.png")
    data = DataConfig(image_size=8, channels=1)
    images = load_images(name_source(str(tmp_path)), data)
    assert {tuple(images[index]["image"].shape) for index in range(8)} == {(1, 8, 8)}


def test_images_are_taken_as_they_are(tmp_path):
    image = Image.effect_noise((11, 7), 50)
    for number in range(3):
        image.save(tmp_path / f"{number}.png")
    images = load_images(name_source(str(tmp_path)), DataConfig(image_size=0))
    expected = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1.0)
    assert torch.equal(images[1]["image"], expected[None])


def test_any_data_have_the_split_that_training_makes(made):
    data = DataConfig(image_size=0, held_out=0.3)
    whole = load_images(name_source(str(made / "photos")), data)
    train, held_out = (load_images(name_source(f"{made / 'photos'}:{name}"), data) for name in ("train", "held-out"))
    assert sorted(train.indices + held_out.indices) == list(range(40))
    keys = whole.keys()
    assert max(keys[index] for index in held_out.indices) < min(keys[index] for index in train.indices)
    assert len(labels_of(held_out)) == len(held_out) > 4
    with pytest.raises(UserError, match="samples of a model have no split"):
        load_images(name_source(f"{made / 'sample'}:train"), data)


def test_metrics_json_is_plain_json(made, tmp_path):
    found = run(tmp_path, made / "photos", "digits:held-out")
    assert json.loads(json.dumps(found)) == found
    assert set(found["extractor"]) == {"name", "fingerprint", "preprocessing"}

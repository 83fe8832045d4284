"""The paper's rows, and the digits' own: each config parses, fits the real architecture, and runs on a stand-in."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import yaml

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.cli.app import _parse
from stagepatch.cli.config import CompareConfig
from stagepatch.data import CachedLatents
from stagepatch.models import DiT
from stagepatch.studies.compare_plan import plan_jobs
from stagepatch.training import read_log
from tests.data.test_captions import write_coco
from tests.tiny_pipelines import PIPELINES, clip, clip_tokenizer
from tests.training.test_train_on_pipelines import draw_images

CONFIGS = Path(__file__).parent.parent.parent / "configs"
PAPER = sorted((CONFIGS / "paper").glob("*.yaml"))
TEXT = ("table2-coco", "table9-condition")
CLASSES = ("table8-imagenet", "table9-classes")


def real_config(path):
    """The config of the model that a table is about."""
    if path.stem == "table2-sd15":
        return diffusers.UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    name = yaml.safe_load((Path(__file__).parent / "paper_numbers.yaml").read_text())["tables"][path.stem]["model"]
    conditioning = "text" if path.stem in TEXT else "class" if name == "DiT-XL/2" else "none"
    with torch.device("meta"):
        model = DiT.from_name(name, conditioning=conditioning, pooled_projection_dim=768)
    return DiT, {key: value for key, value in model.config.items() if not key.startswith("_")}


def parse(path, *changes):
    """As the command line does."""
    return _parse("compare", [f"--config={path}", *changes])[0]


def save_config(path, directory):
    """A model directory without weights: the meta device needs none."""
    model_class, config = real_config(path)
    component = directory / ("unet" if model_class is diffusers.UNet2DConditionModel else "transformer")
    component.mkdir(parents=True)
    (directory / "vae").mkdir()
    (component / "config.json").write_text(json.dumps({"_class_name": model_class.__name__, **config}))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_config_of_the_paper_fits_the_real_architecture(path, tmp_path):
    save_config(path, tmp_path / "model")
    config = parse(path, f"--model={tmp_path / 'model'}")
    assert isinstance(config, CompareConfig)
    jobs = plan_jobs(config)
    assert jobs[0].config.method == "none"
    counts = {job.name: job.trainable_parameters() for job in jobs}
    if "DMP" in counts:
        expected = {"table2-ffhq": 2_556_416, "table3-ditl2": 6_554_112, "table8-imagenet": 8_552_960}
        assert counts["DMP"][0] == expected.get(path.stem, counts["DMP"][0])
    if path.stem == "table9-classes":  # t+c is as wide as t
        assert counts["t"] == counts["t+c"]
        assert counts["t"][0] == 8_552_960
    if path.stem == "table6-scratch":
        (alone, of_model), (together, _) = counts["from scratch"], counts["from scratch with DMP"]
        assert (alone, together) == (of_model, of_model + 2_556_416)
    if path.stem == "table2-sd15":
        assert counts["DMP at the stages"][0] == 11_558_912


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_config_of_the_paper_has_the_paper_s_numbers(path, tmp_path):
    paper = yaml.safe_load((Path(__file__).parent / "paper_numbers.yaml").read_text())
    assert {other.stem for other in PAPER} == set(paper["tables"])
    facts, recipe, config = paper["tables"][path.stem], paper["recipe"], parse(path)
    training, sampling = config.training, config.sampling
    seen = {
        "iterations": training.steps,
        "size": config.data.image_size,
        "images": sampling.num_images,
        "sampler": sampling.scheduler,
        "steps": sampling.num_inference_steps,
        "guidance": sampling.guidance_scale,
    }
    assert seen == {name: facts[name] for name in seen}
    of_data = {"horizontal_flip": config.data.horizontal_flip}
    assert {**vars(training), **of_data} | recipe == {**vars(training), **of_data}
    # Its rows are there, by the recipe, and the comment above quotes what they gave.
    entries = {entry.name: entry for entry in config.entries}
    for name, fid in facts["fid"].items():
        assert not entries[name].training, name
        assert f"{fid:.2f}" in path.read_text(), name


def test_bases_are_pretrained_for_as_long_as_the_paper_s():
    paper = yaml.safe_load((Path(__file__).parent / "paper_numbers.yaml").read_text())
    paths = (CONFIGS / "paper" / "pretrain").glob("*.yaml")
    found = {path.stem: _parse("pretrain", [f"--config={path}"])[0].training.steps for path in paths}
    assert found == paper["pretraining"]


def pretrain(path, directory, images):
    """A base by the config that the table's model is made by, at reduced width, images and steps."""
    model = Path(yaml.safe_load(path.read_text())["model"]).name.removesuffix("-start")
    parts = directory.with_name("parts")
    PIPELINES["DiTTransformer2DModel"].build().vae.save_pretrained(parts / "vae")
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(parts / "tokenizer")
    clip(tokenizer, hidden_size=16, projection=16).save_pretrained(parts / "text_encoder")
    changes = [f"--parts={parts}", f"--data.source={images}", "--data.image_size=32", "--data.num_workers=0"]
    changes += ["--model.name=", "--model.sample_size=8", "--model.hidden_size=32", "--model.num_layers=2"]
    changes += ["--model.num_attention_heads=2", "--model.num_classes=10", f"--output_dir={directory}"]
    steps = 0 if path.stem == "table6-scratch" else 2
    changes += [f"--training.steps={steps}", "--training.batch_size=2", "--training.mixed_precision=no"]
    assert main(["pretrain", f"--config={CONFIGS / 'paper' / 'pretrain' / model}.yaml", *changes]) == 0


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
@pytest.mark.usefixtures("pixels")  # Inception-v3's weights cannot be had here
def test_config_of_the_paper_runs_at_reduced_size_from_pretraining_its_base(path, tmp_path):
    images = draw_images(tmp_path / "images", count=6, size=(32, 32), captions=path.stem not in TEXT)
    if path.stem in TEXT:
        five = [f"photo of {what}" for what in ("a cat", "a dog", "a red house", "a blue tree", "an old house")]
        write_coco(images / "captions_train2014.json", *((image.name, five) for image in sorted(images.iterdir())))
    if path.stem == "table2-sd15":
        PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "model")
    else:
        pretrain(path, tmp_path / "model", images)
        model, scheduler = load_denoiser(tmp_path / "model")
        kind = "text" if path.stem in TEXT else "class" if path.stem in CLASSES else "none"
        assert (model.config["conditioning"], model.config["learn_sigma"]) == (kind, True)
        assert scheduler.config.beta_schedule == ("linear" if kind == "class" else "squaredcos_cap_v2")
    changes = [f"--model={tmp_path / 'model'}", f"--output_dir={tmp_path / 'out'}", "--launch.executor=debug"]
    changes += [f"--data.source={images}", "--data.image_size=32", "--data.num_workers=0", "--evaluate_every=1"]
    changes += ["--sampling.num_images=6", "--sampling.num_inference_steps=5", "--training.mixed_precision=no"]
    # An entry's own steps do not stand in these configs, so these are the steps of all.
    changes += ["--training.steps=2", "--training.batch_size=2", "--training.log_every=1"]
    assert main(["compare", f"--config={path}", *changes]) == 0
    entries = yaml.safe_load(path.read_text())["entries"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in results] == [entry["name"] for entry in entries]
    for row in results[1:]:
        assert set(row["curve"]) == {"1", "2"}
    if path.stem in TEXT:
        assert CachedLatents(tmp_path / "out" / "cache").caption_counts.tolist() == [5] * 6
    for job in (tmp_path / "out" / "jobs").iterdir():
        if job.name != "base":
            assert len(read_log(job / "learned")) == 2


@pytest.mark.parametrize("name", ["compare", "better-dmp", "ablations"])
def test_configs_for_digits_parse_and_fit(name):
    jobs = plan_jobs(parse(CONFIGS / "digits" / f"{name}.yaml"))
    assert jobs[0].config.method == "none"
    assert len({job.directory for job in jobs}) == len(jobs)

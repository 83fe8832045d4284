"""The paper's rows, and the digits' own: each config parses, fits the real architecture, and runs on a stand-in."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from stagepatch.cli import main
from stagepatch.cli.config import CompareConfig
from stagepatch.evaluation import features
from stagepatch.models import DiT
from stagepatch.studies.compare_jobs import plan_jobs
from stagepatch.training import read_log
from tests.tiny_pipelines import PIPELINES, clip_tokenizer
from tests.training.test_train_on_pipelines import draw_images

CONFIGS = Path(__file__).parent.parent.parent / "configs"
PAPER = sorted((CONFIGS / "paper").glob("*.yaml"))
TEXT = ("table2-coco", "table9-condition")


def real_config(path):
    """The config of the model that a table is about."""
    if path.stem == "table2-sd15":
        return diffusers.UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    name = {"table3-ditl2": "DiT-L/2", "table8-imagenet": "DiT-XL/2"}.get(path.stem, "DiT-B/2")
    conditioning = "text" if path.stem in TEXT else "class" if name == "DiT-XL/2" else "none"
    with torch.device("meta"):
        model = DiT.from_name(name, conditioning=conditioning, pooled_projection_dim=768)
    return DiT, {key: value for key, value in model.config.items() if not key.startswith("_")}


def parse(path, **changes):
    """As the command line does, with a model directory put in."""
    from stagepatch.cli.app import _parse

    return _parse("compare", [f"--config={path}", *(f"--{key}={value}" for key, value in changes.items())])[0]


def save_config(path, directory):
    """A model directory without weights: the meta device needs none."""
    model_class, config = real_config(path)
    component = directory / ("unet" if model_class is diffusers.UNet2DConditionModel else "transformer")
    component.mkdir(parents=True)
    (component / "config.json").write_text(json.dumps({"_class_name": model_class.__name__, **config}))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_config_of_the_paper_fits_the_real_architecture(path, tmp_path):
    save_config(path, tmp_path / "model")
    config = parse(path, model=tmp_path / "model")
    assert isinstance(config, CompareConfig)
    jobs = plan_jobs(config)
    assert jobs[0].config.method == "none"
    counts = {job.name: job.trainable_parameters() for job in jobs}
    if "DMP" in counts:
        expected = {
            "table2-ffhq": 2_556_416,
            "table3-ditl2": 6_554_112,
            "table8-imagenet": 8_552_960,
        }
        assert counts["DMP"][0] == expected.get(path.stem, counts["DMP"][0])
    if path.stem == "table2-sd15":
        assert counts["DMP at the stages"][0] == 2_889_728


def stand_in(path, directory):
    """A tiny whole model of the kind that the config is about."""
    if path.stem == "table2-sd15":
        PIPELINES["UNet2DConditionModel"].build().save_pretrained(directory)
        return
    conditioning = "text" if path.stem in TEXT else "class" if path.stem == "table8-imagenet" else "none"
    torch.manual_seed(0)
    model = DiT(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        conditioning=conditioning,
        num_classes=10,
        pooled_projection_dim=16,
    )
    model.save_pretrained(directory / "transformer")
    diffusers.DDPMScheduler(variance_type="learned_range").save_pretrained(directory / "scheduler")
    PIPELINES["DiTTransformer2DModel"].build().vae.save_pretrained(directory / "vae")
    if conditioning == "text":
        tokenizer = clip_tokenizer()
        tokenizer.save_pretrained(directory / "tokenizer")
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=16,
            eos_token_id=tokenizer.eos_token_id,
        )
        CLIPTextModelWithProjection(config).save_pretrained(directory / "text_encoder")


class Pixels:
    """Stands for Inception-v3: its weights cannot be had here."""

    name = "mean pixels"
    fingerprint = "mean pixels"

    def __call__(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_config_of_the_paper_runs_on_a_stand_in(path, tmp_path, monkeypatch):
    monkeypatch.setitem(features._EXTRACTORS, "inception", Pixels)
    monkeypatch.setenv("STAGEPATCH_CACHE", str(tmp_path / "features"))
    stand_in(path, tmp_path / "model")
    images = draw_images(tmp_path / "images", count=6, size=(32, 32))
    changes = {
        "model": tmp_path / "model",
        "output_dir": tmp_path / "out",
        "evaluate_every": 1,
        "data.source": images,
        "data.image_size": 32,
        "data.num_workers": 0,
        "training.steps": 2,
        "training.batch_size": 2,
        "training.log_every": 1,
        "training.mixed_precision": "no",
        "sampling.num_images": 6,
        "sampling.num_inference_steps": 5,
        "launch.executor": "debug",
    }
    # An entry's own steps do not stand in these configs, so these are the steps of all.
    arguments = [f"--config={path}", *(f"--{key}={value}" for key, value in changes.items())]
    assert main(["compare", *arguments]) == 0
    entries = yaml.safe_load(path.read_text())["entries"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in results] == [entry["name"] for entry in entries]
    for row in results[1:]:
        assert set(row["curve"]) == {"1", "2"}
    for job in (tmp_path / "out" / "jobs").iterdir():
        if job.name != "base":
            assert len(read_log(job / "learned")) == 2


@pytest.mark.parametrize("name", ["compare", "better-dmp", "ablations"])
def test_configs_for_digits_parse_and_fit(name):
    jobs = plan_jobs(parse(CONFIGS / "digits" / f"{name}.yaml"))
    assert jobs[0].config.method == "none"
    assert len({job.directory for job in jobs}) == len(jobs)

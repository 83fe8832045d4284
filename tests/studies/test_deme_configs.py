"""DeMe's experiments: each config has the paper's numbers, and runs on a stand-in from pretraining its own base."""

import json
import re
from itertools import pairwise
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from diffusers import UNet2DModel

from experiments import deme
from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.cli.app import _parse
from stagepatch.cli.pretrain import _make_model
from stagepatch.core import read_json
from stagepatch.diffusion import make_scheduler
from stagepatch.studies import plan_stages
from tests.tiny_pipelines import PIPELINES
from tests.training.test_train_on_pipelines import draw_images

PAPER = Path(__file__).parent.parent.parent / "configs" / "paper"
FACTS = yaml.safe_load((Path(__file__).parent / "paper_numbers.yaml").read_text())["deme"]
FOLDERS = [PAPER / name for name in FACTS["folders"]]
PRETRAIN = PAPER / "pretrain" / "ddpm-cifar10.yaml"
PARAMETERS = 35_746_307  # of google/ddpm-cifar10-32
# The config of google/ddpm-cifar10-32 on the Hub, but for what is UNet2DModel's default.
HUB = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def parse(command, path, *changes):
    return _parse(command, [f"--config={path}", *changes])[0]


def test_every_folder_of_deme_is_held_against_the_paper():
    assert sorted(path.name for path in PAPER.glob("deme-*")) == sorted(FACTS["folders"])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_configs_have_the_paper_s_numbers(folder):
    facts, recipe = FACTS["folders"][folder.name], FACTS["recipe"]
    decouple, merge, compare = (parse(name, folder / f"{name}.yaml") for name in ("decouple", "merge", "compare"))
    training = decouple.training
    own = {name: getattr(decouple, name) for name in ("num_stages", "consistency", "projection", "p")}
    parts = training.gradient_accumulation_steps
    assert {
        **own,
        "iterations": training.steps,
        "batch": [training.batch_size // parts, parts],
        "learning_rate": training.learning_rate,
        "search_images": merge.sampling.num_images,
        "images": compare.sampling.num_images,
        "size": decouple.data.image_size,
    } == {
        name: value
        for name, value in {**recipe, **facts}.items()
        if name not in ("fid", "base", "steps", "sampler", "measured_at")
    }
    for sampling in (merge.sampling, compare.sampling):
        assert (sampling.scheduler, sampling.num_inference_steps) == (facts["sampler"], recipe["steps"])
    assert compare.extractor == "inception_legacy" + ("@256" if "measured_at" in facts else "")
    assert merge.search.strategies == ["grid"]
    assert merge.search.metric == compare.metric == "fid_train"
    assert merge.sampling.seed not in compare.sampling_seeds  # what was chosen is measured on other noise
    assert decouple.model == merge.base == compare.model
    # The second level is finer, around the best of the first.
    steps = [{b - a for a, b in pairwise(level)} for level in (merge.search.coarse, merge.search.fine)]
    assert max(steps[1]) < min(steps[0])
    text = (folder / "decouple.yaml").read_text()
    for value in [facts["base"], *(f"{fid:.2f}" for fid in facts["fid"])]:
        assert value in text
    # The commands, given by hand, use what the study makes.
    study = deme.Study(deme.parser().parse_args([str(folder)]))
    assert Path(decouple.output_dir) == study.directory(0, 4, facts["p"]) == Path(merge.stages[0])
    assert merge.output_dir == f"{decouple.output_dir}-merged"
    assert Path(compare.output_dir) == study.output / "compare"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_released_code_s_optimiser_is_a_preset_away(folder):
    config = parse("decouple", folder / "decouple.yaml", "--preset=released")
    training = config.training.resolve("released")
    assert {name: getattr(training, name) for name in FACTS["released"]} == FACTS["released"]
    assert config.antithetic
    assert training.learning_rate == FACTS["folders"][folder.name]["learning_rate"]


def test_the_base_of_cifar10_is_the_hub_s_architecture():
    config = parse("pretrain", PRETRAIN)
    with torch.device("meta"):
        made, expected = _make_model(config.model, 0.0), UNet2DModel(**HUB)
    expected, found = (
        {k: v for k, v in json.loads(m.to_json_string()).items() if k[0] != "_"} for m in (expected, made)
    )
    assert found == expected
    assert sum(parameter.numel() for parameter in made.parameters()) == PARAMETERS
    scheduler = make_scheduler(config.objective)
    assert (scheduler.config.beta_schedule, scheduler.config.beta_end, scheduler.config.clip_sample) == (
        "linear",
        0.02,
        True,
    )


def test_stages_of_the_real_architecture_can_be_planned(tmp_path):
    config = parse("pretrain", PRETRAIN)
    with torch.device("meta"):
        _make_model(config.model, 0.0).save_config(tmp_path / "unet")
    make_scheduler(config.objective).save_pretrained(tmp_path / "scheduler")
    stages = plan_stages(parse("decouple", PAPER / "deme-cifar10" / "decouple.yaml", f"--model={tmp_path}"))
    assert [(stage.first, stage.stop) for stage in stages] == [(0, 250), (250, 500), (500, 750), (750, 1000)]


@pytest.mark.parametrize("options", ["{nowhere: 1}", "{norm_num_groups: 3}"])
def test_options_that_make_no_unet_are_refused(tmp_path, options, capsys):
    changes = [f"--config={PRETRAIN}", f"--model.unet_options={options}", f"--output_dir={tmp_path}"]
    assert main(["pretrain", *changes]) == 2
    assert "make no UNet2DModel" in capsys.readouterr().err


def test_options_of_a_unet_are_refused_for_a_dit(tmp_path, capsys):
    assert main(["pretrain", "--model.unet_options={norm_eps: 1e-6}", f"--output_dir={tmp_path}"]) == 2
    assert "give block_out_channels" in capsys.readouterr().err


def test_the_hub_s_flat_layout_is_laid_out_by_the_comment_s_command(tmp_path, monkeypatch):
    """As the repositories of google/ddpm-… lie: config, weights and scheduler in one folder."""
    pipe, flat = PIPELINES["UNet2DModel"].build(), tmp_path / "google" / "ddpm-cifar10-32"
    pipe.unet.save_pretrained(flat)
    pipe.scheduler.save_pretrained(flat)
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (flat / "model_index.json").write_text(json.dumps(index))
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r'python -c "(.*)"', (PAPER / "deme-cifar10" / "decouple.yaml").read_text())
    exec(command, {})
    model, scheduler = load_denoiser(parse("decouple", PAPER / "deme-cifar10" / "decouple.yaml").model)
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert type(scheduler) is diffusers.DDPMScheduler


SMALL = "--data.source {images} --data.format folder --data.image_size {size} --data.num_workers 0"
TRAINING = "--training.steps 2 --training.batch_size 4 --training.mixed_precision no --training.log_every 1"
SAMPLING = "--sampling.num_images 6 --sampling.num_inference_steps 4 --sampling.batch_size 6"


def pretrain(directory, images):
    """The base of CIFAR-10 at reduced width, images and steps."""
    changes = ["--model.sample_size=16", "--model.block_out_channels=[8,16]", "--model.layers_per_block=1"]
    changes += ["--training.steps=2", "--training.batch_size=2", f"--output_dir={directory}"]
    assert main(["pretrain", f"--config={PRETRAIN}", *SMALL.format(images=images, size=16).split(), *changes]) == 0


def small_study(folder, tmp_path, *more):
    """The study's command, by overrides alone."""
    images = draw_images(tmp_path / "images", count=6, size=(32, 32))
    is_latent, model = folder.name == "deme-laion", tmp_path / "model"
    if not model.exists() and is_latent:
        PIPELINES["UNet2DConditionModel"].build().save_pretrained(model)
    elif not model.exists():
        pretrain(model, images)
    caches = [f" --cache {tmp_path / name}" if is_latent else "" for name in ("cache", "cache", "cache-coco")]
    search = "--search.coarse [0,1] --search.fine [0,-0.5] "
    given = [f"--model={model}", f"--output_dir={tmp_path / 'out'}"]
    given += [f"--all={SMALL.format(images=images, size=32 if is_latent else 16)}"]
    given += [f"--decouple={TRAINING} --launch.executor debug{caches[0]}", f"--merge={search}{SAMPLING}{caches[1]}"]
    given += [f"--compare={SAMPLING} --launch.executor debug{caches[2]}"]
    deme.main([str(folder), *given, *more])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@pytest.mark.usefixtures("pixels")  # Inception-v3's weights cannot be had here
def test_the_study_runs_at_reduced_size_from_pretraining_its_base(folder, tmp_path, capsys):
    small_study(folder, tmp_path, "--num_stages", "2")
    p, out = FACTS["folders"][folder.name]["p"], tmp_path / "out"
    stage = read_json(out / "seed-0" / f"n2-p{p:g}" / "stages" / "1" / "stage.json")
    assert (stage["from"], stage["to"], stage["p"], stage["projection"]) == (500, 1000, p, True)
    rows = {row["name"]: row for row in json.loads((out / "compare" / "results.json").read_text())}
    assert list(rows) == [
        "base",
        *(f"N=2, p={p:g}: {kind}" for kind in ("mean", "experts", "merged")),
        "N=2, p=1: mean",
    ]
    table = (out / "table.md").read_text()
    shown = [cell.strip() for cell in table.splitlines()[-3].strip("|").split("|")]
    fid = {name: row["metrics"]["fid_train"] for name, row in rows.items()}
    order = [f"N=2, p={p:g}: {kind}" for kind in ("experts", "merged", "mean")] + ["N=2, p=1: mean"]
    assert shown[:6] == ["2", f"{p:g}", *(f"{fid[name]:.4f}" for name in order)]
    assert f"base: {fid['base']:.4f}" in table
    for place, kind in ((6, "mean"), (7, "merged")):
        expected = fid[f"N=2, p={p:g}: {kind}"] - fid["N=2, p=1: mean"]
        assert float(shown[place].split(" ± ")[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("pixels")
def test_a_sweep_goes_on_with_more_values_and_draws_them(tmp_path, seen, capsys):
    folder = PAPER / "deme-cifar10"
    small_study(folder, tmp_path, "--num_stages", "1")
    assert len(seen) == 2 + 2  # steps of the base, and of one copy, which is its own control
    assert not (tmp_path / "out" / "over-N.png").exists()
    small_study(folder, tmp_path, "--num_stages", "1", "2", "--p", "0.5", "1")
    assert len(seen) == 4 + 2 * 2 * 2  # of two copies for each p; the one copy is done, whatever p
    for name in ("over-N.png", "over-p.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if re.match(r"\| \d", line)]
    assert [row[:2] for row in cells] == [["1", "–"], ["2", "0.5"], ["2", "1"]]
    for row in (cells[0], cells[2]):  # the mean of what trained on all timesteps is the control itself
        assert row[4] == row[5]
        assert row[6].startswith("+0.0000")
    assert cells[0][2] == cells[0][4]  # one expert is the mean of one
    # A merge that is measured is not silently another one.
    with pytest.raises(SystemExit, match="merged by other options"):
        small_study(folder, tmp_path, "--num_stages", "1", "--merge=--sampling.num_images 4")


@pytest.mark.usefixtures("pixels")
def test_the_control_is_the_mean_of_copies_that_see_all_timesteps_by_draws_of_their_own(tmp_path, seen):
    small_study(PAPER / "deme-cifar10", tmp_path, "--num_stages", "2", "--p", "0", "--seeds", "0", "1")
    copies = seen[2:]  # two steps each, after the base's: by seed DeMe's two copies, then the control's
    noise = [tuple(draws.noise.flatten().tolist()) for draws in copies]
    assert len(set(noise)) == 8
    assert noise[:4] == noise[4:8] != noise[8:12] == noise[12:]  # the same noise as DeMe's, at other timesteps
    own = [int(draws.timesteps.max()) < 500 for draws in copies]
    assert own[:2] == own[8:10] == [True, True]  # with p = 0, what the first copy of each seed sees
    out = tmp_path / "out"
    for seed in ("seed-0", "seed-1"):
        assert read_json(out / seed / "n2-p1" / "stages" / "0" / "stage.json")["p"] == 1.0
        mean, _ = load_denoiser(out / seed / "n2-p1-mean")
        states = [load_denoiser(out / seed / "n2-p1" / "stages" / name)[0].state_dict() for name in "01"]
        for name, tensor in mean.state_dict().items():
            average = torch.stack([state[name] for state in states]).double().mean(dim=0)
            torch.testing.assert_close(tensor.double(), average, rtol=1e-4, atol=1e-6)
    rows = json.loads((out / "compare" / "results.json").read_text())
    values = {row["name"]: row["metrics"]["fid_train"] for row in rows if row["runs"] == 2}
    assert f" {values['N=2, p=1: mean']:.4f} " in (out / "table.md").read_text()  # over both seeds


def test_gradients_over_a_run_by_the_paper_s_config(tmp_path, capsys):
    folder, facts = PAPER / "deme-cifar10", FACTS["gradients"]
    analyze, finetune = parse("analyze", folder / "analyze.yaml"), parse("train", folder / "finetune.yaml")
    assert (analyze.samples, analyze.timesteps) == (facts["samples"], facts["timesteps"])
    assert finetune.training.snapshot_every == facts["every"]
    assert (analyze.snapshots, finetune.method) == (finetune.output_dir, "finetune")
    images = draw_images(tmp_path / "images", count=6, size=(32, 32))
    pretrain(tmp_path / "model", images)
    shared = [f"--model={tmp_path / 'model'}", *SMALL.format(images=images, size=16).split()]
    changes = ["--training.steps=4", "--training.batch_size=2", "--training.snapshot_every=2"]
    run = f"{tmp_path / 'run'}"
    assert main(["train", f"--config={folder / 'finetune.yaml'}", *shared, *changes, f"--output_dir={run}"]) == 0
    changes = ["--timesteps=8", "--samples=4", "--batch_size=2", "--projection=64", f"--output_dir={tmp_path / 'out'}"]
    assert main(["analyze", f"--config={folder / 'analyze.yaml'}", *shared, *changes, f"--snapshots={run}"]) == 0
    numbers = read_json(tmp_path / "out" / "analysis.json")
    assert list(numbers) == ["snapshots"]
    assert list(numbers["snapshots"]["iterations"]) == ["2", "4"]
    assert (tmp_path / "out" / "snapshots.png").exists()
    assert "Cosine between gradients over a run" in capsys.readouterr().out

"""`stagepatch compare --hours`: its rows, its budget, and the plan that a second start goes on with."""

import json
import math

import pytest
import yaml
from diffusers import EDMEulerScheduler

from stagepatch.checkpoints import save_denoiser
from stagepatch.core import UserError
from stagepatch.sampling import SamplingConfig
from stagepatch.studies import protocol, protocol_rows
from stagepatch.studies.compare_config import CompareConfig, EntryConfig
from stagepatch.studies.compare_plan import plan_jobs
from stagepatch.studies.protocol import LEAST, MOST, Work, plan_budget, with_plan, work_of
from stagepatch.studies.protocol_rows import default_entries
from stagepatch.training import PRESETS, DDOConfig
from tests.studies.conftest import study

WORK = Work(steps=10.0, images=20.0, images_once=5.0)


def hours_of(steps, images, seeds, per_step=1.0, per_image=0.1):
    """By hand."""
    return (per_step * steps * 10.0 * seeds + per_image * images * (20.0 * seeds + 5.0)) / 3600.0


@pytest.mark.parametrize("seeds", [3, 2, 1])
def test_budget_is_the_hours_less_a_fifth(seeds):
    least = hours_of(*LEAST, seeds)
    budget = plan_budget(1.0, 0.1, (least + 0.01) / 0.8, WORK)
    assert budget.training_seeds == seeds
    assert math.isclose(budget.hours, hours_of(budget.steps, budget.num_images, seeds))
    assert least <= budget.hours <= least + 0.01


def test_with_more_hours_steps_and_images_grow_together_to_their_most():
    middle = (hours_of(*LEAST, 3) + hours_of(*MOST, 3)) / 2
    budget = plan_budget(1.0, 0.1, middle / 0.8, WORK)
    assert budget.steps == pytest.approx((LEAST[0] + MOST[0]) / 2, abs=1)
    assert budget.num_images == pytest.approx((LEAST[1] + MOST[1]) / 2, abs=1)
    plenty = plan_budget(1.0, 0.1, 1e6, WORK)
    assert (plenty.steps, plenty.num_images, plenty.training_seeds) == (*MOST, 3)


def test_too_few_hours_are_refused_with_the_least_that_are_enough():
    with pytest.raises(UserError, match=r"hours=0.5 are too few.*one training seed") as error:
        plan_budget(1.0, 0.1, 0.5, WORK)
    needed = float(str(error.value).split()[-2])
    assert math.isclose(needed, hours_of(*LEAST, 1) / 0.8, abs_tol=0.01)
    assert plan_budget(1.0, 0.1, needed, WORK).training_seeds == 1
    with pytest.raises(UserError):
        plan_budget(1.0, 0.1, needed - 0.02, WORK)


def test_work_counts_trained_rows_by_seed_and_dearer_samplers():
    config = CompareConfig(sampling=SamplingConfig(num_inference_steps=20), sampling_seeds=[0, 1, 2])
    entries = [
        EntryConfig("base", "none"),
        EntryConfig("steps", "none", sampling={"num_inference_steps": 80}),
        EntryConfig("guided", "none", sampling={"guidance_scale": 1.5}),
        EntryConfig("fine-tuning", "finetune"),
        EntryConfig("DDO", "lora", objective="ddo"),
        EntryConfig("DDO, more steps", "lora", objective="ddo", sampling={"num_inference_steps": 40}),
        EntryConfig("LoRA", "lora"),
        EntryConfig("LoRA, then DDO", "lora", objective="ddo", after="LoRA"),
        EntryConfig("guide", "lora", objective="samples", sampling={"guide": "{learned}"}),
    ]
    work = work_of(entries, config)
    assert math.isclose(work.steps, 3 + 2 * 8 / 3)  # of DDO, two rows are of one training
    fakes = protocol_rows.FAKES_PER_IMAGE * DDOConfig().sampling.num_inference_steps / 20
    assert math.isclose(work.images, 3 * (3 + 1 + 2 + 2) + fakes)  # what goes on from a LoRA has samples of its own
    assert math.isclose(work.images_once, 3 * (1 + 4 + 2) + fakes)


def test_rows_are_base_free_wins_controls_and_methods_of_the_same_steps():
    config = CompareConfig(model="digits")
    entries = {entry.name: entry for entry in default_entries(config, 1000, 2000)}
    kinds = {name: entry.control for name, entry in entries.items()}
    assert kinds["base"] == ""
    assert [name for name, kind in kinds.items() if kind == "free"] == [
        "free: 2 times the steps",
        "free: 4 times the steps",
        "free: dpmsolver++",
        "free: trailing timesteps",
        "free: ddpm, 4 times the steps",
        "free: guidance 1.5",
    ]
    assert sum(kind == "steps" for kind in kinds.values()) == len(protocol_rows.FINETUNE_SHARES)
    methods = [name for name, kind in kinds.items() if not kind and name != "base"]
    by_range = ["LoRAs by range", "copies by range"]
    assert methods == [
        *("DMP as in the paper", "stage LoRA"),
        *by_range,
        *("recommended", "stage LoRA, then recommended", "guide, twice the calls"),
        *("stage LoRA, 2 times the steps", "recommended, 2 times the steps"),
        "stage LoRA, then recommended, 2 times the steps",
    ]
    assert [entries[name].num_stages * entries[name].training["steps"] for name in by_range] == [1000, 1000]
    recipe, won = PRESETS["recommended"], entries["recommended"]
    assert (won.method, won.objective, won.lora) == (recipe["method"], recipe["objective"], recipe["lora"])
    assert won.training["steps"] == min(1000, recipe["training"]["steps"])
    assert won.ddo["sampling"]["num_images"] == 6000
    guide = entries["guide, twice the calls"]
    assert (guide.objective, guide.ddo, guide.lora) == ("samples", won.ddo, PRESETS["guide"]["lora"])
    both = entries["stage LoRA, then recommended"]
    assert (both.after, both.training, both.ddo) == ("stage LoRA", won.training, won.ddo)
    counts = {job.name: job.trainable_parameters()[0] for job in plan_jobs(_with(config, entries.values()))}
    assert counts["recommended"] == counts[f"LoRA, rank {protocol_rows.RANK}"]
    assert counts["stage LoRA"] == counts["LoRAs by range"] == counts["LoRA, rank 32, all layers"]
    assert entries["DMP as in the paper"].training == {"learning_rate": 1e-4}


def test_rates_are_shares_of_the_models_own():
    config = CompareConfig(model="digits")
    config.training.learning_rate = 2e-3
    rates = {entry.name: entry.training.get("learning_rate") for entry in default_entries(config, 1000, 2000)}
    assert {name for name in rates if name.startswith("fine-tuning")} == {
        f"fine-tuning, averaged, {rate}" for rate in ("0.0002", "0.0006", "0.002")
    }
    assert rates["copies by range"] == 1e-3  # half, as in configs/fashion/experts.yaml
    of_loras = {"stage LoRA", "LoRAs by range", "guide, twice the calls", "LoRA, rank 8", "LoRA, rank 32, all layers"}
    assert {rates[name] for name in of_loras} == {PRESETS["stages"]["training"]["learning_rate"]}
    assert (rates["recommended"], rates["DMP as in the paper"]) == (6e-5, 1e-4)


def _with(config, entries):
    config.entries = list(entries)
    return config


@pytest.fixture
def small(monkeypatch):
    """A step takes a second, and a plan is of few."""
    monkeypatch.setattr(protocol, "LEAST", (2, 60))
    monkeypatch.setattr(protocol, "MOST", (3, 60))
    monkeypatch.setattr(protocol, "measure_seconds", lambda config: (1.0, 0.01))


SMALL = {
    "training": {"batch_size": 8, "log_every": 1},
    "sampling": {"num_images": 60, "num_inference_steps": 2, "batch_size": 60},
}


def test_hours_alone_make_a_table_with_controls(tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr(protocol_rows, "FINETUNE_SHARES", (1.0,))
    assert study("compare", tmp_path, "--hours=0.03", **SMALL) == 0
    plan = yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())
    assert plan["training_seeds"] == [0]
    assert "The hours are enough for 1 training seed(s)" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert list(rows) == [entry["name"] for entry in plan["entries"]]
    assert set(rows["recommended"]["against"]) == {name for name, row in rows.items() if row["control"]}
    assert "# plan.yaml: training_seeds:" in (tmp_path / "out" / "run.yaml").read_text()
    plan["of"].pop("learning_rate")  # as of plans of before
    (tmp_path / "out" / "plan.yaml").write_text(yaml.safe_dump(plan))
    # Whatever the timing says then, the plan is the same; and the jobs are done.
    monkeypatch.setattr(protocol, "measure_seconds", None)
    monkeypatch.setattr("stagepatch.studies.compare_jobs.Run", None)
    assert study("compare", tmp_path, "--hours=0.03", **SMALL) == 0
    assert study("compare", tmp_path, "--hours=0.04", **SMALL) == 2
    assert "(hours was 0.03, is 0.04)" in capsys.readouterr().err
    training = {**SMALL["training"], "learning_rate": 1e-3}
    assert study("compare", tmp_path, "--hours=0.03", **{**SMALL, "training": training}) == 2
    assert "(learning_rate was 0.0001, is 0.001)" in capsys.readouterr().err


def test_what_the_model_cannot_take_is_left_out_and_named(tmp_path, capsys, small, monkeypatch):
    rows = [EntryConfig("base", "none"), EntryConfig("odd", "lora", lora={"targets": ["nowhere"]})]
    monkeypatch.setattr(protocol, "default_entries", lambda *_: [*rows, EntryConfig("bias", "bitfit")])
    config = with_plan(CompareConfig(output_dir=str(tmp_path), hours=1.0))
    assert [entry.name for entry in config.entries] == ["base", "bias"]
    assert config.training_seeds == [0, 1, 2]
    assert (config.training.steps, config.sampling.num_images) == (3, 60)
    out = capsys.readouterr().out
    assert "Left out: odd." in out
    assert "nowhere" in out


def test_without_held_out_images_the_metric_is_against_the_training_images(tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr(protocol, "default_entries", lambda *_: [EntryConfig("base", "none")])
    config = CompareConfig(output_dir=str(tmp_path), hours=1.0)
    config.data.source = str(tmp_path)
    assert with_plan(config).metric == "fid_train"
    assert "No images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": [{"name": "a", "method": "dmp"}], "hours": 1.0}, "leave out either hours or entries"),
        ({"hours": 1.0, "dtype": "bfloat16"}, "which dtype='bfloat16' spoils"),
        ({"hours": 1e-6}, "hours=1e-06 are too few"),
        ({"hours": 1.0, "model": "nowhere"}, "No model at 'nowhere'"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_any_job(tmp_path, capsys, small, changes, message):
    assert study("compare", tmp_path, **{**SMALL, **changes}) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "jobs").exists()


def test_a_directory_of_a_comparison_of_entries_is_refused(tmp_path, small):
    (tmp_path / "jobs").mkdir()
    with pytest.raises(UserError, match="holds a comparison of entries"):
        with_plan(CompareConfig(output_dir=str(tmp_path), hours=1.0))


def test_seconds_are_measured(tmp_path):
    config = CompareConfig(output_dir=str(tmp_path), sampling=SamplingConfig(num_images=8, num_inference_steps=4))
    config.training.batch_size = 8
    per_step, per_image = protocol.measure_seconds(config)
    assert 1e-5 < per_step < 10.0
    assert 1e-6 < per_image < 10.0
    assert not (tmp_path / "learned").exists()


def test_rows_by_timestep_are_left_out_for_a_model_that_is_told_none(tmp_path, capsys, small, tiny_dit):
    save_denoiser(tiny_dit(learn_sigma=False), EDMEulerScheduler(), tmp_path / "model")
    config = CompareConfig(output_dir=str(tmp_path), model=str(tmp_path / "model"), hours=1.0)
    config.sampling.scheduler = "EDMEulerScheduler"
    rows = {entry.name for entry in with_plan(config).entries}
    assert {"recommended", "DMP as in the paper", "base"} <= rows
    assert not rows & {"stage LoRA", "LoRAs by range", "copies by range", "free: dpmsolver++"}
    assert not rows & {"free: trailing timesteps", "free: ddpm, 4 times the steps"}
    assert not rows & {"stage LoRA, then recommended", "stage LoRA, 2 times the steps"}
    out = capsys.readouterr().out
    assert all(f"Left out: {row}. " in out for row in ("stage LoRA", "LoRAs by range", "copies by range"))

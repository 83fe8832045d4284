"""`stagepatch compare`: what it refuses, what it resumes, what it says."""

import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scipy import stats

from stagepatch.checkpoints import load_denoiser, save_denoiser
from stagepatch.core import read_json, read_tensors
from stagepatch.evaluation import difference
from stagepatch.sampling import SamplingConfig
from stagepatch.studies.compare_config import CompareConfig, EntryConfig
from stagepatch.studies.compare_jobs import CompareJob
from stagepatch.studies.compare_page import COLUMNS, JUDGED, note, short
from stagepatch.studies.compare_plan import plan_jobs
from stagepatch.studies.compare_results import SIGNIFICANCE
from stagepatch.training import TrainConfig, TrainingConfig
from tests.sampling.test_experts import drawn_method
from tests.studies.conftest import study, write_config

ENTRIES = [
    {"name": "base", "method": "none"},
    {"name": "DMP", "method": "dmp", "training": {"learning_rate": 0.01}},
    {"name": "bias", "method": "bitfit", "training": {"learning_rate": 0.01}},
]
SMALL = {
    "entries": ENTRIES,
    "training": {"steps": 4, "batch_size": 8, "log_every": 1},
    "sampling": {"num_images": 60, "num_inference_steps": 2, "batch_size": 60},
    "evaluate_every": 2,
}


def compare(folder, *more, **changes):
    return study("compare", folder, *more, **{**SMALL, **changes})


def results_of(folder):
    """Rows by name."""
    return {row["name"]: row for row in json.loads((folder / "out" / "results.json").read_text())}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of SMALL that is done."""
    folder = tmp_path_factory.mktemp("compared")
    assert compare(folder) == 0
    return folder


@pytest.fixture
def done(compared, tmp_path):
    """One of its own for a test that goes on with it."""
    shutil.copytree(compared / "out", tmp_path / "out")
    return tmp_path


def test_table_curves_and_samples_of_every_entry(tmp_path, capsys):
    assert compare(tmp_path, training_seeds=[0, 1]) == 0
    out, results = tmp_path / "out", results_of(tmp_path)
    assert list(results) == ["base", "DMP", "bias"]
    dmp = results["DMP"]
    assert set(results["base"]["curve"]) == {"0"}
    assert set(dmp["curve"]) == set(dmp["differences"]) == {"2", "4"}
    assert results["bias"]["trainable"] < results["bias"]["total"]
    assert dmp["seconds_per_step"] > 0
    assert dmp["peak_memory"] > 1e7
    assert dmp["file_size"] == (out / "jobs" / "dmp-0" / "learned" / "model.safetensors").stat().st_size
    # The difference is that of the jobs' own metrics, paired by sampling seed.
    metrics = {name: read_json(out / "jobs" / name / "metrics.json") for name in ("base", "dmp-0", "dmp-1")}
    values = (metrics["base"]["0"], metrics["dmp-0"]["4"], metrics["dmp-1"]["4"])
    base, *others = (sum(each["fid_held_out"] for each in by_seed) / 3 for by_seed in values)
    runs = [other - base for other in others]
    assert math.isclose(dmp["differences"]["4"]["mean"], sum(runs) / 2)
    assert math.isclose(dmp["differences"]["4"]["p_value"], stats.ttest_1samp(runs, 0).pvalue)
    assert metrics["dmp-0"] != metrics["dmp-1"]
    rows = list(csv.reader((out / "table.csv").open()))
    assert [row[0] for row in rows] == ["method", "base", "DMP", "bias"]
    assert "two-sided t-test. The unit of both is a training run" in (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    for text in ("Over iterations", "Gain against cost", "Samples: DMP", "&#39;base&#39; left of the slider"):
        assert text in page
    assert page.count('type="range"') == 2, "a slider over the base for each method"
    assert "held-out images at 4" in " ".join(capsys.readouterr().out.replace("┃", " ").split())


@pytest.mark.usefixtures("unpictured")
def test_what_is_done_is_skipped_and_the_table_is_the_same(done, monkeypatch, capsys):
    first = (done / "out" / "results.json").read_text()
    monkeypatch.setattr("stagepatch.studies.compare_jobs.Run", None)
    monkeypatch.setattr("stagepatch.studies.compare_jobs.Evaluator", None)
    assert compare(done) == 0
    assert (done / "out" / "results.json").read_text() == first
    assert "3 jobs, 3 of them done" in capsys.readouterr().out


def test_killed_in_two_processes_it_goes_on_and_ends_with_the_same_table(tmp_path):
    training = {"steps": 150, "batch_size": 32, "checkpoint_every": 20, "log_every": 10}
    changes = {**SMALL, "training": training, "evaluate_every": 0}
    config = write_config(tmp_path, **changes, launch={"executor": "local", "workers": 2})
    command = [sys.executable, "-m", "stagepatch", "compare", f"--config={config}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "out" / "jobs" / "dmp-0" / "learned" / "checkpoint.safetensors"
    deadline = time.time() + 120
    while not checkpoint.exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    assert not (tmp_path / "out" / "results.json").exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert compare(tmp_path / "whole", **changes) == 0
    killed, whole = results_of(tmp_path), results_of(tmp_path / "whole")
    assert list(killed) == list(whole)
    for name, key in itertools.product(whole, ("curve", "differences", "metrics", "trainable")):
        assert killed[name][key] == whole[name][key]


def test_job_of_two_processes_ends_with_the_same_patch(tmp_path):
    results = []
    for processes in (1, 2):
        launch = {"executor": "local", "workers": 1, "processes": processes}
        folder = tmp_path / str(processes)
        assert compare(folder, entries=ENTRIES[:2], launch=launch) == 0
        results.append(read_tensors(folder / "out" / "jobs" / "dmp-0" / "learned" / "model.safetensors")[0])
    assert len(list((tmp_path / "2" / "out" / "logs").rglob("*_1_log.out"))) == 2
    for name, alone in results[0].items():
        torch.testing.assert_close(results[1][name], alone, rtol=1e-4, atol=1e-5)


def test_terminal_shows_the_last_checkpoint_of_each_entry():
    judged = ["difference to base", "in percent", "p", "p (Holm)"]
    columns = [*COLUMNS, "FID at 2", "FID at 4", *JUDGED]
    whole = ["b", "9", "1%", "", "", "", "0.5", "0.4", "d", "e", "f", "g"]
    shorter = ["a", "9", "2%", "", "", "", "0.3", "", "d", "e", "f", "g"]
    names, cells = short(columns, [whole])
    assert (names, cells) == (["method", "share", "FID at 4", *judged], [["b", "1%", "0.4", "d", "e", "f", "g"]])
    names, cells = short(columns, [whole, shorter])
    assert names[2] == "FID at the end"
    assert [row[2] for row in cells] == ["0.4", "0.3"]


@pytest.mark.parametrize(("metric", "better"), [("fid_train", "Lower"), ("kid", "Lower"), ("recall", "Higher")])
def test_the_note_says_which_way_the_metric_is_better(metric, better):
    job = CompareJob(Path(), TrainConfig(), "dmp", SamplingConfig(), [1, 2, 3], "digits", [10])
    assert note([job], metric).endswith(f" {better} is better.")


@pytest.mark.usefixtures("unpictured")
def test_quick_form_is_short_and_keeps_its_own_directory(tmp_path):
    training = {"steps": 80, "batch_size": 8, "log_every": 1}
    entries = [*ENTRIES[:2], {"name": "long", "method": "dmp", "training": {"steps": 4000}}]
    assert compare(tmp_path, "--quick", training=training, entries=entries, training_seeds=[0, 1]) == 0
    jobs = tmp_path / "out-quick" / "jobs"
    assert {path.name for path in jobs.iterdir()} == {"base", "dmp-0", "long-0"}
    assert read_json(jobs / "long-0" / "job.json")["training"]["steps"] == 2


def entry(method="dmp", **more):
    return {"entries": [{"name": "a", "method": method, **more}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entries": []}, "entries is empty"),
        (entry("dpm"), "Entry 'a': No method 'dpm'. Methods: dmp"),
        ({"entries": [{"name": "A b", "method": "dmp"}, {"name": "a-b", "method": "lora"}]}, "Two entries are called"),
        (entry(patch={"gaet": "none"}), "Entry 'a': patch has no key 'gaet'. Keys: "),
        (entry(patch={"gate": "mlp"}), "patch.gate is 'mlp': expected 'linear' or"),
        (entry("lora", lora={"targets": ["to_q"]}), "Entry 'a': lora targets=['to_q']"),
        (entry(patch={"sites": "attention"}), "Entry 'a': sites='attention'"),
        (entry(weighting={"name": "snr2"}), "weighting.name is 'snr2': expected 'constant' or"),
        (entry(training={"stepz": 2}), "Entry 'a': training has no key 'stepz'"),
        ({"sampling_seeds": [0, 1]}, "sampling_seeds=[0, 1] must be at least 3"),
        ({"model": "nowhere"}, "No model at 'nowhere'"),
        (entry("none", model="gone-{seed}"), "No model at 'gone-0'"),
        (entry("none", schedule="gone.yaml"), "gone.yaml"),
        (entry("none", learned="gone"), "No patch at 'gone'"),
        (entry(schedule="x.yaml"), "schedule and learned are sampled as they are"),
        ({"metric": "fiddle"}, "metric='fiddle' is none of"),
        ({"launch": {"executor": "debug", "workers": 0}}, "launch.workers=0"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_any_training(refused, changes, message):
    assert message in refused("compare", **{**SMALL, **changes})


def test_a_job_that_another_process_does_is_waited_for(tmp_path, works_after_another):
    (job,) = plan_jobs(CompareConfig(output_dir=str(tmp_path), entries=[EntryConfig(**ENTRIES[0])]))
    assert works_after_another(job)


def test_job_of_another_config_is_not_taken_for_done(done, capsys):
    assert compare(done, sampling={"num_images": 80, "num_inference_steps": 2}) == 2
    error = capsys.readouterr().err
    assert "holds a job of another config" in error
    assert "sampling.num_images was 60, is 80" in error


@pytest.mark.usefixtures("unpictured")
def test_jobs_written_before_an_option_existed_count_as_done(done, capsys):
    path = done / "out" / "jobs" / "dmp-0" / "job.json"
    then = read_json(path)
    del then["patch"]["num_experts"], then["training"]["max_grad_norm"], then["schedule"]
    path.write_text(json.dumps(then))
    assert compare(done) == 0
    then["patch"]["num_experts"] = 3
    path.write_text(json.dumps(then))
    assert compare(done) == 2
    assert "(patch.num_experts was 3, is 1)" in capsys.readouterr().err


@pytest.mark.usefixtures("unpictured")
def test_entries_start_from_models_and_schedules_of_their_own_seed(tmp_path):
    for seed in (0, 1):
        model, scheduler = load_denoiser("digits")
        for parameter in model.parameters():
            parameter.data *= 1.0 + 0.2 * (1 + seed)
        save_denoiser(model, scheduler, tmp_path / f"other-{seed}")
        experts = f"experts: [{{from: 0, to: 500}}, {{from: 500, to: 1000, model: other-{seed}}}]"
        (tmp_path / f"experts-{seed}.yaml").write_text(experts)
        drawn_method("lora", model, rank=1 + seed).save(tmp_path / f"lora-{seed}")
    other, schedule, lora = (str(tmp_path / name) for name in ("other-{seed}", "experts-{seed}.yaml", "lora-{seed}"))
    entries = [
        {"name": "base", "method": "none"},
        {"name": "other", "method": "none", "model": other},
        {"name": "experts", "method": "none", "schedule": schedule},
        {"name": "lora", "method": "none", "learned": lora},
        {"name": "lora on experts", "method": "none", "schedule": schedule, "learned": lora},
        {"name": "DMP on other", "method": "dmp", "model": other},
    ]
    assert compare(tmp_path, entries=entries, training_seeds=[0, 1], evaluate_every=0) == 0
    values = results_of(tmp_path)
    metrics = {path.parent.name: read_json(path) for path in tmp_path.glob("out/jobs/*/metrics.json")}
    rows = ("other", "experts", "lora", "lora-on-experts", "dmp-on-other")
    assert set(metrics) == {"base", *(f"{row}-{seed}" for row in rows for seed in (0, 1))}
    assert len({json.dumps(list(each.values())[-1]) for each in metrics.values()}) == 11
    assert values["base"]["is_base"]
    assert values["base"]["differences"] == {}
    assert set(values["experts"]["differences"]) == {"4"}
    assert (values["experts"]["trainable"], values["experts"]["file_size"]) == (0, 0)
    assert values["DMP on other"]["trainable"] > 0


@pytest.mark.usefixtures("unpictured")
def test_failed_job_is_named_with_its_log_and_the_others_are_finished(tmp_path, capsys, monkeypatch):
    entries = [*ENTRIES, {"name": "wild", "method": "finetune", "training": {"learning_rate": 9e18}}]
    assert compare(tmp_path, entries=entries) == 2
    error = capsys.readouterr().err
    assert "1 of 4 jobs failed: 'wild' (seed 0)" in error
    assert "is nan" in error or "is inf" in error
    assert (tmp_path / "out" / "jobs" / "bias-0" / "metrics.json").exists()


@pytest.mark.usefixtures("unpictured")
def test_all_methods_train_on_the_same_batches_noise_and_timesteps(tmp_path, seen):
    assert compare(tmp_path) == 0
    assert len(seen) == 8
    for dmp, bitfit in zip(seen[:4], seen[4:], strict=True):
        assert all(torch.equal(getattr(dmp, key), getattr(bitfit, key)) for key in ("x_start", "noise", "timesteps"))


def test_trainable_parameters_are_counted_on_the_meta_device():
    entries = [EntryConfig("a", "dmp"), EntryConfig("b", "finetune"), EntryConfig("c", "none")]
    config = CompareConfig(entries=entries, training=TrainingConfig(steps=2), sampling=SamplingConfig(num_images=10))
    counts = [job.trainable_parameters() for job in plan_jobs(config)]
    assert counts[1] == (329_224, 329_224)
    assert counts[2] == (0, 329_224)
    assert 0 < counts[0][0] < 20_000


def test_difference_is_judged_by_training_runs_where_there_are_several():
    paired = [[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]]
    change = difference(paired)
    assert change.mean == 3.0
    assert math.isclose(change.error, 1 / math.sqrt(3))
    assert math.isclose(change.p_value, stats.ttest_1samp([2.0, 3.0, 4.0], 0).pvalue)
    assert change.p_value < SIGNIFICANCE
    alone = difference([[1.0, 3.0, -2.0]])
    assert math.isclose(alone.p_value, stats.ttest_1samp([1.0, 3.0, -2.0], 0).pvalue)
    assert alone.p_value > SIGNIFICANCE
    assert difference([[0.0, 0.0, 0.0]]).p_value == 1.0

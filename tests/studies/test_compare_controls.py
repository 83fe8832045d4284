"""Rows that a method must beat, rows of other sampling and objectives, and the statistics of both."""

import json
import math
import threading

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats

from stagepatch.checkpoints import load_denoiser
from stagepatch.core import UserError, as_json, read_json, write_json
from stagepatch.data import DataConfig, in_memory, load_digits, load_training_data
from stagepatch.evaluation import (
    Evaluator,
    References,
    difference,
    difference_between,
    evaluator,
    holm,
    load_extractor,
)
from stagepatch.sampling import SamplingConfig
from stagepatch.studies import compare_jobs
from stagepatch.studies.compare_config import CompareConfig, EntryConfig
from stagepatch.studies.compare_page import note
from stagepatch.studies.compare_plan import plan_jobs
from stagepatch.training import Run, TrainingConfig
from tests.studies.conftest import study

DDO = {"method": "lora", "objective": "ddo", "ddo": {"sampling": {"num_images": 20, "num_inference_steps": 2}}}
ENTRIES = [
    {"name": "base", "method": "none"},
    {"name": "more steps", "method": "none", "sampling": {"num_inference_steps": 4}, "control": "free"},
    {"name": "bias", "method": "bitfit", "control": "steps"},
    {"name": "DMP", "method": "dmp", "training": {"learning_rate": 0.01}},
    {"name": "DDO", **DDO},
]
SMALL = {
    "entries": ENTRIES,
    "training": {"steps": 2, "batch_size": 8, "log_every": 1},
    "sampling": {"num_images": 60, "num_inference_steps": 2, "batch_size": 60},
}


def compare(folder, *more, **changes):
    return study("compare", folder, *more, **{**SMALL, **changes})


def values_of(folder, job, step, metric="fid_held_out"):
    return [each[metric] for each in read_json(folder / "out" / "jobs" / job / "metrics.json")[str(step)]]


class Pixels:
    """Stands for a second extractor of the digits, which have one alone."""

    name, fingerprint = "pixels", "pixels"

    def __call__(self, images):
        return images.flatten(1)


def test_methods_are_compared_with_every_control_run_by_run(tmp_path, capsys, monkeypatch):
    load = evaluator.load_extractor
    monkeypatch.setattr(evaluator, "load_extractor", lambda name: load(name) if name == "digits" else Pixels())
    assert compare(tmp_path, training_seeds=[0, 1, 2], second_extractor="fashion") == 0
    out = tmp_path / "out"
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())}
    assert {name for name, row in rows.items() if row["is_base"]} == {"base"}
    assert {name: row["runs"] for name, row in rows.items()} == dict(zip(rows, (1, 1, 3, 3, 3), strict=True))
    assert set(rows["DMP"]["against"]) == set(rows["DDO"]["against"]) == {"more steps", "bias"}
    assert rows["bias"]["against"] == rows["more steps"]["against"] == {}
    # A row that is not trained is paired with each run; a control that is trained, with that of the same seed.
    free = values_of(tmp_path, "more-steps", 2)
    runs = [
        sum(a - b for a, b in zip(values_of(tmp_path, f"dmp-{seed}", 2), free, strict=True)) / 3 for seed in range(3)
    ]
    found = rows["DMP"]["against"]["more steps"]
    assert math.isclose(found["mean"], sum(runs) / 3)
    assert math.isclose(found["p_value"], stats.ttest_1samp(runs, 0).pvalue)
    means = {job: [sum(values_of(tmp_path, f"{job}-{s}", 2)) / 3 for s in range(3)] for job in ("dmp", "bias")}
    assert math.isclose(rows["DMP"]["against"]["bias"]["p_value"], stats.ttest_rel(*means.values()).pvalue)
    # Methods alone are corrected for, and the page says all of it.
    raw = [rows[name]["differences"]["2"]["p_value"] for name in ("DMP", "DDO")]
    assert [rows[name]["holm"] for name in ("DMP", "DDO")] == pytest.approx(holm(raw))
    assert math.isnan(rows["bias"]["holm"])
    assert "fid_second" in rows["base"]["metrics"]
    page, table = (out / "report.html").read_text(), (out / "table.md").read_text()
    for text in ("Verdict", "Against the controls", "Sampled otherwise: more steps (4 steps of ddim)"):
        assert text in page
    spread = "Mean ± standard deviation over 3 training seed(s)"
    for text in ("p (Holm)", "in brackets 95% intervals", "more steps (free)", spread):
        assert text in table
    printed = capsys.readouterr().out
    assert "No method gains" in printed or "gains: fid_held_out" in printed
    # The fakes of all jobs are the same.
    (fakes,) = out.glob("fakes-*/00000.safetensors")
    assert len(load_file(fakes)["samples"]) == 20
    assert not list(out.glob("jobs/*/learned/fakes"))


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the usual example
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([0.01, math.nan, 0.02], [0.02, math.nan, 0.02]),
        ([], []),
    ],
)
def test_holm(p_values, corrected):
    assert holm(p_values) == pytest.approx(corrected, nan_ok=True)


def test_interval_is_that_of_students_t():
    runs = [2.0, 3.0, 4.5]
    expected = stats.ttest_1samp(runs, 0).confidence_interval(0.95)
    assert difference([[run, run] for run in runs]).interval == pytest.approx((expected.low, expected.high))
    assert all(math.isnan(limit) for limit in difference([[1.0]]).interval)


def test_runs_of_other_seeds_are_compared_by_welch():
    one, other = [[1.0, 2.0], [2.0, 3.0], [4.0, 5.5]], [[7.0, 8.0], [9.0, 9.0]]
    found = difference_between(one, other)
    test = stats.ttest_ind([1.5, 2.5, 4.75], [7.5, 9.0], equal_var=False)
    assert math.isclose(found.mean, (1.5 + 2.5 + 4.75) / 3 - 8.25)
    assert math.isclose(found.p_value, test.pvalue)
    assert math.isclose(found.error, math.sqrt(stats.sem([1.5, 2.5, 4.75]) ** 2 + stats.sem([7.5, 9.0]) ** 2))
    limits = test.confidence_interval(0.95)
    assert found.interval == pytest.approx((limits.low, limits.high))


def test_one_run_is_paired_by_sampling_seed():
    found = difference_between([[1.0, 2.0, 4.0]], [[2.0, 2.5, 4.0]])
    assert math.isclose(found.p_value, stats.ttest_rel([1.0, 2.0, 4.0], [2.0, 2.5, 4.0]).pvalue)


def plan(tmp_path, *entries, **changes):
    return plan_jobs(CompareConfig(output_dir=str(tmp_path), entries=[EntryConfig(**e) for e in entries], **changes))


def test_fakes_are_shared_by_all_that_learn_from_the_same(tmp_path):
    other = {"name": "c", "method": "lora", "objective": "ddo"}
    jobs = plan(
        tmp_path,
        {"name": "a", **DDO},
        {"name": "b", **DDO, "lora": {"rank": 2}},
        other,
        {**other, "name": "d", "model": "fashion"},
        {**other, "name": "e", "ddo": {"fakes": "elsewhere"}},
    )
    a, b, c, d, e = (job.config.ddo.fakes for job in jobs)
    assert a == b != c == str(tmp_path / "fakes")
    assert (d, e) == ("", "elsewhere")
    assert "fakes" in jobs[0].identity()["ddo"].__dict__
    assert jobs[4].identity()["ddo"].fakes == ""


@pytest.mark.usefixtures("unpictured")
def test_entry_goes_on_from_what_a_run_of_its_seed_learned(tmp_path):
    first = [{"name": "a", "method": "lora"}]
    assert compare(tmp_path / "first", entries=first, training_seeds=[0, 1]) == 0
    learned = str(tmp_path / "first" / "out" / "jobs" / "a-{seed}" / "learned")
    entries = [{"name": "b", "method": "lora", "start_from": learned, "training": {"learning_rate": 0.0}}]
    assert compare(tmp_path / "then", entries=entries, training_seeds=[0, 1]) == 0
    for seed in (0, 1):
        jobs = [tmp_path / folder / "out" / "jobs" / f"{n}-{seed}" for folder, n in (("first", "a"), ("then", "b"))]
        weights = [load_file(job / "learned" / "pytorch_lora_weights.safetensors") for job in jobs]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert values_of(tmp_path / "first", f"a-{seed}", 2) == values_of(tmp_path / "then", f"b-{seed}", 2)
    assert read_json(jobs[1] / "job.json")["start_from"].endswith("a-1/learned")


@pytest.mark.usefixtures("unpictured")
def test_entry_goes_on_from_what_an_entry_above_learned_with_its_seed(tmp_path):
    still = {"method": "lora", "after": "a, again", "training": {"learning_rate": 0.0}}
    entries = [
        {"name": "a", "method": "lora"},
        {"name": "a, again", "method": "lora", "sampling": {"num_inference_steps": 3}},  # of the training of 'a'
        {"name": "b", **still},
        {"name": "c", **still, "after": "b", "training": {"learning_rate": 0.01}},
    ]
    config = CompareConfig(output_dir=str(tmp_path / "out"), entries=[EntryConfig(**each) for each in entries])
    config.training_seeds, config.launch.executor = [0, 1], "debug"
    config.training, config.sampling = TrainingConfig(**SMALL["training"]), SamplingConfig(**SMALL["sampling"])
    jobs = {(job.name, job.config.training.seed): job for job in plan_jobs(config)}
    jobs["b", 1].run()  # whatever its turn, what it goes on from is trained first
    assert not jobs["a", 1].is_done()
    assert compare(tmp_path, entries=entries, training_seeds=[0, 1]) == 0
    for seed in (0, 1):
        folders = [tmp_path / "out" / "jobs" / f"{name}-{seed}" for name in "abc"]
        a, b, c = (load_file(folder / "learned" / "pytorch_lora_weights.safetensors") for folder in folders)
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not any(torch.equal(a[name], c[name]) for name in a if "lora_" in name)
        assert values_of(tmp_path, f"a-{seed}", 2) == values_of(tmp_path, f"b-{seed}", 2)
    assert values_of(tmp_path, "b-0", 2) != values_of(tmp_path, "b-1", 2)


def test_entry_that_went_on_from_another_row_is_another_job(tmp_path):
    rows = [{"name": name, "method": "lora", "lora": {"rank": 2}} for name in "ab"]
    rows[1]["training"] = {"learning_rate": 0.1}
    last = {"name": "c", "method": "lora", "lora": {"rank": 2}}
    config = CompareConfig(output_dir=str(tmp_path / "out"))
    config.entries = [EntryConfig(**each) for each in (*rows, {**last, "after": "a"})]
    *_, job = plan_jobs(config)
    write_json(job.directory / "job.json", as_json(job.identity()))
    config.entries[-1] = EntryConfig(**last, after="b")
    with pytest.raises(UserError, match=r"after was a, is b"):
        plan_jobs(config)


YOUNG = ("held_out", "second_extractor", "start_from", "objective", "num_stages")


@pytest.mark.usefixtures("unpictured")
def test_job_begun_before_these_options_goes_on(tmp_path):
    assert compare(tmp_path, entries=ENTRIES[3:4]) == 0
    job = tmp_path / "out" / "jobs" / "dmp-0"
    first = (job / "metrics.json").read_text()
    for name in ("metrics.json", "cost.json"):
        (job / name).unlink()
    record = {key: value for key, value in read_json(job / "job.json").items() if key not in YOUNG}
    (job / "job.json").write_text(json.dumps(record))
    path = job / "learned" / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    identity = {key: value for key, value in json.loads(metadata["identity"]).items() if key not in YOUNG}
    save_file(load_file(path), path, {**metadata, "identity": json.dumps(identity)})
    assert compare(tmp_path, entries=ENTRIES[3:4]) == 0
    assert (job / "metrics.json").read_text() == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_extractor": "fashion"}, "second_extractor was , is fashion"),
        ({"model": "fashion", "data": {"source": "fashion"}}, "model was digits, is fashion"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unpictured")
def test_job_that_was_measured_otherwise_is_not_taken_for_done(tmp_path, capsys, changes, message):
    assert compare(tmp_path, entries=ENTRIES[:1]) == 0
    assert compare(tmp_path, entries=ENTRIES[:1], **changes) == 2
    assert message in capsys.readouterr().err


def test_fakes_are_made_by_one_job_while_others_wait(tmp_path, monkeypatch):
    jobs = plan(tmp_path, {"name": "a", **DDO}, {"name": "b", **DDO, "lora": {"rank": 2}})
    inside, most, load = [], [], Run.load_fakes

    def watched(run):
        inside.append(1)
        most.append(len(inside))
        try:
            return load(run)
        finally:
            inside.pop()

    monkeypatch.setattr(compare_jobs.Run, "load_fakes", watched)
    monkeypatch.setattr(compare_jobs.Run, "train", lambda run, progress: None)
    threads = [threading.Thread(target=job._train_one) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1, 1]


def entry(method="dmp", **more):
    return {"entries": [{"name": "a", "method": method, **more}]}


def after(name, above):
    rows = [{"name": "base", "method": "none"}, {"name": "a", **above}, {"name": "b", "method": "lora", "after": name}]
    return {"entries": [row for row in rows if "method" in row]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (entry("none", sampling={"num_images": 9}), "sampling.num_images and sampling.seed are the same"),
        (entry("none", sampling={"seed": 9}), "sampling.num_images and sampling.seed are the same"),
        (entry(sampling={"stepz": 9}), "Entry 'a': sampling has no key 'stepz'"),
        (entry(ddo={"beta": 1.0}), "ddo is of objectives 'ddo' and 'samples'"),
        (entry(objective="ddo", ddo={"betta": 1.0}), "ddo has no key 'betta'"),
        (entry("none", objective="ddo"), "method='none' trains nothing"),
        (entry("none", start_from="x"), "method='none' trains nothing"),
        (entry(start_from="gone"), "gone"),
        (entry("none", after="x"), "method='none' trains nothing"),
        (entry("none", sampling={"guide": "{learned}"}), "sampling.guide='{learned}' is what an entry learns"),
        (entry("lora", num_stages=2, sampling={"guide": "{learned}"}), "is what an entry learns in one training"),
        (entry(after="x", start_from="y"), "start_from and after both say"),
        (after("a", {}), "Entry 'b': after='a' is no entry above this one: 'base'."),
        (after("base", {}), "after='base' leaves no training to go on from"),
        (after("a", {"method": "lora", "num_stages": 2}), "after='a' leaves no training to go on from"),
        (after("a", {"method": "bitfit"}), "after='a' needs the same method here as there: bitfit, not lora."),
        (after("a", {"method": "lora", "lora": {"rank": 2}}), "after='a' needs the same lora here as there"),
        ({"metric": "fid_second"}, "metric='fid_second' is in the features of second_extractor"),
        ({"second_extractor": "digits"}, "is the extractor itself"),
        ({"data": {"source": "gone"}}, "No images of 'gone' are held out"),
        ({"held_out": "tune"}, "held_out='tune' is of 'fashion' alone"),
    ],
    ids=str,
)
def test_bad_rows_are_refused_before_any_training(refused, changes, message):
    assert message in refused("compare", **{**SMALL, **changes})


@pytest.mark.usefixtures("unpictured")
def test_own_images_are_held_out_by_a_share(tmp_path):
    images, labels = load_digits("train")
    for number, (image, label) in enumerate(zip(images[:60], labels[:60], strict=True)):
        (tmp_path / "digits" / str(int(label))).mkdir(parents=True, exist_ok=True)
        pixels = ((image[0] + 1.0) * 127.5).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "digits" / str(int(label)) / f"{number}.png")
    data = {"source": str(tmp_path / "digits"), "held_out": 0.3}
    rows = [{"name": "base", "method": "none"}, {"name": "bias", "method": "bitfit"}]
    assert compare(tmp_path, entries=rows, data=data) == 0
    trained = load_training_data("digits", DataConfig(**data))
    assert trained[0]["image"].shape == (1, 8, 8)  # the model's own size and channels
    references = References(in_memory(trained), in_memory(trained.held_out))
    sampled = Evaluator(references, load_extractor("digits"))
    model, scheduler = load_denoiser("digits")
    sampling = SamplingConfig(**SMALL["sampling"], seed=1)
    expected = sampled.metrics(sampled.sample(model, scheduler, sampling), ["fid_held_out"])["fid_held_out"]
    assert values_of(tmp_path, "base", 0)[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("unpictured")
def test_what_starts_from_another_method_is_refused(tmp_path, capsys):
    assert compare(tmp_path / "first", entries=[{"name": "a", "method": "bitfit"}]) == 0
    learned = str(tmp_path / "first" / "out" / "jobs" / "a-0" / "learned")
    assert compare(tmp_path, **entry("lora", start_from=learned)) == 2
    assert "is of another method than 'lora'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"guidance_scale": 2.0}, "20 steps of ddim, guidance 2)"),
        ({"guidance_scale": 2.0, "guidance_interval": [0.2, 0.8]}, "20 steps of ddim, guidance 2 from 0.2 to 0.8)"),
        ({"scheduler": "pndm"}, "20 steps of pndm)"),
    ],
    ids=str,
)
def test_the_note_says_what_is_sampled_otherwise(tmp_path, changes, expected):
    jobs = plan(tmp_path, {"name": "free", "method": "none", "sampling": changes}, ENTRIES[0])
    assert f"(20 steps of ddim), the same noise for all. Sampled otherwise: free ({expected}." in note(jobs, "recall")


def test_the_note_names_all_that_is_sampled_otherwise_in_one_sentence(tmp_path):
    more = [{"name": f"{steps}", "method": "none", "sampling": {"num_inference_steps": steps}} for steps in (40, 80)]
    text = note(plan(tmp_path, *more, ENTRIES[0]), "recall")
    assert "Sampled otherwise: 40 (40 steps of ddim); 80 (80 steps of ddim). Differences" in text
    assert "Sampled otherwise" not in note(plan(tmp_path, ENTRIES[0]), "recall")


@pytest.mark.usefixtures("unpictured")
def test_a_guide_of_each_training_seed(tmp_path, capsys):
    samples = {"method": "lora", "objective": "samples", "ddo": DDO["ddo"]}
    entries = [ENTRIES[0], {"name": "worse", **samples, "training": {"learning_rate": 0.01}}]
    assert compare(tmp_path, entries=entries, training_seeds=[0, 1]) == 0
    guide = str(tmp_path / "out" / "jobs" / "worse-{seed}" / "learned")
    guided = {"name": "guided", "method": "none", "sampling": {"guide": guide, "guide_scale": 3.0}}
    assert compare(tmp_path, entries=[*entries, guided], training_seeds=[0, 1]) == 0
    found = [values_of(tmp_path, f"guided-{seed}", 2) for seed in (0, 1)]
    assert found[0] != found[1]
    itself = {**entries[1], "name": "itself", "sampling": {"guide": "{learned}", "guide_scale": 3.0}}
    assert compare(tmp_path, "--evaluate_every=1", entries=[ENTRIES[0], itself], training_seeds=[0, 1]) == 0
    assert [values_of(tmp_path, f"itself-{seed}", 2) for seed in (0, 1)] == found
    assert values_of(tmp_path, "itself-0", 1) != found[0]
    assert "guided by what it learned, 3" in (tmp_path / "out" / "table.md").read_text()
    assert compare(tmp_path, entries=[*entries, guided], training_seeds=[0, 1]) == 0
    assert found[0] != values_of(tmp_path, "base", 0)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "guided by" in table
    assert "corrected for 2 methods" in table or "No method gains" in table  # it and the patch that it is
    assert compare(tmp_path, entries=[ENTRIES[0], {**guided, "sampling": {"guide": "nowhere"}}]) == 2
    assert "Entry 'guided': Nothing at 'nowhere'" in capsys.readouterr().err

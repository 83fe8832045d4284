"""`stagepatch merge`."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stagepatch.checkpoints import load_denoiser, model_fingerprint, save_denoiser
from stagepatch.cli import main
from stagepatch.core.process_state import processes
from stagepatch.diffusion import ObjectiveConfig, make_scheduler
from stagepatch.merging import MergeMethod, merge_models
from stagepatch.methods import load_learned, open_artifact
from stagepatch.patch import Patch, PatchConfig
from tests.runs import assert_same, imported_by, options
from tests.search.searches import save_learned
from tests.tiny_pipelines import PIPELINES

TINY = PIPELINES["UNet2DConditionModel"]


def stages_of(*directories):
    """The option that names them."""
    return f"--stages={[str(directory) for directory in directories]}"


def merged(capsys, *arguments):
    """What the command prints."""
    assert main(["merge", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, arguments, *expected):
    assert main(["merge", *arguments]) == 2
    message = capsys.readouterr().err
    for text in expected:
        assert text in message


def test_merged_model_is_a_pipeline(tmp_path, capsys):
    for seed, name in enumerate(("base", "one", "two")):
        TINY.build(seed=seed).save_pretrained(tmp_path / name)
    stages = stages_of(tmp_path / "one", tmp_path / "two")
    given = [f"--base={tmp_path / 'base'}", stages, f"--output_dir={tmp_path / 'out'}"]
    assert "The merged model is in" in merged(capsys, *given, "--weights=[0.0, 1.0]")
    assert_same(load_denoiser(tmp_path / "out")[0].state_dict(), load_denoiser(tmp_path / "two")[0].state_dict())
    assert TINY.call(TINY.load(tmp_path / "out")).isfinite().all()
    merged(capsys, *given, "--weights=[0.5, 0.5]", "--ties_keep=0.3")
    refused(capsys, [*given, "--weights=[0.5]"], "1 weights for 2 stages")
    refused(capsys, [*given, "--weights=[0.5, 0.5]", "--ties_keep=3"], "must be a share from 0 to 1")
    refused(capsys, ["--base=nowhere/at/all", stages, "--weights=[1, 1]"], "No model at")


def test_merged_lora_is_the_weighted_sum_of_the_stages(tmp_path, capsys):
    pipe = TINY.build()
    for number in range(2):
        save_learned("lora", TINY.build().unet, tmp_path / str(number), number)
    stages = stages_of(tmp_path / "0", tmp_path / "1")
    assert "The merged LoRA" in merged(capsys, stages, "--weights=[1.0, 0.0]", f"--output_dir={tmp_path / 'out'}")
    weights = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert any(4 in value.shape for value in weights.values())
    load_learned(pipe.unet, tmp_path / "out")
    first = TINY.build()
    load_learned(first.unet, tmp_path / "0")
    torch.testing.assert_close(TINY.call(pipe), TINY.call(first), rtol=1e-4, atol=1e-5)
    refused(capsys, [stages, "--weights=[1.0, 0.0]", "--ties_keep=0.5"], "would not be a LoRA")
    fisher = ["--merge_method=fisher", "--fisher_samples=2"]
    refused(capsys, [stages, "--weights=[1.0, 0.0]", *fisher], "merged by 'fisher' would not be a LoRA")
    merged(
        capsys, stages, "--weights=[0.5, 1.0]", "--merge_method=dare", "--dare_drop=0.5", f"--output_dir={tmp_path}/d"
    )
    dropped = load_file(tmp_path / "d" / "pytorch_lora_weights.safetensors")
    assert {name: value.shape for name, value in dropped.items()} == {n: value.shape for n, value in weights.items()}
    assert all(0.0 < float((value == 0).double().mean()) < 1.0 for value in dropped.values())


def test_dropped_and_rescaled_model_is_what_the_library_merges(decoupled, capsys):
    given = [*stages_and_output(decoupled), "--weights=[0.5, 0.5]"]
    stages = [decoupled / "run" / "stages" / str(number) for number in range(2)]
    for name, method in (
        ("dare", MergeMethod("dare", dare_drop=0.9, seed=4)),
        ("dare_ties", MergeMethod("dare_ties", ties_keep=0.05, dare_drop=0.9, seed=4)),
    ):
        more = ["--merge_method", name, "--dare_drop=0.9", "--seed=4", f"--ties_keep={method.ties_keep}"]
        merged(capsys, *given, *more)
        merge_models(decoupled / "base", stages, [0.5, 0.5], decoupled / name, method)
        ours, theirs = (load_denoiser(decoupled / output)[0].state_dict() for output in ("out", name))
        assert_same(ours, theirs)
    merged(capsys, *given, "--merge_method=ties", "--ties_keep=0.3")
    named = load_denoiser(decoupled / "out")[0].state_dict()
    merged(capsys, *given, "--ties_keep=0.3")
    assert_same(load_denoiser(decoupled / "out")[0].state_dict(), named)


def test_fisher_merged_model_is_the_mean_by_each_stages_fisher(decoupled, tiny_dit, capsys, monkeypatch):
    stages = [decoupled / "run" / "stages" / str(number) for number in range(2)]
    for number, stage in enumerate(stages):
        facts = json.loads((stage / "stage.json").read_text()) | {"from": 500 * number, "to": 500 * number + 500}
        (stage / "stage.json").write_text(json.dumps(facts))
    given = [*stages_and_output(decoupled), "--merge_method=fisher", "--weights=[1.0, 3.0]"]
    fisher = [*given, "--fisher_samples=5"]
    merged(capsys, *fisher)
    files = [decoupled / "out" / "fisher" / f"{number}.safetensors" for number in range(2)]
    ours = load_denoiser(decoupled / "out")[0].state_dict()
    theirs = [load_denoiser(stage)[0].state_dict() for stage in stages]
    fishers = [load_file(path) for path in files]
    norms = [sum(float(value.double().square().sum()) for value in each.values()) ** 0.5 for each in fishers]
    name = "x_embedder.proj.weight"  # all of which both losses feel
    one, two = (each[name].double() / norm for each, norm in zip(fishers, norms, strict=True))
    expected = (one * theirs[0][name] + 3 * two * theirs[1][name]) / (one + 3 * two)
    torch.testing.assert_close(ours[name].double(), expected, rtol=1e-4, atol=1e-6)
    assert open_artifact(decoupled / "out").kind == "model"
    times = [path.stat().st_mtime_ns for path in files]
    merged(capsys, *fisher, "--fisher_normalize=false")
    assert [path.stat().st_mtime_ns for path in files] == times  # are not made again
    assert not torch.equal(load_denoiser(decoupled / "out")[0].state_dict()[name], ours[name])
    monkeypatch.setattr("stagepatch.merging.fisher.diagonal_fisher", lambda *_: pytest.fail("drawn"))
    refused(capsys, given, "needs fisher_samples")
    refused(capsys, [*fisher, "--weights=[0, 0]", "--seed=1"], "shares of a mean")
    refused(capsys, [*fisher, "--weights=[]", *SEARCH], "are not searched for")
    save_denoiser(tiny_dit(0, in_channels=3), make_scheduler(ObjectiveConfig()), decoupled / "colour")
    of_colour = [f"--base={decoupled / 'colour'}", stages_of(decoupled / "colour"), "--weights=[1]"]
    refused(capsys, [*fisher, *of_colour], "have 1 channel(s), but the model takes 3")


def test_options_of_other_methods_are_refused(decoupled, capsys):
    given = [*stages_and_output(decoupled), "--weights=[0.5, 0.5]"]
    for more, message in (
        (["--merge_method=dare"], "merge_method='dare' needs dare_drop"),
        (["--merge_method=ties"], "merge_method='ties' needs ties_keep"),
        (["--dare_drop=0.5"], "dare_drop is an option of merge_method dare or dare_ties, not of 'sum'"),
        (["--merge_method=sum", "--ties_keep=0.5"], "ties_keep is an option of merge_method ties or dare_ties"),
        (["--fisher_samples=5"], "options of merge_method fisher, not of 'sum'"),
        (["--merge_method=dare", "--dare_drop=0.5", "--fisher_normalize=false"], "merge_method fisher, not of 'dare'"),
        (["--merge_method=fisher", "--fisher_samples=5", "--dare_drop=0.5"], "not of 'fisher'"),
        (["--merge_method=slerp"], "slerp"),
    ):
        refused(capsys, [*given, *more], message)
    assert not (decoupled / "out").exists()


def test_searched_weights_are_of_the_dropped_task_vectors(decoupled, capsys):
    given = [*stages_and_output(decoupled), *SEARCH, "--search.strategies=[grid]"]
    dare = [*given, "--merge_method=dare", "--dare_drop=0.5"]
    merged(capsys, *dare)
    found = json.loads((decoupled / "out" / "search.json").read_text())["best"]["weights"]
    stages = [decoupled / "run" / "stages" / str(number) for number in range(2)]
    merge_models(decoupled / "base", stages, found, decoupled / "expected", MergeMethod("dare", dare_drop=0.5))
    ours, theirs = (load_denoiser(decoupled / output)[0].state_dict() for output in ("out", "expected"))
    assert_same(ours, theirs)
    for other in ([*dare, "--seed=1"], [*given, "--merge_method=dare_ties", "--dare_drop=0.5"], given):
        refused(capsys, other, "holds evaluations of something else (dare was")


@pytest.mark.parametrize("stages", ["[]", "['nowhere']"])
def test_missing_stages_are_named(tmp_path, capsys, stages):
    TINY.build().save_pretrained(tmp_path / "base")
    given = [f"--base={tmp_path / 'base'}", f"--stages={stages}", "--weights=[]", f"--output_dir={tmp_path / 'out'}"]
    refused(capsys, given, "stagepatch merge:")


STRATEGIES = {"strategies": "[grid, tpe, cma]", "evaluations": 4, "coarse": [0.0, 1.0], "fine": [-0.5, 0.0]}
SEARCH = options("search", STRATEGIES) + options("sampling", {"num_images": 12, "num_inference_steps": 2})


@pytest.fixture
def decoupled(tiny_dit, tmp_path):
    """A base, and two stages as `stagepatch decouple` leaves them in 'run'."""
    scheduler = make_scheduler(ObjectiveConfig())
    save_denoiser(tiny_dit(0), scheduler, tmp_path / "base")
    for number in range(2):
        stage = tmp_path / "run" / "stages" / str(number)
        save_denoiser(tiny_dit(number + 1), scheduler, stage)
        write_facts(stage, tmp_path / "base")
    return tmp_path


def stages_and_output(decoupled):
    return [stages_of(decoupled / "run"), f"--output_dir={decoupled / 'out'}"]


def write_facts(stage, base):
    facts = {"base": {"source": str(base), "fingerprint": model_fingerprint(base)}}
    (stage / "stage.json").write_text(json.dumps(facts))


def test_searched_model_is_the_merge_by_the_best_weights(decoupled, capsys):
    out = decoupled / "out"
    given = [*stages_and_output(decoupled), *SEARCH]
    printed = merged(capsys, *given)
    assert all(name in printed for name in ("grid", "tpe", "cma", "best weights", "fid_train", "The merged model"))
    found = json.loads((out / "search.json").read_text())
    strategies = found["strategies"]
    evaluated_once = len({tuple(one["weights"]) for one in strategies["grid"]})
    assert {name: len(ones) for name, ones in strategies.items()} == {"grid": evaluated_once, "tpe": 4, "cma": 4}
    assert found["best"]["value"] == min(one["value"] for ones in strategies.values() for one in ones)
    assert all(ones[0]["weights"] == [0.0, 0.0] for ones in strategies.values())
    assert len({ones[0]["value"] for ones in strategies.values()}) == 1
    assert (out / "search.png").stat().st_size > 1000
    assert yaml.safe_load((out / "run.yaml").read_text())["search"]["evaluations"] == 4
    stages = [decoupled / "run" / "stages" / str(number) for number in range(2)]
    merge_models(decoupled / "base", stages, found["best"]["weights"], decoupled / "expected")
    assert_same(load_denoiser(out)[0].state_dict(), load_denoiser(decoupled / "expected")[0].state_dict())
    journal = (out / "search.journal").stat().st_size
    merged(capsys, *given, "--sampling.batch_size=5")  # all is there already
    assert json.loads((out / "search.json").read_text()) == found
    assert (out / "search.journal").stat().st_size - journal < 5000
    refused(capsys, [*given, "--sampling.seed=1"], "holds evaluations of something else (sampling.seed was 0, is 1)")
    refused(capsys, [*given, "--weights=[1, 1]"], "not both")
    shutil.copytree(stages[0] / "transformer", stages[1] / "transformer", dirs_exist_ok=True)
    refused(capsys, given, "something else (stages was")


def test_search_over_loras_writes_a_lora(decoupled, capsys):
    for number in range(2):
        save_learned("lora", load_denoiser(decoupled / "base")[0], decoupled / f"lora{number}", number)
    loras = stages_of(decoupled / "lora0", decoupled / "lora1")
    given = [loras, f"--output_dir={decoupled / 'out'}", *SEARCH, "--search.strategies=[grid]"]
    refused(capsys, given, "No base to merge the stages into")
    assert "The merged LoRA" in merged(capsys, f"--base={decoupled / 'base'}", *given)
    found = json.loads((decoupled / "out" / "search.json").read_text())
    assert len({one["value"] for one in found["strategies"]["grid"]}) == len(found["strategies"]["grid"])
    merged(capsys, loras, f"--weights={found['best']['weights']}", f"--output_dir={decoupled / 'expected'}")
    ours, theirs = (load_file(decoupled / name / "pytorch_lora_weights.safetensors") for name in ("out", "expected"))
    assert_same(ours, theirs)


def test_searching_processes_of_a_launch_are_refused(decoupled, capsys, monkeypatch):
    monkeypatch.setattr(processes(), "num_processes", 2)
    monkeypatch.setattr("stagepatch.search.merge_search.load_denoiser", lambda *_: pytest.fail("loaded"))
    given = [*stages_and_output(decoupled), *SEARCH]
    refused(capsys, given, "start `stagepatch merge` several times instead")


def test_stages_of_another_base_are_refused_by_name(decoupled, tiny_dit, capsys):
    other = decoupled / "other"
    save_denoiser(tiny_dit(7), make_scheduler(ObjectiveConfig()), other)
    given = stages_and_output(decoupled)
    names = (f"The stage '{decoupled / 'run' / 'stages' / '0'}'", f"from '{decoupled / 'base'}'", f"from '{other}'")
    for weights in (["--weights=[1, 1]"], SEARCH):
        refused(capsys, [f"--base={other}", *given, *weights], "another base", *names)
    write_facts(decoupled / "run" / "stages" / "1", other)
    refused(capsys, [*given, "--weights=[1, 1]"], f"stages/1' was trained from another base: from '{other}'")
    assert not (decoupled / "out").exists()


def test_stages_of_another_architecture_are_refused_before_searching(decoupled, tiny_dit, capsys):
    stage = decoupled / "run" / "stages" / "1"
    save_denoiser(tiny_dit(1, num_layers=2), make_scheduler(ObjectiveConfig()), stage)
    refused(capsys, [*stages_and_output(decoupled), *SEARCH], f"'{stage}' has another architecture than the base")
    assert not (decoupled / "out").exists()


def test_stages_are_taken_in_their_order_and_their_base_from_them(decoupled, tiny_dit, capsys):
    for number in range(2, 11):
        shutil.copytree(decoupled / "run" / "stages" / "0", decoupled / "run" / "stages" / str(number))
    save_denoiser(tiny_dit(9), make_scheduler(ObjectiveConfig()), decoupled / "run" / "stages" / "10")
    merged(capsys, *stages_and_output(decoupled), f"--weights={[0.0] * 10 + [1.0]}")
    assert_same(load_denoiser(decoupled / "out")[0].state_dict(), tiny_dit(9).state_dict())


def test_what_cannot_be_merged_is_named(decoupled, capsys):
    model, _ = load_denoiser(decoupled / "base")
    Patch.create(model, PatchConfig()).save_pretrained(decoupled / "patch")
    save_learned("bitfit", model, decoupled / "biases")
    save_learned("lora", model, decoupled / "lora")
    one = decoupled / "run" / "stages" / "0"
    base = f"--base={decoupled / 'base'}"
    refused(capsys, [base, stages_of(decoupled / "patch")], "patch' is a patch", "sample --schedule")
    refused(capsys, [base, stages_of(decoupled / "biases")], "holds some of a model's weights")
    refused(capsys, [base, stages_of(decoupled / "lora", one)], "is a LoRA and", "of one kind")
    (one / "stage.json").unlink()
    refused(capsys, [stages_of(one), "--weights=[1]"], "No base to merge")
    (one / "transformer" / "config.json").unlink()
    refused(capsys, [base, stages_of(one)], "but part of a model", "killed while it was written")


def test_merging_by_given_weights_does_not_import_what_searching_needs(decoupled):
    script = "from stagepatch.cli import main; sys.exit(main(['merge', *sys.argv[1:]]))"
    imported = imported_by(script, *stages_and_output(decoupled), "--weights=[1, 0]")
    assert not imported & {"optuna", "sqlalchemy", "cmaes", "matplotlib", "torchmetrics"}

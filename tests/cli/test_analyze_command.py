"""`stagepatch analyze` from end to end: files, numbers, and a message for each mistake."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from stagepatch.checkpoints import load_denoiser
from stagepatch.cli import main
from stagepatch.core import write_json
from tests.runs import make_model, make_objective, run
from tests.search.searches import save_learned
from tests.tiny_pipelines import PIPELINES
from tests.training.test_train_on_pipelines import draw_images

SHORT = ["--timesteps=3", "--samples=4", "--batch_size=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base, a patch for it, a LoRA, and two models that were trained on from it, laid out as stages."""
    root = tmp_path_factory.mktemp("trained")
    run(root / "base", method="pretrain", steps=1)

    def base():
        return load_denoiser(root / "base")[0]

    run(root / "patch", model=base(), steps=4, learning_rate=0.1)
    for number in (0, 1):
        run(root / "stages" / str(number), method="pretrain", model=base(), steps=2, seed=number)
    save_learned("lora", base(), root / "lora" / "learned")
    return root


def analyze(trained, output, *more):
    return main(["analyze", f"--model={trained / 'base'}", f"--output_dir={output}", *SHORT, *more])


def analysed(trained, output, *more):
    """The numbers of the analysis."""
    assert analyze(trained, output, *more) == 0
    return json.loads((output / "analysis.json").read_text())


def test_everything_at_once(trained, tmp_path, capsys):
    learned = f"['{trained / 'patch'}', '{trained / 'lora' / 'learned'}', 'stage={trained / 'stages' / '0'}']"
    numbers = analysed(trained, tmp_path, f"--learned={learned}", f"--stages=['{trained}']")
    text = capsys.readouterr().out
    for expected in ("Cosine between task vectors", "Cosine between gradients", "Loss, held-out images", "Report:"):
        assert expected in text
    assert numbers["gradients"]["timesteps"] == [166, 500, 833]
    assert numbers["task_vectors"]["stages"] == ["0", "1"]
    for images in ("training images", "held-out images"):
        assert set(numbers["losses"][images]) == {"base", "patch", "lora", "stage"}
        for name in ("patch", "lora", "stage"):
            assert all(value != 0 for value in numbers["losses"][images][name]["difference"]["mean"])
    for name in ("gradients", "losses", "task_vectors"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 300
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "http" not in page.replace("http-equiv", "")
    before = (tmp_path / "analysis.json").read_text()
    assert main(["analyze", f"--config={tmp_path / 'run.yaml'}"]) == 0  # the resolved config is itself a config
    assert (tmp_path / "analysis.json").read_text() == before


def test_only_what_was_asked_is_computed(trained, tmp_path):
    stages = f"--stages=['a={trained / 'stages' / '0'}', 'b={trained / 'stages' / '1'}']"
    for given, part in [
        (["--losses=false", "--projection=64", "--parameters=attn"], "gradients"),
        (["--gradients=false", "--losses=false", stages], "task_vectors"),
    ]:
        assert set(analysed(trained, tmp_path, *given)) == {part}


def test_stages_of_two_trainings_are_named_by_theirs(trained, tmp_path, capsys):
    for name in ("first", "second"):
        for number in (0, 1):
            copy = tmp_path / name / "stages" / str(number)
            shutil.copytree(trained / "stages" / str(number if name == "first" else 1 - number), copy)
            write_json(copy / "stage.json", {"from": 500 * number, "to": 500 * (number + 1)})
    stages = f"--stages=['{tmp_path / 'first'}', '{tmp_path / 'second'}', 'base={trained / 'base'}']"
    numbers = analysed(trained, tmp_path / "out", stages, "--gradients=false", "--losses=false")["task_vectors"]
    assert numbers["stages"] == ["first/0", "first/1", "second/0", "second/1", "base"]
    assert numbers["pairs"]["same_range"] == pytest.approx([numbers["cosine"][0][1]] * 2)
    assert "the same range, trained again" in capsys.readouterr().out
    assert "trained again" in (tmp_path / "out" / "report.html").read_text()


def test_what_is_not_a_number_is_null(trained, tmp_path):
    stages = f"--stages=['same={trained / 'base'}', 'moved={trained / 'stages' / '0'}']"
    numbers = analysed(trained, tmp_path, stages, "--gradients=false", "--losses=false")
    assert "NaN" not in (tmp_path / "analysis.json").read_text()
    assert numbers["task_vectors"]["cosine"] == [[None, None], [None, pytest.approx(1.0)]]


def test_no_learned_gives_the_curve_of_the_base(trained, tmp_path):
    numbers = analysed(trained, tmp_path, "--gradients=false")
    assert set(numbers) == {"losses"}
    losses = numbers["losses"]
    assert set(losses["training images"]) == {"base"}
    assert losses["training images"]["base"] != losses["held-out images"]["base"]


def matrix_of(trained, output, model, *more):
    numbers = analysed(trained, output, f"--model={model}", "--losses=false", *more)
    return numbers["gradients"]["cosine"]


@pytest.mark.parametrize("method", ["pretrain", "dmp"])
def test_snapshots_of_a_run_are_compared_each_as_alone(trained, tmp_path, method):
    base = load_denoiser(trained / "base")[0]
    run(tmp_path / "run", method=method, model=base, steps=4, snapshot_every=2, learning_rate=0.1)
    given = ["--losses=false", "--timesteps=8", f"--snapshots={tmp_path / 'run'}"]
    numbers = analysed(trained, tmp_path / "out", *given)["snapshots"]
    assert list(numbers["iterations"]) == ["2", "4"]
    for name in ("all", "neighbours", "far", "first_quarter", "lowest"):
        assert numbers["iterations"]["2"][name] != numbers["iterations"]["4"][name]
    if method == "pretrain":  # whole models, which can be analysed alone
        singles = []
        for iteration, found in numbers["iterations"].items():
            snapshot = tmp_path / "run" / "snapshots" / f"{int(iteration):07d}"
            alone = matrix_of(trained, tmp_path / iteration, snapshot, "--timesteps=8")
            cosines = np.array(alone["matrix"])
            singles.append(cosines)
            assert found["all"] == pytest.approx(cosines[np.triu_indices(8, 1)].mean(), rel=1e-5)
            assert found["first_quarter"] == pytest.approx(cosines[0, 1], rel=1e-5)
            assert (found["neighbours"], found["far"]) == pytest.approx((alone["neighbours"], alone["far"]))
        np.testing.assert_allclose(numbers["mean"], np.mean(singles, axis=0), rtol=1e-5)
    assert Image.open(tmp_path / "out" / "snapshots.png").size[0] > 900  # first, last, and the mean


def test_a_latent_model_of_captions(tmp_path):
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(tmp_path / "model")
    images = draw_images(tmp_path / "images", count=4, size=(32, 32))
    given = [f"--data.source={images}", "--data.image_size=32", "--data.horizontal_flip=true", "--projection=256"]
    numbers = analysed(tmp_path, tmp_path / "out", f"--model={tmp_path / 'model'}", *given)
    assert set(numbers["losses"]) == {"timesteps", "samples", "training images"}
    assert numbers["gradients"]["projection"] == 256
    assert numbers["gradients"]["projection_error"] == 1 / 16
    assert all(norm > 0 for norm in numbers["gradients"]["norms"])
    assert (tmp_path / "out" / "cache").is_dir()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gradients=false", "--losses=false"], "Nothing to analyse"),
        (["--parameters=nowhere"], "in no weight's name"),
        (["--memory_gib=0.00001"], "memory_gib=1e-05"),
        (["--samples=3"], "even number"),
        (["--samples=1", "--gradients=false"], "samples=1"),
        (["--batch_size=0"], "batch_size=0"),
        (["--timesteps=1"], "timesteps=1"),
        (["--timesteps=1001"], "timesteps=1001"),
        (["--seed=-1"], "seed=-1"),
        (["--learned=[nowhere]"], "No directory 'nowhere', given as one of `learned`"),
        (["--learned=[x=nowhere]"], "No directory 'nowhere', given as one of `learned`"),
        (["--stages=[nowhere]"], "No directory 'nowhere', given as one of `stages`"),
        (["--snapshots=TRAINED/patch"], "has no snapshots: train it with --training.snapshot_every"),
        (["--snapshots=TRAINED", "--gradients=false"], "set gradients to true"),
        (["--learned=[TRAINED/patch, TRAINED/patch]"], "Two of `learned` are called 'patch'"),
        (["--learned=[TRAINED/base]"], "is called 'base'"),
        (["--learned=[TRAINED/patch]", "--losses=false"], "set losses to true"),
        (["--learned=[EMPTY]"], "holds no patch, no LoRA, no weights"),
        (["--stages=[EMPTY]"], "has no 'stages/0'"),
        (["--stages=[TRAINED/base, TRAINED/patch]"], "holds a patch"),
        (["--model=nowhere"], "No model at 'nowhere'"),
        (["--data.source=nowhere"], "No images at 'nowhere'"),
    ],
)
def test_mistakes_are_named(trained, tmp_path, capsys, given, message):
    (tmp_path / "empty").mkdir()
    given = [text.replace("TRAINED", str(trained)).replace("EMPTY", str(tmp_path / "empty")) for text in given]
    assert analyze(trained, tmp_path / "out", *given) == 2
    error = capsys.readouterr().err
    assert error.startswith("stagepatch analyze: ")
    assert message in error


def test_a_model_of_another_objective_is_not_compared(trained, tmp_path, capsys):
    other = tmp_path / "other"
    objective = make_objective(prediction_type="v_prediction")
    run(other, method="pretrain", model=make_model(), objective=objective, steps=1)
    assert analyze(trained, tmp_path / "out", f"--learned=['{other}']", "--gradients=false") == 2
    assert "cannot be compared: prediction_type is v_prediction, not epsilon" in capsys.readouterr().err

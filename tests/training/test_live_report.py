"""report.html of a run while it trains."""

import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from PIL import Image

from stagepatch import report
from stagepatch.cli import main
from stagepatch.core import Interrupted
from stagepatch.training import Run, TrainConfig, TrainingConfig, live_report
from stagepatch.training.live_report import LiveReport
from tests.runs import log_of, options, run
from tests.tiny_pipelines import PIPELINES


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def strftime(self, form):
        return f"12:00:{self.now:02.0f}"


@pytest.fixture
def clock(monkeypatch):
    """In which pages have empty plots."""
    clock = Clock()
    monkeypatch.setattr(live_report, "time", clock)
    monkeypatch.setattr(report, "training_curves", lambda records: Figure(figsize=(1, 1)))
    return clock


def report_of(directory, every=60.0, steps=6, **choices):
    return LiveReport(directory, TrainingConfig(steps=steps, report_every=every), "model: digits", **choices)


class Ticking:
    """A check in which seconds pass, that keeps what the page says."""

    def __init__(self, clock, directory, seconds):
        self.clock, self.path, self.seconds, self.pages = clock, directory / "report.html", seconds, []

    def is_due(self, done, steps):
        return True

    def __call__(self, model, done, log):
        self.clock.now += self.seconds
        page = self.path.read_text() if self.path.exists() else ""
        self.pages.append((done, re.search(r"Iteration (\d+) of 6|$", page)[1], 'http-equiv="refresh"' in page))


def test_a_page_is_written_now_and_then_and_reads_itself_again_until_the_end(tmp_path, clock):
    ticking = Ticking(clock, tmp_path, 20)
    run(tmp_path, report=report_of(tmp_path), checks=[ticking])
    # 60 seconds have passed at the fourth record, and the page has it.
    assert ticking.pages == [
        (1, None, False),
        (2, None, False),
        (3, None, False),
        *((n, "4", True) for n in (4, 5, 6)),
    ]
    page = (tmp_path / "report.html").read_text()
    assert "The run is done: iteration 6 of 6. As of 12:00:120." in page
    assert 'http-equiv="refresh"' not in page
    assert not list(tmp_path.glob(".report*"))


@pytest.mark.parametrize(("every", "seconds"), [(60.0, 1), (0.0, 100)])
def test_a_short_run_has_none_nor_one_that_wants_none(tmp_path, clock, every, seconds):
    run(tmp_path, report=report_of(tmp_path, every), checks=[Ticking(clock, tmp_path, seconds)])
    assert not (tmp_path / "report.html").exists()


def test_time_left_and_how_often_to_read_it_again(tmp_path, clock):
    report_of(tmp_path, 30.0, steps=12_000).write([{"iteration": 1, "loss": 0.5}], 3_000, 3725.4)
    page = (tmp_path / "report.html").read_text()
    assert "Iteration 3,000 of 12,000; 1:02:05 left." in page
    assert '<meta http-equiv="refresh" content="30">' in page


def test_a_run_that_was_stopped_says_so(tmp_path, clock):
    class Stop(Ticking):
        def __call__(self, model, done, log):
            super().__call__(model, done, log)
            if done == 5:
                raise Interrupted(2, "stopped")

    with pytest.raises(Interrupted):
        run(tmp_path, report=report_of(tmp_path), checks=[Stop(clock, tmp_path, 20)])
    assert "The run stopped at iteration 5 of 6." in (tmp_path / "report.html").read_text()
    clock.now = 0.0
    run(tmp_path, report=report_of(tmp_path))
    assert "The run is done: iteration 6 of 6." in (tmp_path / "report.html").read_text(), "short as it was"


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the tiny Stable Diffusion with all that can be watched: its directory."""
    directory = tmp_path_factory.mktemp("watched")
    PIPELINES["UNet2DConditionModel"].build().save_pretrained(directory / "model")
    (directory / "images").mkdir()
    for number in range(12):
        size = (32, 32) if number % 2 else (64, 32)
        Image.new("RGB", size, (20 * number, 40, 90)).save(directory / "images" / f"{number}.png")
        (directory / "images" / f"{number}.txt").write_text("a red house\na blue tree")
    given = [f"--model={directory / 'model'}", f"--output_dir={directory / 'run'}", "--method=lora", "--lora.rank=2"]
    data = {"source": directory / "images", "image_size": 32, "crop": "buckets", "bucket_step": 16, "held_out": 0.4}
    training = {"steps": 4, "batch_size": 2, "log_every": 2, "report_every": 3600, "learning_rate": 1e-2}
    given += [*options("data", data), *options("training", training)]
    sampling = {"num_images": 2, "num_inference_steps": 2}
    given += ["--validation.every=2", "--validation.loss_every=2", "--validation.loss_images=3"]
    given += [*options("validation.sampling", sampling), """--validation.prompts=["<script>alert('red')</script>"]"""]
    (directory / "run").mkdir()
    (directory / "run" / "report.html").touch()  # as of a run that goes on: however short, it brings its page to date
    assert main(["train", *given]) == 0
    return directory / "run"


def test_the_page_has_losses_pictures_and_settings_and_needs_nothing_else(trained):
    text = (trained / "report.html").read_text()
    page = Page(text)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 4, "curves, held-out losses, samples of the base and of what is learned"
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in pictures)
    assert [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")] == ["script"], (
        "and captions are escaped"
    )
    assert any("<script>alert('red')</script>" in text for text in page.text)
    assert {"Training", "Held-out loss", "Held-out loss, last", "Pictures", "Settings"} <= set(page.text)
    assert any("held_out: 0.4" in code for code in page.text)
    last = [record for record in log_of(trained) if "held_out/all" in record][-1]
    for name in ("0-0.25", "0.75-1", "all"):
        base, learned = last[f"held_out_base/{name}"], last[f"held_out/{name}"]
        place = page.text.index(name)
        assert [cell for cell in page.text[place : place + 9] if cell][:4] == [
            name,
            f"{base:.5g}",
            f"{learned:.5g}",
            f"{100 * (learned / base - 1):+.2f} %",
        ]


def test_the_log_of_a_text_model_has_losses_on_cached_images_that_it_is_not_trained_on(trained):
    log = log_of(trained)
    assert [record["iteration"] for record in log] == [2, 2, 4, 4]
    names = {
        "iteration",
        *(
            f"{kind}/{name}"
            for kind in ("held_out", "held_out_base")
            for name in ("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1", "all")
        ),
    }
    assert set(log[1]) == set(log[3]) == names
    assert log[3]["held_out/all"] != log[1]["held_out/all"] != log[1]["held_out_base/all"]
    assert json.loads((trained / "lora.json").read_text())["rank"] == 2


def test_held_out_images_are_asked_for(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("L", (8, 8)).save(tmp_path / "images" / f"{number}.png")
    given = ["--data.image_size=8", f"--data.source={tmp_path / 'images'}", f"--output_dir={tmp_path / 'run'}"]
    assert main(["train", *given, "--validation.loss_every=2", "--training.batch_size=2", "--training.steps=1"]) == 2
    config = TrainConfig(output_dir=str(tmp_path / "digits"), training=TrainingConfig(steps=1, batch_size=8))
    config.validation.loss_every = 1
    Run(config).train(progress=False)
    assert "held_out/all" in log_of(tmp_path / "digits")[-1]

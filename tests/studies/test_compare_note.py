"""How a comparison's table says that it is to be read."""

from pathlib import Path

import pytest

from stagepatch.sampling import SamplingConfig
from stagepatch.studies.compare_jobs import CompareJob
from stagepatch.studies.compare_page import note
from stagepatch.training import TrainConfig


@pytest.mark.parametrize(("metric", "better"), [("fid_train", "Lower"), ("kid", "Lower"), ("recall", "Higher")])
def test_the_note_says_which_way_the_metric_is_better(metric, better):
    job = CompareJob(Path(), TrainConfig(), "dmp", SamplingConfig(), [1, 2, 3], "digits", [10])
    assert note([job], metric).endswith(f" {better} is better.")

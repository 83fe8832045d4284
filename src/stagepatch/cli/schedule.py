"""Search for a model schedule."""

from pathlib import Path

from stagepatch.cli import config as configs
from stagepatch.cli.common import load_on_device, write_run_config
from stagepatch.cli.merge import check_optuna
from stagepatch.core import InUse, locked
from stagepatch.evaluation import Evaluator
from stagepatch.report import print_table


def schedule(config: configs.ScheduleConfig, resolved: str) -> None:
    """Search for the best model schedule within the budget, and compare it with the base on other seeds."""
    check_optuna()
    from stagepatch.search import Zoo, best_of, schedule_search

    schedule_search.check_config(config)
    directory = Path(config.output_dir)
    model, scheduler = load_on_device(config.model)
    cache = Path(config.cache or directory / "cache")
    evaluator = Evaluator.load(config.model, config.data, config.extractor, cache, config.held_out)
    zoo = Zoo(config, model, scheduler, evaluator.latents)
    write_run_config(directory, resolved)
    costs = ", ".join(f"{cost:.3g} s with {name}" for name, cost in zip(zoo.names, zoo.space.costs, strict=True))
    budget = f"{zoo.space.budget:.3g} s per image, {zoo.share:.0%} of the base model's {zoo.space.steps} steps"
    print(f"Budget: {budget}. A step takes {costs}.")
    evaluations = schedule_search.search_model_schedule(zoo, evaluator)
    try:
        # Processes that shared a search end at the same time.
        with locked(directory / "search.lock", "Another process of this search compares the schedule with the base."):
            schedule_search.write_results(zoo, evaluations)
            best = schedule_search.choices_of(best_of(evaluations).point)
            print_table(*schedule_search.compare_with_base(zoo, evaluator, best))
    except InUse as error:
        print(error)
    print(f"The schedule is in '{directory / schedule_search.SCHEDULE}': stagepatch sample --schedule takes it.")

"""DeMe as one study (arXiv 2410.06664): decouple for each N and p, merge, compare with controls; one table (Fig. 2).

    python experiments/deme.py configs/paper/deme-cifar10
    python experiments/deme.py configs/paper/deme-cifar10 --num_stages 1 2 4 --p 0 0.2 0.4 0.6 0.8

The folder holds decouple.yaml, merge.yaml and compare.yaml. `--decouple '--training.steps 500'` changes one of them,
and `--all '--data.source fashion'` all three. The same command again goes on where it stopped; other N and p may join.

For each N and p: the experts by timestep (the paper's FID before merge), their merge by the search of merge.yaml, and
by 1/N. For each N the control that the paper lacks: the mean of N copies that were trained on all timesteps (p = 1),
with the same losses and steps. What merging gains by averaging alone, this has too. Its weights are not searched for:
that is what p = 1 among `--p` does.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from stagepatch.cli import main as run
from stagepatch.cli.app import _parse
from stagepatch.core import read_yaml, write_text
from stagepatch.evaluation import difference_between, metric_names
from stagepatch.report import markdown_table, metric_curves, print_table, write_picture
from stagepatch.studies import plan_jobs

KINDS = {"experts": "experts by timestep", "merged": "merged, searched", "mean": "merged, 1/N"}
CONTROL = "N copies on all t, 1/N"
NOTE = (
    "Mean over seeds. Before merge, each copy samples its own timesteps. The control's copies trained on all of them: "
    "what a merge gains beyond it is due to the decoupling, and to the search for weights where there was one. "
    "Differences to the control are ± standard error, paired by noise."
)


class Study:
    """What is given on the command line.

    Args:
        given: see `main`.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        decouple, compare = (read_yaml(given.folder / f"{name}.yaml", "config") for name in ("decouple", "compare"))
        self.output = given.output_dir or Path(compare["output_dir"]).parent
        self.num_stages: list[int] = given.num_stages or [decouple["num_stages"]]
        self.p: list[float] = given.p or [decouple["p"]]

    def options(self, command: str, *more: str) -> list[str]:
        """Of a command: its config, what all commands are given, and what it alone is."""
        model = f"--{'base' if command == 'merge' else 'model'}={self.given.model}"
        own = shlex.split(self.given.all) + shlex.split(getattr(self.given, command))
        return [f"--config={self.given.folder / command}.yaml", *([model] if self.given.model else []), *own, *more]

    def call(self, command: str, *more: str) -> None:
        """Run a command; the study ends where it fails."""
        print(f"stagepatch {command} {' '.join(more)}", flush=True)
        if code := run([command, *self.options(command, *more)]):
            raise SystemExit(code)

    def merge(self, *more: str, output: Path) -> None:
        """Merge, once: comparing goes by directories, so one that is measured must stay what it was."""
        options, done = [*more, f"--output_dir={output}"], output / "run.yaml"
        if not done.exists():
            self.call("merge", *options)
        elif done.read_text() != _parse("merge", self.options("merge", *options))[1]:
            raise SystemExit(f"'{output}' was merged by other options: give them, or another --output_dir.")

    def plan(self) -> Iterator[tuple[int, float, bool]]:
        """Each N and p, and whether it is a row of the table, or the control of its N alone."""
        for count in self.num_stages:
            for p in sorted({*self.p, 1.0}) if count > 1 else [1.0]:
                yield count, p, count == 1 or p in self.p

    def directory(self, seed: int | str, count: int, p: float) -> Path:
        return self.output / f"seed-{seed}" / f"n{count}-p{p:g}"

    def run(self) -> None:
        """All of it, and the table."""
        for seed, (count, p, is_row) in itertools.product(self.given.seeds, self.plan()):
            stages = self.directory(seed, count, p)
            ranges = [f"--num_stages={count}", f"--p={p:g}", f"--training.seed={seed}"]
            self.call("decouple", *ranges, f"--output_dir={stages}")
            mean = ["--search.strategies=[]", f"--weights={[1 / count] * count}"]
            self.merge(f"--stages=['{stages}']", *mean, output=Path(f"{stages}-mean"))
            if is_row:
                self.merge(f"--stages=['{stages}']", output=Path(f"{stages}-merged"))
        more = [f"--entries={self.entries()}", f"--training_seeds={self.given.seeds}"]
        more.append(f"--output_dir={self.output / 'compare'}")
        self.call("compare", *more)
        config: Any = _parse("compare", self.options("compare", *more))[0]
        values: dict[str, list[list[float]]] = {}
        for job in plan_jobs(config):
            measured = job.metrics()[job.checkpoints[-1]]
            values.setdefault(job.name, []).append([metrics[config.metric] for metrics in measured])
        self.write(values, metric_names(f"{config.extractor} features")[config.metric])

    def entries(self) -> list[dict[str, str]]:
        """The comparison's rows, by '{seed}'."""
        rows = [{"name": "base", "method": "none"}]
        for count, p, is_row in self.plan():
            stages = self.directory("{seed}", count, p)
            kinds = {"mean": {"model": f"{stages}-mean"}}
            if is_row:
                kinds["experts"] = {"schedule": f"{stages}/experts.yaml"}
                kinds["merged"] = {"model": f"{stages}-merged"}
            rows += [{"name": name_of(count, p, kind), "method": "none", **what} for kind, what in kinds.items()]
        return rows

    def write(self, values: dict[str, list[list[float]]], label: str) -> None:
        """table.md, and a figure over N or p where there are several.

        Args:
            values: of the metric, by the comparison's row, training seed and sampling seed.
        """
        mean = {name: statistics.fmean(itertools.chain(*of)) for name, of in values.items()}
        columns, rows = ["N", "p", *KINDS.values(), CONTROL, "1/N − control", "searched − control"], []
        for count, p, is_row in self.plan():
            if not is_row:
                continue
            names = {kind: name_of(count, p, kind) for kind in KINDS}
            control = name_of(count, 1.0, "mean")
            cells = [f"{mean[name]:.4f}" for name in (*names.values(), control)]
            for kind in ("mean", "merged"):
                found = difference_between(values[names[kind]], values[control])
                cells.append(f"{found.mean:+.4f} ± {found.error:.4f}")
            rows.append([str(count), f"{p:g}" if count > 1 else "–", *cells])
        title = f"{label}; base: {mean['base']:.4f}"
        write_text(self.output / "table.md", f"{title}\n\n{markdown_table(columns, rows)}\n{NOTE}\n")
        lines: dict[str, list[tuple[float, int, float]]]
        if len(self.num_stages) > 1:
            lines = {f"p = {p:g}": [(count, count, p) for count in sorted(self.num_stages)] for p in self.p}
            write_picture(self.output / "over-N.png", curves(lines, mean, label, "N"))
        if len(self.p) > 1:
            lines = {f"N = {count}": [(p, count, p) for p in sorted(self.p)] for count in self.num_stages}
            write_picture(self.output / "over-p.png", curves(lines, mean, label, "p"))
        print_table(columns, rows, title)
        print(f"{NOTE}\nTable: {self.output / 'table.md'}")


def curves(lines: dict[str, list[tuple[float, int, float]]], mean: dict[str, float], label: str, axis: str) -> Figure:
    """Fig. 2: the metric over N or p, with the control and the base.

    Args:
        lines: by what they have in common, where a point is on the axis, its N and its p.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for which, points in lines.items():
        for kind, words in KINDS.items():
            series[f"{words}, {which}"] = [(x, mean[name_of(count, p, kind)]) for x, count, p in points]
        of_control = CONTROL if axis == "N" else f"{CONTROL}, {which}"  # which knows no p
        series[of_control] = [(x, mean[name_of(count, 1.0, "mean")]) for x, count, _ in points]
        series["base"] = [(x, mean["base"]) for x, *_ in points]
    return metric_curves(series, label, axis)


def name_of(count: int, p: float, kind: str) -> str:
    """A row of the comparison. A single copy's range is all of T: p says nothing of it."""
    return f"N={count}, p={p if count > 1 else 1:g}: {kind}"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="with decouple.yaml, merge.yaml and compare.yaml")
    options.add_argument("--num_stages", type=int, nargs="+", metavar="N", help="by default decouple.yaml's")
    options.add_argument("--p", type=float, nargs="+", help="by default decouple.yaml's")
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training")
    options.add_argument("--model", default="", help="the base, by default the configs'")
    options.add_argument("--output_dir", type=Path, help="by default the folder of compare.yaml's")
    for command in ("all", "decouple", "merge", "compare"):
        of = "the three commands" if command == "all" else f"stagepatch {command}"
        options.add_argument(f"--{command}", default="", metavar="OPTIONS", help=f"of {of}, as one: '--key value'")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study."""
    Study(parser().parse_args(arguments)).run()


if __name__ == "__main__":
    main()

"""Every operation on files as a point of death: `python -m tests.faults.points` tries them, and writes the table.

A command is stopped at its n-th operation that writes, renames, flushes, opens for writing, makes or takes away
something under its directory (a write is half done then), and given again: it must end with the files of a run that
nothing befell. Then the same with a disk that is full, and with one that is read-only, from that operation on: the
command must end with a message of its own, and go on to the same files when there is room.
"""

import argparse
import errno
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.commands import COMMANDS, INPUTS, at_work, command, facts, new_place, write_inputs
from tests.faults.strikes import FileStrike
from tests.runs import Processes

_MODULES = [f"stagepatch.cli.{name}" for name in ("cache", "compare", "decouple", "evaluate", "merge", "pretrain")]
_MODULES += ["stagepatch.cli.sample", "stagepatch.cli.schedule", "stagepatch.search.engine", "stagepatch.report.page"]
_MODULES += ["torch.utils.tensorboard", "tests.golden.record", "stagepatch.data.digits", "matplotlib.figure"]
_KINDS = {"killed": 0, "disk full": errno.ENOSPC, "read-only": errno.EROFS}
KILLED = -9
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- points of death -->", "<!-- end -->"


class Bench:
    """Inputs, made once, and places in which commands run."""

    def __init__(self, processes, directory):
        self.processes, self.directory = processes, directory
        self.known = {}
        if not (directory / "made").exists():
            write_inputs(directory)
            for arguments in INPUTS:
                processes.call(command, arguments=arguments, directory=directory)
            (directory / "made").touch()

    def run(self, name, place, strike=None):
        """A command's exit code and its output."""
        process = self.processes.start(command, strike=strike, arguments=at_work(name), directory=place)
        process.join(300)
        if process.is_alive():
            process.kill()
            return None, "it hangs"
        return process.exitcode, process.output.read_text()

    def undisturbed(self, name):
        """The names of a command's operations, and what it leaves behind."""
        if name not in self.known:
            place = new_place(self.directory / "inputs", self.directory / "undisturbed" / name)
            names = self.directory / f"operations of {name}"
            code, output = self.run(name, place, FileStrike(place, names=names))
            assert code == 0, output
            self.known[name] = names.read_text().splitlines(), facts(place / "out")
        return self.known[name]

    def strike(self, name, number, error=0):
        """What is wrong with a command that was struck at an operation and given again; '' if nothing is."""
        _, expected = self.undisturbed(name)
        place = new_place(self.directory / "inputs", self.directory / "struck")
        code, output = self.run(name, place, FileStrike(place, number, error))
        if wrong := _wrong_end(code, output, error):
            return wrong
        code, output = self.run(name, place)
        if code != 0:
            return f"given again, it ends with {code}: {output[-600:]}"
        found = facts(place / "out")
        odd = [path for path in sorted({*expected, *found}) if expected.get(path) != found.get(path)]
        return f"other files than those of a run that nothing befell: {odd}" if odd else ""


def _wrong_end(code, output, error):
    said = [line for line in output.splitlines() if "Error" in line or "Traceback" in line]
    if not error:
        return "" if code in (KILLED, 0) else f"struck, it ends with {code}: {output[-600:]}"
    if code not in (0, 2) or any("Traceback" in line for line in said):
        return f"struck, it ends with {code}: {output[-1200:]}"
    return ""


def points(total, most):
    """So many of the operations 1 … total at most, evenly spread."""
    count = min(total, most)
    return sorted({1 + round(index * (total - 1) / max(1, count - 1)) for index in range(count)})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=list(COMMANDS))
    parser.add_argument("--kinds", nargs="*", default=list(_KINDS), choices=list(_KINDS))
    parser.add_argument("--points", type=int, default=100, help="of a command and kind, at most")
    parser.add_argument("--directory", type=Path, help="kept; by default a new one")
    parser.add_argument("--results", type=Path, default=Path("runs/faults.json"))
    given = parser.parse_args()
    directory = given.directory or Path(tempfile.mkdtemp(prefix="faults-"))
    directory.mkdir(parents=True, exist_ok=True)
    output = directory / "output"
    output.mkdir(exist_ok=True)
    processes = Processes(output, _MODULES)
    bench, results = Bench(processes, directory), Results(given.results)
    for name in given.commands:
        operations, _ = bench.undisturbed(name)
        for kind in given.kinds:
            since, known = time.monotonic(), results.of(name, kind, len(operations))
            for number in points(len(operations), given.points):
                if str(number) not in known:
                    found = bench.strike(name, number, _KINDS[kind])
                    known[str(number)] = found and f"{operations[number - 1]}: {found}"
                    results.write()
                    if found:
                        print(f"{name}, {kind}, {known[str(number)]}\n", flush=True)
            bad, seconds = sum(map(bool, known.values())), time.monotonic() - since
            print(f"{name}, {kind}: {len(known)} of {len(operations)}, {bad} bad, {seconds:.0f} s", flush=True)
    processes.stop()
    results.write_table()
    if given.directory is None:
        shutil.rmtree(directory)
    return min(1, results.bad)


class Results:
    """What was tried, kept in a file: a table of it is made of all that was ever tried of as many operations."""

    def __init__(self, path):
        self.path = path
        self.found = json.loads(path.read_text()) if path.exists() else {}

    def of(self, name, kind, operations):
        """By the operation's number, what is wrong."""
        kinds = self.found.setdefault(name, {})
        if kinds.get(kind, {}).get("operations") != operations:
            kinds[kind] = {"operations": operations, "points": {}}
        return kinds[kind]["points"]

    def write(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1))

    def write_table(self):
        """Into the page."""
        rows = [f"| command | operations | {' | '.join(_KINDS)} |", f"| --- | ---: |{' ---: |' * len(_KINDS)}"]
        for name, kinds in self.found.items():
            cells = [_cell(kinds.get(kind, {}).get("points", {})) for kind in _KINDS]
            operations = max(kind["operations"] for kind in kinds.values())
            rows.append(f"| {name} | {operations} | {' | '.join(cells)} |")
        before, _, rest = PAGE.read_text().partition(_BEGIN)
        PAGE.write_text("\n".join([before + _BEGIN, "", *rows, "", _END + rest.partition(_END)[2]]))

    @property
    def bad(self):
        kinds = [kind for kinds in self.found.values() for kind in kinds.values()]
        return sum(bool(wrong) for kind in kinds for wrong in kind["points"].values())


def _cell(tried):
    bad = sum(map(bool, tried.values()))
    return f"{len(tried)}, {bad} bad" if bad else str(len(tried) or "–")


if __name__ == "__main__":
    sys.exit(main())

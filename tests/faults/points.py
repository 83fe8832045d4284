"""Every operation on files as a point of death: `python -m tests.faults.points` tries them, and writes the table.

A command is stopped at its n-th operation that writes, renames, flushes, opens for writing, makes or takes away
something under its directory (a write is half done then), and given again: it must end with the files of a run that
nothing befell. Then the same with a disk that is full, and with one that is read-only, from that operation on: the
command must end with a message of its own, and go on to the same files when there is room.
"""

import argparse
import atexit
import contextlib
import errno
import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch

from tests.faults.commands import COMMANDS, INPUTS, at_work, command, facts, new_place, write_inputs
from tests.faults.strikes import ENVIRONMENT, FileStrike, library

_KINDS = {"killed": 0, "disk full": errno.ENOSPC, "read-only": errno.EROFS}
_PATIENCE = 300  # seconds that a command may take
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
_BEGIN, _END = "<!-- points of death -->", "<!-- end -->"


class Bench:
    """Inputs, made once, and places in which commands run, each in a fork of this process.

    A command runs once in this process before its forks do: they have all that it imports, and begin at once.
    """

    def __init__(self, directory):
        self.directory = directory
        self.known = {}
        if not (directory / "made").exists():
            write_inputs(directory)
            for arguments in INPUTS:
                assert _quietly(arguments, directory) == 0
            (directory / "made").touch()

    def run(self, name, place, strike=None):
        """A command's exit code, negative for a signal, and its output."""
        output = self.directory / "output"
        process = os.fork()
        if not process:
            _be(at_work(name), place, output, strike)
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status), output.read_text()

    def undisturbed(self, name):
        """The names of a command's operations, and what it leaves behind."""
        if name not in self.known:
            place = new_place(self.directory / "inputs", self.directory / "undisturbed")
            assert _quietly(at_work(name), place) == 0
            gc.collect()
            gc.freeze()
            place = new_place(self.directory / "inputs", place)
            names = self.directory / "operations"
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


def _quietly(arguments, directory):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return command(arguments, directory)


def _be(arguments, directory, output, strike):
    """A fork's whole life. It ends as a process does, but for taking its memory apart."""
    signal.alarm(_PATIENCE)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    if strike is not None:
        strike.arm()
    try:
        code = command(arguments, directory)
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wrong_end(code, output, error):
    said = [line for line in output.splitlines() if "Error" in line or "Traceback" in line]
    if not error:
        return "" if code in (-signal.SIGKILL, 0) else f"struck, it ends with {code}: {output[-600:]}"
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
    torch.set_num_threads(1)  # a fork has no threads but its own
    directory = (given.directory or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    bench, results = Bench(directory), Results(given.results.resolve())
    for name in given.commands:
        operations, _ = bench.undisturbed(name)
        for kind in given.kinds:
            since, known = time.monotonic(), results.of(name, kind, len(operations))
            for number in points(len(operations), given.points):
                if known.get(str(number), "not tried"):
                    found = bench.strike(name, number, _KINDS[kind])
                    known[str(number)] = found and f"{operations[number - 1]}: {found}"
                    results.write()
                    if found:
                        print(f"{name}, {kind}, {known[str(number)]}\n", flush=True)
            bad, seconds = sum(map(bool, known.values())), time.monotonic() - since
            print(f"{name}, {kind}: {len(known)} of {len(operations)}, {bad} bad, {seconds:.0f} s", flush=True)
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
    if os.environ.get(ENVIRONMENT) != str(library()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, ENVIRONMENT: str(library())})
    sys.exit(main())

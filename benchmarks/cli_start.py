"""How long `stagepatch --help` takes, beside `python -c pass`: medians of alternated runs.

python benchmarks/cli_start.py
"""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "stagepatch --help": [sys.executable, "-m", "stagepatch", "--help"],
    "stagepatch train --help": [sys.executable, "-m", "stagepatch", "train", "--help"],
}

times: dict[str, list[float]] = {name: [] for name in COMMANDS}
for _ in range(9):
    for name, command in COMMANDS.items():
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times[name].append(time.perf_counter() - start)
for name, values in times.items():
    print(f"{name:<24} {statistics.median(values):.2f} s")

"""The time that `import anchorda` adds to `import torch`.

    python benchmarks/startup.py

Fresh interpreters import the one and both, in turns; the first of each, which fills the cache of
files, is not counted. What anchorda adds is the difference of the medians; and, as torch takes
seconds and varies by more than that, also what its own import takes once torch is there. The table,
in Markdown, goes to the terminal.
"""

import statistics
import subprocess
import sys

from seeds import markdown

REPEATS = 15
TORCH, BOTH = "`import torch`", "`import torch, anchorda`"
OURS = "`import anchorda` once torch is there"


def milliseconds(*statements: str) -> list[float]:
    """Return the time of each statement, run in order in a fresh interpreter."""
    program = "import time"
    for statement in statements:
        program += f"\nbegun = time.perf_counter()\n{statement}\nprint(time.perf_counter() - begun)"
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [1000 * float(line) for line in output.split()]


def main() -> None:
    """Print the table."""
    times: dict[str, list[float]] = {TORCH: [], BOTH: [], OURS: []}
    for _ in range(1 + REPEATS):
        times[TORCH] += milliseconds("import torch")
        parts = milliseconds("import torch", "import anchorda")
        times[BOTH].append(sum(parts))
        times[OURS].append(parts[1])
    rows = []
    for what, all_times in times.items():
        ordered = sorted(all_times[1:])
        tenth = len(ordered) // 10
        spread = f"{ordered[tenth]:.0f}–{ordered[-1 - tenth]:.0f}"
        rows.append([what, f"{statistics.median(ordered):.0f}", spread])
    added = statistics.median(times[BOTH][1:]) - statistics.median(times[TORCH][1:])
    rows.append(["what anchorda adds: the difference of the first two", f"{added:.0f}", ""])
    print(markdown(["", "ms, median", "10–90 %"], rows))


if __name__ == "__main__":
    main()

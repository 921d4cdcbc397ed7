"""A profile of the operators on a CPU: the calls into torch that cost most.

    python benchmarks/where.py

The profiler counts ten calls of each operator on one thread, as it sees no other, on the features
that `operators.py` compares contenders on. The table, in Markdown, goes to the terminal.
"""

import os

import torch
from operators import OPERATORS, OURS, Case, draw
from seeds import markdown
from torch.autograd.profiler import profile

CALLS = 10
MOST = 6


def largest_parts(name: str, case: Case) -> list[str]:
    """Return a row: the milliseconds of one call, and its largest parts."""
    inputs, run = draw(case, "cpu"), OPERATORS[name].contenders[OURS]
    run(inputs)
    with profile() as recorded:
        for _ in range(CALLS):
            run(inputs)
    parts = sorted(recorded.key_averages(), key=lambda p: p.self_cpu_time_total, reverse=True)
    total = sum(part.self_cpu_time_total for part in parts)
    shown = ", ".join(
        f"{part.key.removeprefix('aten::')} {100 * part.self_cpu_time_total / total:.0f} %"
        for part in parts[:MOST]
    )
    return [name, f"{total / 1000 / CALLS:.1f}", shown]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells when it starts and stops
    rows = [largest_parts(name, Case((2, 128, 224))) for name in OPERATORS]
    print(markdown(["operator", "ms", "of which"], rows))


if __name__ == "__main__":
    main()

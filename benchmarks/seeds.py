"""Compare runs of the example that differ in their seed alone.

    python benchmarks/seeds.py runs/demo-seed0 runs/demo-seed1 runs/demo-seed2

The mIoU after every phase, of each run and as mean ± standard deviation, and what the last phase
gains over the first. The table, in Markdown, goes to the terminal.
"""

import argparse
import json
import statistics
from pathlib import Path


def read_scores(run: Path) -> dict[str, float]:
    """Return the mIoU in percent after each phase of a run."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["kind"] == "evaluation"]
    return {event["phase"]: 100 * event["miou"] for event in events}


def score_cells(values: list[float], sign: str = "") -> list[str]:
    """Return scores by seed, then their mean ± standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return [
        *(f"{v:{sign}.1f}" for v in values),
        f"**{statistics.mean(values):{sign}.1f}** ± {spread:.1f}",
    ]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table with right-aligned numbers."""
    rule = [":--", *["--:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Put runs of several seeds side by side.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of the runs, by seed")
    runs = [read_scores(run) for run in parser.parse_args().runs]
    first, *_, last = runs[0]
    rows = [[phase, *score_cells([scores[phase] for scores in runs])] for phase in runs[0]]
    gains = [scores[last] - scores[first] for scores in runs]
    rows.append([f"{last} − {first}", *score_cells(gains, "+")])
    print(markdown(["mIoU (%)", *(f"seed {i}" for i in range(len(runs))), "mean ± std"], rows))


if __name__ == "__main__":
    main()

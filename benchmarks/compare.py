"""Compare the operators of two releases: ratios, and the spread that says what they are worth.

    python benchmarks/compare.py benchmarks/results/operators-0.1.0.csv runs/bench/operators.csv

Both files are written by `operators.py`. A row of the table, in Markdown, is an operator of the
library on a case that both have measured: milliseconds of both with their tenth and ninetieth
percentile, the ratio of the medians, and each median as a multiple of its own run's floor. Compare
times of one machine only; multiples of the floor also between machines that are alike. A ratio in
bold is beyond the spread: the two intervals do not overlap.
"""

import argparse
import csv
from pathlib import Path

from operators import OURS
from seeds import markdown

CASE = ("table", "operator", "features", "layout", "dtype", "classes", "spread")
MACHINE = ("machine", "cores", "device", "threads", "busy", "python", "torch", "numpy", "anchorda")

Row = dict[str, str]


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """Return the lines of the library's operators, by case."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["contender"] == OURS]
    return {tuple(row[field] for field in CASE): row for row in rows}


def time_of(row: Row) -> str:
    """Return the median and the spread of a measurement."""
    return f"{float(row['ms']):.1f} ({float(row['low']):.1f}–{float(row['high']):.1f})"


def change(before: Row, after: Row) -> str:
    """Return the ratio of the medians, in bold if the spreads do not overlap."""
    ratio = f"{float(after['ms']) / float(before['ms']):.2f}"
    apart = any(float(a["high"]) < float(b["low"]) for a, b in ((before, after), (after, before)))
    return f"**{ratio}**" if apart else ratio


def table(before: dict[tuple[str, ...], Row], after: dict[tuple[str, ...], Row]) -> str:
    """Return the table of the cases that both have measured."""
    head = ["operator", "case", "before, ms", "after, ms", "after / before", "of the floor"]
    rows = []
    for case in before.keys() & after.keys():
        b, a = before[case], after[case]
        where = f"{a['features']} {a['layout']}, {a['dtype']}, {a['classes']} classes"
        floor = f"{float(b['ratio']):.2f} → {float(a['ratio']):.2f}"
        rows.append([a["operator"], where, time_of(b), time_of(a), change(b, a), floor])
    return markdown(head, sorted(rows))


def main() -> None:
    """Print what differs between the two runs, and the table."""
    parser = argparse.ArgumentParser(description="Compare the operators of two releases.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    before, after = read(options.before), read(options.after)
    if not before.keys() & after.keys():
        parser.error("the two files have no case in common")
    for field in MACHINE:
        b, a = (next(iter(rows.values()))[field] for rows in (before, after))
        print(f"{field}: {b}" + (f" → {a}" if a != b else ""))
    print("\n" + table(before, after))


if __name__ == "__main__":
    main()

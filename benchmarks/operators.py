"""The cost of the operators, as ratios to a floor of the same run, and of alternatives to them.

    python benchmarks/operators.py --output runs/bench        # or: make bench
    python benchmarks/operators.py --busy 2                   # beside two busy processes
    python benchmarks/operators.py --device cuda --pixels 8 128 224

The floor of labeling and class sums is the bare product of the features, in their own dtype and
layout, with as many vectors as there are classes; that of the losses, which are timed with their
gradient, is one copy of the features. Contenders take turns, so that a noisy moment hits all of
them, and one whose answers differ from float64 is not reported. Each is called a few times before
it is timed, and then `--repeats` times; on CUDA the device is waited for before and after every
call, so that what it costs to launch a call is part of it. Faiss, PyKeOps and a compiler are used
where they are. On a CPU, ours are also timed on one thread of torch. Extra memory is the most that
the process uses during a call beyond what it used before, the result included, as a fraction of
the features; it is measured in Linux, and on CUDA, where it is what torch allocates.

`--busy K` keeps K other processes busy, each with one core as far as it gets one, as the workers of
a loader do; then only the contenders that are plain torch are compared, as with 0, to have
both of one machine.

Three tables in Markdown go to the terminal: all contenders; our operators by layout and dtype; and
by the number of pixels, channels and classes, and by how near the features lie to their anchors.
OUTPUT/operators.png is the picture of the first and the last, and OUTPUT/operators.csv has a line
for each measurement:

- table: contenders, layouts, pixels, dim, classes or spread;
- operator, contender, floor: who was measured, and its floor, which has lines of its own;
- ms, low, high: the median, tenth and ninetieth percentile of the milliseconds of a call;
- ratio, memory: of the median to the floor's, of the extra memory to the features';
- features, layout, dtype, pixels, dim, classes, spread: what it was measured on;
- machine, cores, device, threads, busy, python, torch, numpy, anchorda: where it was measured, and
  beside how many busy processes.
"""

import argparse
import csv
import ctypes
import importlib.util
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from seeds import markdown
from torch import Tensor

import anchorda

OURS = "anchorda"
ON_ONE_THREAD = "anchorda, one thread"
MIN_MARGIN = 2.8  # half of the pixels of 256 channels and 19 classes exceed it
IGNORE = 256  # beyond all classes that are measured
EITHER = -1  # where any label is right
TOLERANCE = 1e-3  # of the largest value
WARM_UPS = 3


class Case(NamedTuple):
    """Sizes, dtype, layout and device of a measurement."""

    shape: tuple[int, ...]
    """Of the labels: (N, H, W), or (P,) for features (P, D)."""
    dim: int = 256
    classes: int = 19
    layout: str = "NCHW"
    dtype: str = "float32"
    spread: float = 0.3
    """Standard deviation of a channel about its anchor; that of the anchors is 0.29."""


class Inputs(NamedTuple):
    """A case, drawn."""

    features: Tensor
    labels: Tensor
    anchors: Tensor

    def double(self) -> "Inputs":
        """Return the same inputs in float64, to compute the truth from."""
        return Inputs(self.features.double(), self.labels, self.anchors.double())


Answer = tuple[Tensor, ...]
Contender = Callable[[Inputs], Answer]


def draw(case: Case, device: str) -> Inputs:
    """Return features around the anchors of their classes, a tenth of them unlabeled.

    Eight pixels in a row are of one class, as neighbors mostly are.
    """
    torch.manual_seed(0)
    anchors = torch.rand(case.classes, case.dim)
    *lines, width = case.shape
    labels = torch.randint(case.classes, (*lines, math.ceil(width / 8)))
    labels = labels.repeat_interleave(8, dim=-1)[..., :width]
    noise = torch.randn(case.shape[0], case.dim, *case.shape[1:])
    features = anchors[labels].movedim(-1, 1) + case.spread * noise
    labels = labels.where(torch.rand(case.shape) > 0.1, IGNORE)
    features = features.contiguous().to(device, getattr(torch, case.dtype))
    if case.layout == "channels-last":
        features = features.contiguous(memory_format=torch.channels_last)
    return Inputs(features, labels.to(device), anchors.to(features))


def flat(features: Tensor) -> Tensor:
    """Return features (N, D, *) as rows (P, D)."""
    return features.movedim(1, -1).reshape(-1, features.shape[1])


# ---------------------------------------------------------------------------------------- labeling


def product(inputs: Inputs) -> Answer:
    """Compute the floor: one product of features and anchors."""
    features, anchors = inputs.features, inputs.anchors
    if features.dim() == 2 or features.stride(1) == 1:
        return (flat(features) @ anchors.T,)
    return tuple(anchors @ image.flatten(1) for image in features)


def label(inputs: Inputs) -> Answer:
    """Run the public function."""
    pseudo = anchorda.AnchorPseudoLabeler(MIN_MARGIN, ignore_index=IGNORE)(
        inputs.features, inputs.anchors
    )
    return pseudo.labels.flatten(), pseudo.scores.flatten()


def kept(nearest: Tensor, margin: Tensor) -> Answer:
    """Return labels where the margin is large enough, and the margins."""
    return torch.where(margin > MIN_MARGIN, nearest, IGNORE).flatten(), margin.flatten()


def of_two(two: Tensor, found: Tensor) -> Answer:
    """Return labels and margins from the two smallest distances (P, 2)."""
    return kept(found[:, 0], two[:, 1] - two[:, 0])


def nearest_by_loop(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest class and margin by a distance map for each class, as released."""
    maps = [(features - a.view(1, -1, *[1] * (features.dim() - 2))).norm(dim=1) for a in anchors]
    distances = torch.stack(maps, dim=1)
    first, nearest = distances.min(dim=1)
    second = distances.scatter(1, nearest[:, None], torch.inf).min(dim=1).values
    return nearest, second - first


def label_by_loop(inputs: Inputs) -> Answer:
    """Return labels by a distance map for each class."""
    return kept(*nearest_by_loop(inputs.features, inputs.anchors))


def label_by_cdist(inputs: Inputs) -> Answer:
    """Return labels by torch.cdist and the two smallest."""
    return of_two(*torch.cdist(flat(inputs.features), inputs.anchors).topk(2, largest=False))


def true_labels(inputs: Inputs) -> Answer:
    """Return the true labels; near the minimum margin, any label is right in float32."""
    labels, margin = label_by_cdist(inputs)
    sure = (margin - MIN_MARGIN).abs() > TOLERANCE * margin.max()
    return labels.where(sure, EITHER), margin


def label_by_formula(features: Tensor, anchors: Tensor) -> Answer:
    """Return labels by squares multiplied out, in the dtype of the features."""
    rows = flat(features)
    squared = rows.square().sum(1, keepdim=True) - 2 * rows @ anchors.T + anchors.square().sum(1)
    return of_two(*squared.clamp(min=0).sqrt().topk(2, largest=False))


def label_by_blocks(inputs: Inputs) -> Answer:
    """Return the same by blocks of rows; a row's own square does not change the order."""
    squares, found = [], []
    for rows in flat(inputs.features).split(4096):
        less = torch.addmm(inputs.anchors.square().sum(1), rows, inputs.anchors.T, alpha=-2)
        two = less.topk(2, largest=False)
        squares.append(two.values + rows.square().sum(1, keepdim=True))
        found.append(two.indices)
    return of_two(torch.cat(squares).clamp(min=0).sqrt(), torch.cat(found))


def label_by_faiss(inputs: Inputs) -> Answer:
    """Return labels by a search for the two nearest."""
    import faiss  # type: ignore[import-not-found]

    index = faiss.IndexFlatL2(inputs.features.shape[1])
    index.add(inputs.anchors.numpy())
    squared, found = index.search(flat(inputs.features).contiguous().numpy(), 2)
    return of_two(torch.from_numpy(squared).clamp(min=0).sqrt(), torch.from_numpy(found))


def label_by_keops(inputs: Inputs) -> Answer:
    """Return labels by a symbolic matrix of distances, reduced to the two smallest."""
    from pykeops.torch import LazyTensor  # type: ignore[import-not-found]

    rows, anchors = flat(inputs.features).contiguous()[:, None], inputs.anchors[None]
    squares = ((LazyTensor(rows) - LazyTensor(anchors)) ** 2).sum(-1)
    squared, found = squares.Kmin_argKmin(2, dim=1)
    return of_two(squared.sqrt(), found)


# -------------------------------------------------------------------------------------- class sums


def sums(inputs: Inputs) -> Answer:
    """Run the public function."""
    found = anchorda.class_sums(inputs.features, inputs.labels, len(inputs.anchors))
    return found.sums, found.counts


def sums_by_loop(inputs: Inputs) -> Answer:
    """Return sums by boolean indexing, as the released code does."""
    rows, labels = flat(inputs.features), inputs.labels.flatten()
    chosen = [rows[labels == c] for c in range(len(inputs.anchors))]
    counts = torch.tensor([len(rows) for rows in chosen], device=labels.device)
    return torch.stack([rows.sum(dim=0) for rows in chosen]), counts


def sums_by_index_add(inputs: Inputs) -> Answer:
    """Return sums by one scattered addition."""
    classes = len(inputs.anchors)
    labels = inputs.labels.flatten().clamp(max=classes)
    zeros = inputs.features.new_zeros(classes + 1, inputs.features.shape[1])
    total = zeros.index_add(0, labels, flat(inputs.features))
    return total[:classes], torch.bincount(labels, minlength=classes + 1)[:classes]


def sums_by_product(inputs: Inputs) -> Answer:
    """Return sums by one-hot labels and one product for each image."""
    classes, features = len(inputs.anchors), inputs.features
    members = F.one_hot(inputs.labels.clamp(max=classes), classes + 1)[..., :classes]
    weights = members.to(features.dtype)
    if features.dim() == 2:
        return weights.T @ features, members.sum(0)
    parts = [w.flatten(0, -2).T @ x.flatten(1).T for w, x in zip(weights, features, strict=True)]
    return torch.stack(parts).sum(0), members.flatten(0, -2).sum(0)


# ------------------------------------------------------------------------------------------ losses


def copy(inputs: Inputs) -> Answer:
    """Compute the floor: one copy of the features."""
    return (inputs.features.clone(),)


def with_gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs) -> Answer:
    """Return a loss and its gradient in the features, scaled up for float16."""
    features = inputs.features.detach().requires_grad_()
    value = loss(features, inputs.labels, inputs.anchors)
    (gradient,) = torch.autograd.grad(value, features, torch.full_like(value, 2.0**15))
    return value.detach(), gradient


def distance_by_mask(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """Return the distance loss of active pixels, by boolean indexing."""
    active = labels < len(anchors)
    loss: Tensor = (features.movedim(1, -1)[active] - anchors[labels[active]]).norm(dim=1).mean()
    return loss


def distance_by_gather(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """Return the distance loss by gathering the anchor of every pixel."""
    active = labels < len(anchors)
    chosen = anchors[labels.where(active, 0)].movedim(-1, 1)
    return torch.where(active, (features - chosen).norm(dim=1), 0).sum() / active.sum()


def contrast_by_cdist(features: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
    """Return the loss by torch.cdist and a cross-entropy."""
    logits = -torch.cdist(flat(features), anchors)
    loss: Tensor = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE)
    return loss


# --------------------------------------------------------------------------------------- operators


class Operator(NamedTuple):
    """An operator: its floor, its inputs and its contenders."""

    floor_name: str
    floor: Contender
    truth: Contender
    """In float64; not ours."""
    contenders: dict[str, Contender]

    def alone(self) -> "Operator":
        """Return the operator without its alternatives."""
        return self._replace(contenders={OURS: self.contenders[OURS]})


OPERATORS = {
    "labeling": Operator(
        *("product", product, true_labels),
        {
            OURS: label,
            "loop over classes": label_by_loop,
            "torch.cdist + topk": label_by_cdist,
            "formula + topk": lambda i: label_by_formula(i.features, i.anchors),
            "formula + topk in blocks": label_by_blocks,
        },
    ),
    "class sums": Operator(
        *("product", product, sums_by_index_add),
        {
            OURS: sums,
            "loop over classes": sums_by_loop,
            "index_add": sums_by_index_add,
            "one-hot product": sums_by_product,
        },
    ),
    "distance loss": Operator(
        *("copy", copy, partial(with_gradient, distance_by_gather)),
        {
            OURS: partial(with_gradient, anchorda.anchor_distance_loss),
            "boolean mask": partial(with_gradient, distance_by_mask),
            "gather": partial(with_gradient, distance_by_gather),
        },
    ),
    "contrastive loss": Operator(
        *("copy", copy, partial(with_gradient, contrast_by_cdist)),
        {
            OURS: partial(with_gradient, anchorda.anchor_contrastive_loss),
            "torch.cdist": partial(with_gradient, contrast_by_cdist),
        },
    ),
}


def optional_labelers(device: str) -> dict[str, Contender]:
    """Return the labelers of packages that may not be installed."""
    found: dict[str, Contender] = {}
    has_compiler = shutil.which("c++") is not None
    if has_compiler or device == "cuda":
        compiled = torch.compile(label_by_formula, dynamic=False)
        found["formula + topk, compiled"] = lambda i: compiled(i.features, i.anchors)
    if importlib.util.find_spec("faiss") is not None and device == "cpu":
        found["faiss, flat index"] = label_by_faiss
    if importlib.util.find_spec("pykeops") is not None and has_compiler:
        found["PyKeOps"] = label_by_keops
    return found


# --------------------------------------------------------------------------------------- measuring


class Measurement(NamedTuple):
    """One contender, or the floor, on one case. The docstring above explains the fields."""

    operator: str
    contender: str
    ms: float
    low: float
    high: float
    ratio: float
    floor: str
    memory: float
    features: str
    layout: str
    dtype: str
    pixels: int
    dim: int
    classes: int
    spread: float


def is_right(answer: Answer, truth: Answer) -> bool:
    """Return True if integers equal the truth, and numbers do within their precision."""
    for got, expected in zip(answer, truth, strict=True):
        if got.shape != expected.shape:
            return False
        if expected.is_floating_point():
            allowed = max(TOLERANCE, torch.finfo(got.dtype).eps) * expected.abs().max()
            right = (got.double() - expected).abs() <= allowed  # a NaN is not
        else:
            right = (got == expected) | (expected == EITHER)
        if not right.all():
            return False
    return True


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Return the most memory that a call uses beyond what was in use before; −1 if unknown."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if platform.libc_ver()[0] != "glibc" or not Path("/proc/self/clear_refs").exists():
        return -1
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak is now the memory in use
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(kind: str) -> int:
    """Return the memory of this process: VmRSS, or its peak, VmHWM."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(kind))
    return 1024 * int(line.split()[1])


def return_freed_memory() -> None:
    """Let glibc keep 16 MB of what is freed, so that every large result is written to fresh memory.

    By default it keeps more or less by what was called before, and a copy takes a time by chance.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**24)
        mallopt(mmap_threshold, 2**25)


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Return the time of one call, from an idle device to an idle device."""
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begun)


def right_ones(name: str, operator: Operator, inputs: Inputs) -> dict[str, Contender]:
    """Return the contenders whose answers are right, the library's own included."""
    truth, right = operator.truth(inputs.double()), {}
    for who, run in operator.contenders.items():
        if is_right(run(inputs), truth):
            right[who] = run
        elif who == OURS:
            raise AssertionError(f"{name}: our own answers differ")
        else:
            print(f"{name}: {who} is left out, its answers differ", flush=True)
    return right


def measure(
    name: str, operator: Operator, case: Case, device: str, repeats: int
) -> list[Measurement]:
    """Measure one operator on one case: the floor, and every contender that is right."""
    inputs = draw(case, device)
    runs = {operator.floor_name: operator.floor, **right_ones(name, operator, inputs)}
    calls = {who: partial(run, inputs) for who, run in runs.items()}
    times: dict[str, list[float]] = {who: [] for who in calls}
    for turn in range(WARM_UPS + repeats):
        for who, call in calls.items():
            took = milliseconds(call, device)
            if turn >= WARM_UPS:
                times[who].append(took)
    base = statistics.median(times[operator.floor_name])
    rows = []
    for who, call in calls.items():
        ordered = sorted(times[who])
        tenth = len(ordered) // 10
        rows.append(
            Measurement(
                operator=name,
                contender=who,
                ms=statistics.median(ordered),
                low=ordered[tenth],
                high=ordered[-1 - tenth],
                ratio=statistics.median(ordered) / base,
                floor=operator.floor_name,
                memory=peak_bytes(call, device) / inputs.features.nbytes,
                features="×".join(map(str, inputs.features.shape)),
                layout=case.layout,
                dtype=case.dtype,
                pixels=inputs.labels.numel(),
                dim=case.dim,
                classes=case.classes,
                spread=case.spread,
            )
        )
    return rows


def on_one_thread(run: Contender, inputs: Inputs) -> Answer:
    """Return a contender that runs with one thread of torch."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return run(inputs)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run processes that compute all the time."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def layouts(shape: tuple[int, ...]) -> list[Case]:
    """Return cases of every layout in every dtype."""
    return [
        Case(of_labels, layout=layout, dtype=dtype)
        for dtype in ("float32", "bfloat16", "float16")
        for of_labels, layout in (
            *((shape, "NCHW"), (shape, "channels-last")),
            ((math.prod(shape),), "(P, D)"),
        )
    ]


def sweeps(shape: tuple[int, int, int]) -> dict[str, list[Case]]:
    """Return cases of increasing pixels, channels, classes and distance from anchors."""
    n, h, w = shape
    shapes = [(1, h // 4, w // 4), (1, h // 2, w // 2), (1, h, w), shape, (2 * n, h, w)]
    half = (math.ceil(n / 2), h, w)  # the widest features fill as much memory as four such halves
    return {
        "pixels": [Case(some) for some in dict.fromkeys(shapes)],
        "dim": [Case(half, dim=dim) for dim in (64, 128, 255, 256, 512, 1024, 2048)],
        "classes": [Case(shape, classes=classes) for classes in (2, 19, 64, 150, 256)],
        "spread": [Case(shape, spread=spread) for spread in (0.03, 0.1, 0.2, 0.3, 0.6)],
    }


# --------------------------------------------------------------------------------------- reporting


def contender_table(rows: list[Measurement]) -> str:
    """Return the table of all measurements of each contender."""
    head = ["operator", "contender", "ms, median (10–90 %)", "ratio", "extra memory"]
    body = [
        [
            *(row.operator, row.contender, f"{row.ms:.2f} ({row.low:.2f}–{row.high:.2f})"),
            *(f"{row.ratio:.2f} × {row.floor}", f"{100 * row.memory:.0f} %"),
        ]
        for row in rows
    ]
    return markdown(head, body)


def our_table(rows: list[Measurement], down: tuple[str, ...], across: str) -> str:
    """Return a table of ratio, milliseconds and extra memory of the library's operators."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        if row.contender == OURS:
            line = cells.setdefault(tuple(str(getattr(row, field)) for field in down), {})
            ratio = f"{row.ratio:.2f} × {row.floor}"
            line[getattr(row, across)] = f"{ratio}, {row.ms:.2f} ms, {100 * row.memory:.0f} %"
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    body = [[*key, *(line[column] for column in columns)] for key, line in cells.items()]
    return markdown([*down, *columns], body)


def machine_columns(device: str, busy: int = 0) -> dict[str, str]:
    """Return the machine, the versions, and the number of busy processes."""
    machine = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    elif cpu.is_file():
        lines = (line.partition(":") for line in cpu.read_text("utf-8").splitlines())
        names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
        machine = names[0] if names else machine
    return {
        "machine": machine,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else ""),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "busy": str(busy),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "anchorda": anchorda.__version__,
    }


def save_csv(path: Path, tables: dict[str, list[Measurement]], where: dict[str, str]) -> None:
    """A line for each measurement."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["table", *Measurement._fields, *where])
        writer.writeheader()
        for table, rows in tables.items():
            writer.writerows({"table": table} | row._asdict() | where for row in rows)


def plot_contenders(axes: Axes, rows: list[Measurement]) -> None:
    """A bar for each ratio of one operator."""
    rows = rows[::-1]
    colors = ["C1" if row.contender == OURS else "0.7" for row in rows]
    bars = axes.barh([row.contender for row in rows], [row.ratio for row in rows], color=colors)
    axes.bar_label(bars, [f"{row.ratio:.1f}" for row in rows], padding=3)
    title = f"{rows[0].operator}, as a multiple of the {rows[0].floor}"
    axes.set_title(title, fontsize=10, loc="left")
    axes.margins(x=0.08)
    axes.spines[["top", "right"]].set_visible(False)


def plot_sweep(axes: Axes, rows: list[Measurement], field: str) -> None:
    """A line of our ratios for each operator."""
    for name in OPERATORS:
        ours = [row for row in rows if row.operator == name and row.contender == OURS]
        x = [getattr(row, field) for row in ours]
        axes.plot(x, [row.ratio for row in ours], "o-", label=f"{name} / {ours[0].floor}")
    axes.axhline(1, color="0.5", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    names = {"pixels": "pixels P", "dim": "channels D", "classes": "classes C", "spread": "spread"}
    axes.set_xlabel(names[field])
    axes.spines[["top", "right"]].set_visible(False)


def save_plot(path: Path, tables: dict[str, list[Measurement]]) -> None:
    """Contenders above, and below how ours scale."""
    by_operator = {
        name: [r for r in tables["contenders"] if r.operator == name] for name in OPERATORS
    }
    heights = [len(rows) + 1 for rows in by_operator.values()]
    above, below = 0.3 * sum(heights), 3.4
    figure = Figure((11, above + below), dpi=120, layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[above, below]).flat
    bars = upper.subplots(len(heights), 1, height_ratios=heights)
    for axes, rows in zip(bars, by_operator.values(), strict=True):
        plot_contenders(axes, rows)
    fields = ("pixels", "dim", "classes", "spread")
    lines = lower.subplots(1, len(fields), sharey=True)
    for axes, field in zip(lines, fields, strict=True):
        plot_sweep(axes, tables[field], field)
    lines[0].set_yscale("log", base=2)  # of all: they share it
    lines[0].yaxis.set_major_formatter("{x:g}")
    lines[0].set_ylabel(f"{OURS}, as a multiple of the floor")
    lower.legend(*lines[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def main() -> None:
    """Print the tables, and write what they were made from."""
    parser = argparse.ArgumentParser(description="What the operators cost.")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pixels", type=int, nargs=3, default=(2, 128, 224), metavar="N H W")
    parser.add_argument("--repeats", type=int, help="15 on a CPU, 100 on CUDA")
    parser.add_argument("--busy", type=int, metavar="K", help="contenders alone, K busy processes")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    device, shape = options.device, tuple(options.pixels)
    repeats = options.repeats or (100 if device == "cuda" else 15)
    where = machine_columns(device, options.busy or 0)
    return_freed_memory()
    print(", ".join(f"{key} {value}" for key, value in where.items()) + "\n", flush=True)

    tables: dict[str, list[Measurement]] = {"contenders": []}
    with busy_processes(options.busy or 0):
        for name, operator in OPERATORS.items():
            has_more = name == "labeling" and options.busy is None
            more = optional_labelers(device) if has_more else {}
            if device == "cpu":
                more[ON_ONE_THREAD] = partial(on_one_thread, operator.contenders[OURS])
            compared = operator._replace(contenders=operator.contenders | more)
            tables["contenders"] += measure(name, compared, Case(shape), device, repeats)
    first = tables["contenders"][0]
    print(f"Features {first.features}, {first.dtype}, {first.classes} classes:\n")
    print(contender_table(tables["contenders"]), flush=True)
    if options.busy is not None:
        save_csv(options.output / "operators.csv", tables, where)
        return

    for table, cases in {"layouts": layouts(shape), **sweeps(shape)}.items():
        tables[table] = [
            row
            for name, operator in OPERATORS.items()
            for case in cases
            for row in measure(name, operator.alone(), case, device, repeats)
        ]
    print("\nBy layout and dtype: ratio, median, extra memory:\n")
    print(our_table(tables["layouts"], ("operator", "layout"), "dtype"))
    print("\nBy pixels, channels, classes and spread, likewise:\n")
    scaling = [row for field in sweeps(shape) for row in tables[field]]
    print(our_table(scaling, ("features", "classes", "spread"), "operator"), flush=True)

    save_csv(options.output / "operators.csv", tables, where)
    save_plot(options.output / "operators.png", tables)


if __name__ == "__main__":
    main()

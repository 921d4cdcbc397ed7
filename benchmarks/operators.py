"""What the operators cost, as ratios to a floor of the same run, beside what one would use instead.

    python benchmarks/operators.py --output runs/bench        # or: make bench
    python benchmarks/operators.py --device cuda --dtype bfloat16

The floor of labeling and class sums is the bare product of the features with as many vectors as
there are classes; that of the losses is one copy of the features. Contenders take turns, so that a
noisy moment hits all of them, and one whose answers differ from float64 is not reported. Faiss,
PyKeOps and a compiler are used where they are. The table, in Markdown, goes to the terminal, all
measurements to OUTPUT/operators.csv, and their picture to OUTPUT/operators.png.
"""

import argparse
import csv
import importlib.util
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from seeds import markdown
from torch import Tensor
from torch.autograd.profiler import profile

import anchorda

Answer = tuple[Tensor, ...]
Contender = Callable[["Inputs"], Answer]
OURS = "anchorda"


class Inputs(NamedTuple):
    """One size."""

    features: Tensor
    labels: Tensor
    anchors: Tensor

    def double(self) -> "Inputs":
        """The same, to compute the truth from."""
        return Inputs(self.features.double(), self.labels, self.anchors.double())


def draw(pixels: tuple[int, ...], dim: int, classes: int, options: argparse.Namespace) -> Inputs:
    """Features around the anchors of their classes, a tenth of them unlabeled."""
    torch.manual_seed(0)
    anchors = torch.rand(classes, dim)
    labels = torch.randint(classes, pixels)
    features = anchors[labels].movedim(-1, 1) + 0.3 * torch.randn(pixels[0], dim, *pixels[1:])
    labels = labels.where(torch.rand(pixels) > 0.1, 255)
    features = features.contiguous().to(options.device, getattr(torch, options.dtype))
    if options.channels_last and features.dim() == 4:
        features = features.contiguous(memory_format=torch.channels_last)
    return Inputs(features, labels.to(options.device), anchors.to(features))


# ---------------------------------------------------------------------------------------- labeling


def flat(features: Tensor) -> Tensor:
    """Features (N, D, *) as rows (P, D)."""
    return features.movedim(1, -1).reshape(-1, features.shape[1])


def product(inputs: Inputs) -> Answer:
    """The floor."""
    features, anchors = inputs.features, inputs.anchors
    if features.dim() == 2 or features.stride(1) == 1:
        return (flat(features) @ anchors.T,)
    return tuple(anchors @ image.flatten(1) for image in features)


def label(inputs: Inputs) -> Answer:
    """What a user of the library calls."""
    pseudo = anchorda.AnchorPseudoLabeler(0.5)(inputs.features, inputs.anchors)
    return pseudo.labels.flatten(), pseudo.scores.flatten()


def label_by_loop(inputs: Inputs) -> Answer:
    """A distance map for each class, as the released code does it."""
    features, anchors = inputs.features, inputs.anchors
    maps = [(features - a.view(1, -1, *[1] * (features.dim() - 2))).norm(dim=1) for a in anchors]
    distances = torch.stack(maps, dim=1)
    first, found = distances.min(dim=1)
    second = distances.scatter(1, found[:, None], torch.inf).min(dim=1).values
    margin = second - first
    return torch.where(margin > 0.5, found, 255).flatten(), margin.flatten()


def label_by_cdist(inputs: Inputs) -> Answer:
    """The obvious way."""
    return by_two(*torch.cdist(flat(inputs.features), inputs.anchors).topk(2, largest=False))


def by_two(two: Tensor, found: Tensor) -> Answer:
    """Labels and margins of the two smallest distances."""
    margin = two[:, 1] - two[:, 0]
    return torch.where(margin > 0.5, found[:, 0], 255), margin


def label_by_formula(features: Tensor, anchors: Tensor) -> Answer:
    """The squares multiplied out, in float32."""
    rows = features.movedim(1, -1).reshape(-1, features.shape[1])
    squared = rows.square().sum(1, keepdim=True) - 2 * rows @ anchors.T + anchors.square().sum(1)
    return by_two(*squared.clamp(min=0).sqrt().topk(2, largest=False))


def label_by_faiss(inputs: Inputs) -> Answer:
    """A search for the two nearest."""
    import faiss  # type: ignore[import-not-found]

    index = faiss.IndexFlatL2(inputs.features.shape[1])
    index.add(inputs.anchors.numpy())
    squared, found = index.search(flat(inputs.features).numpy(), 2)
    return by_two(torch.from_numpy(squared).clamp(min=0).sqrt(), torch.from_numpy(found))


# -------------------------------------------------------------------------------------- class sums


def sums(inputs: Inputs) -> Answer:
    """What a user of the library calls."""
    found = anchorda.class_sums(inputs.features, inputs.labels, len(inputs.anchors))
    return found.sums, found.counts


def sums_by_loop(inputs: Inputs) -> Answer:
    """Boolean indexing, as the released code does it."""
    rows, labels = flat(inputs.features), inputs.labels.flatten()
    chosen = [rows[labels == c] for c in range(len(inputs.anchors))]
    counts = torch.tensor([len(rows) for rows in chosen], device=labels.device)
    return torch.stack([rows.sum(dim=0) for rows in chosen]), counts


def sums_by_index_add(inputs: Inputs) -> Answer:
    """One scattered addition."""
    classes = len(inputs.anchors)
    labels = inputs.labels.flatten().clamp(max=classes)
    zeros = inputs.features.new_zeros(classes + 1, inputs.features.shape[1])
    total = zeros.index_add(0, labels, flat(inputs.features))
    return total[:classes], torch.bincount(labels, minlength=classes + 1)[:classes]


# ------------------------------------------------------------------------------------------ losses


def copy(inputs: Inputs) -> Answer:
    """The floor."""
    return (inputs.features.clone(),)


def with_gradient(loss: Callable[[Tensor], Tensor], features: Tensor) -> Answer:
    """A loss and its gradient in the features."""
    features = features.detach().requires_grad_()
    value = loss(features)
    (gradient,) = torch.autograd.grad(value, features)
    return value.detach(), gradient


def distance(inputs: Inputs) -> Answer:
    """What a user of the library calls."""
    return with_gradient(
        lambda x: anchorda.anchor_distance_loss(x, inputs.labels, inputs.anchors), inputs.features
    )


def distance_by_mask(inputs: Inputs) -> Answer:
    """Boolean indexing."""
    active = inputs.labels < len(inputs.anchors)
    return with_gradient(
        lambda x: (
            (x.movedim(1, -1)[active] - inputs.anchors[inputs.labels[active]]).norm(dim=1).mean()
        ),
        inputs.features,
    )


def distance_by_gather(inputs: Inputs) -> Answer:
    """The anchor of every pixel, gathered."""
    active = inputs.labels < len(inputs.anchors)
    chosen = inputs.anchors[inputs.labels.where(active, 0)].movedim(-1, 1)
    return with_gradient(
        lambda x: torch.where(active, (x - chosen).norm(dim=1), 0).sum() / active.sum(),
        inputs.features,
    )


def contrast(inputs: Inputs) -> Answer:
    """What a user of the library calls."""
    return with_gradient(
        lambda x: anchorda.anchor_contrastive_loss(x, inputs.labels, inputs.anchors),
        inputs.features,
    )


def contrast_by_cdist(inputs: Inputs) -> Answer:
    """The obvious way."""
    return with_gradient(
        lambda x: torch.nn.functional.cross_entropy(
            -torch.cdist(flat(x), inputs.anchors), inputs.labels.flatten(), ignore_index=255
        ),
        inputs.features,
    )


# --------------------------------------------------------------------------------------- measuring


def contenders(device: str) -> dict[str, tuple[str, Contender, dict[str, Contender]]]:
    """For every operator the floor's name, the floor, and who takes part."""
    labeling: dict[str, Contender] = {
        OURS: label,
        "loop over classes": label_by_loop,
        "torch.cdist + topk": label_by_cdist,
        "formula + topk": lambda i: label_by_formula(i.features, i.anchors),
    }
    if shutil.which("c++") or device == "cuda":
        compiled = torch.compile(label_by_formula, dynamic=False)
        labeling["formula + topk, compiled"] = lambda i: compiled(i.features, i.anchors)
    if importlib.util.find_spec("faiss") is not None and device == "cpu":
        labeling["faiss, flat index"] = label_by_faiss
    return {
        "labeling": ("product", product, labeling),
        "class sums": (
            *("product", product),
            {OURS: sums, "loop over classes": sums_by_loop, "index_add": sums_by_index_add},
        ),
        "distance loss": (
            *("copy", copy),
            {OURS: distance, "boolean mask": distance_by_mask, "gather": distance_by_gather},
        ),
        "contrastive loss": ("copy", copy, {OURS: contrast, "torch.cdist": contrast_by_cdist}),
    }


def is_right(answer: Answer, truth: Answer) -> bool:
    """Whether an answer is the truth's to the precision of float32; labels, but for a few ties."""
    for got, expected in zip(answer, truth, strict=True):
        if got.shape != expected.shape:
            return False
        if not expected.is_floating_point():
            if (got != expected).sum() > 1e-4 * got.numel():
                return False
        elif (got.double() - expected).abs().max() > 1e-3 * expected.abs().max():
            return False
    return True


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The memory that a call takes at its peak, beyond what was there."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as recorded:
        run()
    held = peak = 0
    events = recorded.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Of one call."""
    begun = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begun)


Row = dict[str, object]


def measure(name: str, inputs: Inputs, options: argparse.Namespace) -> list[Row]:
    """One operator at one size: a row for the floor and for every contender that is right."""
    floor_name, floor, all_runs = contenders(options.device)[name]
    truth = all_runs[OURS](inputs.double())
    runs: dict[str, Contender] = {floor_name: floor}
    for who, run in all_runs.items():
        if who == OURS or is_right(run(inputs), truth):
            runs[who] = run
        else:
            print(f"{name}: {who} is left out, its answers differ", flush=True)
    assert is_right(all_runs[OURS](inputs), truth), f"{name}: our own answers differ"
    times: Mapping[str, list[float]] = {who: [] for who in runs}
    for _ in range(options.repeats):
        for who, run in runs.items():
            times[who].append(milliseconds(partial(run, inputs), options.device))
    base = statistics.median(times[floor_name])
    size = inputs.features.numel() * inputs.features.element_size()
    rows: list[Row] = []
    for who, run in runs.items():
        ordered = sorted(times[who])
        rows.append(
            {
                "operator": name,
                "contender": who,
                "ms": statistics.median(ordered),
                "low": ordered[len(ordered) // 10],
                "high": ordered[-1 - len(ordered) // 10],
                "ratio": statistics.median(ordered) / base,
                "floor": floor_name,
                "memory": peak_bytes(partial(run, inputs), options.device) / size,
                "features": "x".join(map(str, inputs.features.shape)),
                "classes": len(inputs.anchors),
            }
        )
    return rows


def table(rows: list[Row], columns: tuple[str, ...]) -> str:
    """Rows of measurements in Markdown."""
    body = [
        [
            *(str(row[column]) for column in columns),
            f"{row['ms']:.1f} ({row['low']:.1f}–{row['high']:.1f})",
            f"{row['ratio']:.2f} × {row['floor']}",
            f"{100 * float(str(row['memory'])):.0f} %",
        ]
        for row in rows
    ]
    return markdown([*columns, "ms, median (10–90 %)", "ratio", "extra memory"], body)


def save_plot(path: Path, rows: list[Row]) -> None:
    """A bar of every ratio, by operator."""
    names = list(dict.fromkeys(str(row["operator"]) for row in rows))
    figure = Figure((11, 0.6 + 0.3 * len(rows)), dpi=120, layout="constrained")
    counts = [sum(row["operator"] == name for row in rows) for name in names]
    grid = figure.subplots(len(names), 1, squeeze=False, height_ratios=counts)
    for axes, name in zip(grid.flat, names, strict=True):
        chosen = [row for row in rows if row["operator"] == name][::-1]
        ratios = [float(str(row["ratio"])) for row in chosen]
        colors = ["C1" if row["contender"] == OURS else "0.7" for row in chosen]
        bars = axes.barh([str(row["contender"]) for row in chosen], ratios, color=colors)
        axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=3)
        axes.set_title(
            f"{name}, as a multiple of the {chosen[0]['floor']}", fontsize=10, loc="left"
        )
        axes.margins(x=0.08)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Print the tables, and write what they were made from."""
    parser = argparse.ArgumentParser(description="What the operators cost.")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    inputs = draw((2, 128, 224), 256, 19, options)
    rows = [row for name in contenders("cpu") for row in measure(name, inputs, options)]
    print(table(rows, ("operator", "contender")), flush=True)
    sizes: list[tuple[tuple[int, ...], int, int]] = [
        *(((2, 128, 224), dim, classes) for dim, classes in ((64, 19), (255, 19), (256, 150))),
        *(((2, 64, 112), 1024, 19), ((1, 64, 112), 256, 19), ((57344,), 256, 19)),
    ]
    scaling = []
    for pixels, dim, classes in sizes:
        inputs = draw(pixels, dim, classes, options)
        for name in ("labeling", "class sums", "distance loss"):
            found = measure(name, inputs, options)
            scaling += [row for row in found if row["contender"] in (OURS, row["floor"])]
    ours = [row for row in scaling if row["contender"] == OURS]
    print("\n" + table(ours, ("operator", "features", "classes")), flush=True)

    where = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    where |= {"threads": str(torch.get_num_threads()), "dtype": options.dtype}
    if options.device == "cuda":
        where["machine"] = torch.cuda.get_device_name()
    with (options.output / "operators.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *where])
        writer.writeheader()
        writer.writerows(row | where for row in rows + scaling)
    save_plot(options.output / "operators.png", rows)


if __name__ == "__main__":
    main()

"""Anchor-guided domain adaptation (CAG-UDA, arXiv 1910.13049), from settings to report.

    python examples/gta5_to_cityscapes/train.py --source GTA5 --target CITYSCAPES --output runs/one

Data, network, warm-up, stages, report. A stage itself, its anchors, labels and losses, is in
`method.py`; README.md has the map of all files. Without data sets, a small synthetic pair is drawn.
`--preset gta5` and `--preset synthia` are the paper's settings, and `torchrun --nproc-per-node=4
train.py …` trains on as many GPUs. The labels of the target's training images are never trained on:
where they exist they tell, after the fact, how good the pseudo-labels were.
"""

import copy
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import parallel
import torch
from data import Data, DataSettings, check_content, open_data
from engine.files import load_finished, write_text
from engine.loop import Losses, Phase, TrainingSettings, make_optimizer, scheduled, train
from engine.run import ResumeError, Run
from matplotlib.figure import Figure
from method import (
    Stage,
    StageSettings,
    begin_stage,
    label_target,
    labeled_shares,
    released_losses,
    restore_stage,
    stage_losses,
)
from networks.build import new_network
from networks.segmenter import Segmenter
from readers import DatasetError
from report import (
    draw_anchor_distances,
    draw_curves,
    draw_label_quality,
    draw_margin_curves,
    draw_rows,
    iou_table,
    save,
)
from scores import evaluate, label_quality, margin_counts, predict, select
from settings import parse_settings
from streams import RandomStream
from torch import Tensor, nn
from warm_up import Discriminator, WarmUpSettings, adversarial_losses, source_losses

import anchorda

sys.path.insert(0, str(Path(__file__).parents[1] / "synthetic"))
from synthetic import write_synthetic_pair


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that all phases share."""

    run: Run
    data: Data
    training: TrainingSettings
    scores: dict[str, anchorda.ConfusionMatrix] = dataclasses.field(default_factory=dict)
    """The confusion on the evaluation images after each phase."""

    def complete(self, phase: Phase) -> None:
        """Train a phase, score its network and save it, unless an earlier start has done so."""
        network = phase.networks["network"]
        assert isinstance(network, Segmenter)
        finished = self.run.finished(phase.name)
        if finished is not None:
            network.load_state_dict(finished["network"])
            self.scores[phase.name] = anchorda.ConfusionMatrix(len(self.data.classes))
            self.scores[phase.name].counts.copy_(finished["confusion"])
            return
        train(phase, self.training, self.run)
        scores = evaluate(network, self.data.evaluation, self.data).cpu()
        self.scores[phase.name] = scores
        names = self.data.classes.names
        self.run.records.evaluation(phase.name, scores, names)
        parts = {
            "network": network.state_dict(),
            "stored": dict(phase.stored),
            "classes": self.data.classes.plain(),
            "evaluated": list(self.data.evaluated),
        }
        self.run.finish(phase.name, {**parts, "confusion": scores.counts})
        if parallel.is_main():
            print(f"\n{iou_table(self.scores, self.data.evaluated, names)}\n", flush=True)


def adapt(arguments: list[str] | None = None) -> Path:
    """Run the experiment of a command line, by default this process's; the folder of its report."""
    settings = parse_settings(arguments)
    run = Run(settings.run, settings.plain())
    if parallel.is_main():
        settings.save(settings.run.output / "settings.toml")
    data_settings = folders(settings.data, run)
    data = open_data(data_settings, run.loading)
    check_content(data, data_settings, settings.run.output / "data.json", settings.run.resume)
    if settings.training.best_by == "target" and len(data.evaluation) == 0:
        raise DatasetError("--best-by target needs images of the target with labels.")
    experiment = Experiment(run, data, settings.training)
    initial_network = partial(
        new_network, settings.network, settings.run.seed, run.device, len(data.classes)
    )

    if settings.warm_up.baseline:
        plain = dataclasses.replace(data, photometric=False)
        alone = dataclasses.replace(settings.warm_up, warmup="source", warmup_checkpoint=None)
        shared = dataclasses.replace(experiment, data=plain)
        warm_up("source only", initial_network(), shared, alone)
    network = initial_network()
    warm_up("warm-up", network, experiment, settings.warm_up)
    warm = copy.deepcopy(network).eval()

    stage, tables = None, []
    for number in range(1, settings.stages.stages + 1):
        stage, table = train_stage(number, stage, network, experiment, settings.stages)
        tables.append(f"stage {number}\n{table}\n")

    stage = stage or begin_stage(network, data, settings.stages)
    networks = {"warm-up": warm, "adapted": network.eval()}
    folder = write_report(experiment, networks, stage, settings.stages.labels)
    run.records.close()
    if parallel.is_main():
        write_text(folder / "anchors.txt", "\n".join(tables))
    return folder


def folders(settings: DataSettings, run: Run) -> DataSettings:
    """Return the data settings; without folders, draw a synthetic pair and return its."""
    if settings.source is not None:
        return settings
    folder = run.settings.output / "synthetic"
    if parallel.is_main():
        kind: Literal["gta5", "synthia"]
        kind = "synthia" if settings.source_format == "synthia" else "gta5"
        write_synthetic_pair(folder, seed=run.settings.seed, source_format=kind)
    parallel.wait()
    return dataclasses.replace(settings, source=folder / "source", target=folder / "target")


# ------------------------------------------------------------------------------------------ phases


def warm_up(
    name: str, network: Segmenter, experiment: Experiment, settings: WarmUpSettings
) -> None:
    """Train on the source and, if asked for, align the target's predictions with it."""
    data, training, seed = experiment.data, experiment.training, experiment.run.settings.seed
    count = training.iterations(settings.warmup_iterations)
    if settings.warmup_checkpoint is not None:
        network.load_state_dict(load_finished(settings.warmup_checkpoint)["network"])
        count = 0
    networks = nn.ModuleDict({"network": network})
    optimizers = [make_optimizer(network, settings.warmup_learning_rate, training)]
    losses: Losses = partial(source_losses, data=data)
    streams: list[RandomStream[Any]] = [RandomStream(data.source, (seed, 0, 0))]
    if settings.warmup == "adversarial":
        discriminator = Discriminator(len(data.classes)).to(experiment.run.device)
        networks["discriminator"] = discriminator
        rate = settings.discriminator_learning_rate
        optimizers.append(torch.optim.Adam(discriminator.parameters(), rate, betas=(0.9, 0.99)))
        losses = partial(adversarial_losses, data=data, weight=settings.adversarial_weight)
        streams.append(RandomStream(data.target, (seed, 0, 1)))
    experiment.complete(
        Phase(
            name=name,
            number=0,
            iterations=count,
            batch=settings.warmup_batch,
            networks=networks,
            losses=losses,
            optimizers=[scheduled(o, count, training.rise) for o in optimizers],
            streams=streams,
            score=partial(select, data=data),
        )
    )


def train_stage(
    number: int,
    previous: Stage | None,
    network: Segmenter,
    experiment: Experiment,
    settings: StageSettings,
) -> tuple[Stage, str]:
    """Label the target and train on both domains; return the stage and a table of anchors."""
    name, training = f"stage {number}", experiment.training
    data, run = experiment.data, experiment.run
    stored = run.stored(name)
    if stored is None:
        stage = begin_stage(network, data, settings)
        table = anchor_table(stage, previous, data.classes.names)
        say_labeled(name, stage, data, settings.labels)
        for kind, quality in label_quality(stage, data, settings.labels).items():
            run.records.pseudo_labels(name, kind, quality, data.classes.names)
    else:
        stage, table = restore_stage(network, stored["stage"]), stored["health"]
    distances = draw_anchor_distances(stage.labeler.centroids, data.classes.names)
    if distances is not None:
        run.records.figure("anchor distances", distances, number)
    count = training.iterations(settings.stage_iterations)
    optimizer = make_optimizer(network, settings.stage_learning_rate, training)
    objective = stage_losses if settings.objective == "paper" else released_losses
    seed = run.settings.seed
    experiment.complete(
        Phase(
            name=name,
            number=number,
            iterations=count,
            batch=settings.stage_batch,
            networks=nn.ModuleDict({"network": network}),
            losses=partial(objective, stage=stage, data=data, settings=settings),
            optimizers=[scheduled(optimizer, count, training.rise)],
            streams=[
                RandomStream(data.source, (seed, number, 0)),
                RandomStream(data.target, (seed, number, 1)),
            ],
            score=partial(select, data=data),
            # The tensors are those of the stage: a checkpoint has the teacher of its iteration.
            stored={"stage": stage.plain(), "health": table},
            after_step=partial(follow, stage, network, training.teacher),
        )
    )
    return stage, table


def follow(stage: Stage, network: Segmenter, decay: float) -> None:
    """Move the copy that labels the target towards the trained network, unless the decay is 0."""
    if decay:
        parallel.share_buffers(network)  # so that the copies of all processes stay equal
        stage.labeler.follow(network, decay)


def say_labeled(name: str, stage: Stage, data: Data, kinds: str) -> None:
    """Print the share of target pixels that a stage labels, and warn if it is none."""
    shares = labeled_shares(stage, data, kinds)
    if not parallel.is_main():
        return
    said = ", ".join(f"{share:.1%} by {kind}" for kind, share in shares.items())
    print(f"{name}: labeled pixels of the target: {said}", flush=True)
    for kind in (kind for kind, share in shares.items() if share == 0):
        flag = "--margin" if kind == "anchor" else "--probability"
        print(
            f"warning: {name}: no pixel of the target gets a label by {kind}; its losses will be "
            f"0. Lower {flag}, or train the warm-up longer.",
            file=sys.stderr,
        )


def anchor_table(stage: Stage, previous: Stage | None, names: Sequence[str]) -> str:
    """Return counts, nearest neighbors and drift of a stage's anchors."""
    before = None if previous is None else previous.labeler.centroids
    health = anchorda.anchor_health(stage.labeler.centroids, stage.counts, previous=before)
    return health.table(names)


# ------------------------------------------------------------------------------------------ report


def write_report(
    experiment: Experiment, networks: Mapping[str, Segmenter], stage: Stage, kinds: str
) -> Path:
    """Write the table and the pictures by which a person judges a run, and return their folder."""
    run, data = experiment.run, experiment.data
    folder, metrics = run.settings.output / "report", run.settings.output / "metrics.jsonl"
    names = data.classes.names
    margins = margins_by_domain(stage, data)
    if not parallel.is_main():
        return folder
    folder.mkdir(exist_ok=True)
    write_text(folder / "iou.txt", iou_table(experiment.scores, data.evaluated, names) + "\n")
    figures = {
        "panels": draw_panels(networks, stage, data, kinds),
        "curves": draw_curves(metrics),
        "label_quality": draw_label_quality(metrics),
        "anchor_distances": draw_anchor_distances(stage.labeler.centroids.cpu(), names),
        "margins": draw_margin_curves(margins, stage.labeler.by_anchor.min_margin, names),
    }
    for title, figure in figures.items():
        if figure is not None:
            save(figure, folder / f"{title}.png")
            run.records.figure(f"report/{title}", figure)
    return folder


def draw_panels(networks: Mapping[str, Segmenter], stage: Stage, data: Data, kinds: str) -> Figure:
    """Draw four images: truth, if known, predictions of the networks, and last pseudo-labels."""
    scored = len(data.evaluation) > 0
    images = data.evaluation if scored else data.target_whole
    rows = []
    for index in range(0, len(images), max(1, len(images) // 4))[:4]:
        sample = images[index]
        image, truth = (sample, []) if isinstance(sample, Tensor) else (sample[0], [sample[1]])
        size = truth[0].shape if truth else image.shape[1:]
        batch = image[None].to(data.loading.device)
        predictions = [predict(network, batch, size)[0] for network in networks.values()]
        maps = [*label_target(stage, batch, kinds).maps.values()]
        pseudo = anchorda.combine_pseudo_labels(maps[0], maps[-1], "union")[0]
        rows.append((image, [*truth, *predictions, pseudo]))
    titles = ["image", *(["truth"] if scored else []), *networks, "last pseudo-labels"]
    return draw_rows(titles, rows, data.classes)


def margins_by_domain(stage: Stage, data: Data) -> dict[str, anchorda.ScoreCalibrator]:
    """Return the margins of both domains, as far as their truth is known, of all processes."""
    return {
        domain: margin_counts(stage, images, data)
        for domain, images in (("held-out source", data.held_out), ("target", data.analysis))
        if images is not None
    }


def main() -> None:
    """Run from the command line."""
    try:
        folder = adapt()
    except (DatasetError, FloatingPointError, ResumeError) as error:
        # From a worker process the message comes behind a traceback.
        sys.exit("error: " + str(error).rpartition("DatasetError: ")[2])
    if parallel.is_main():
        print(f"Report: {folder}")
    parallel.stop()


if __name__ == "__main__":
    main()

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
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from classes import CLASS_NAMES, NUM_CLASSES
from data import Data, DataSettings, open_data
from engine import parallel
from engine.files import load_finished, write_text
from engine.loop import Losses, Phase, TrainingSettings, make_optimizer, scheduled, train
from engine.run import Run
from method import (
    Stage,
    StageSettings,
    begin_stage,
    label_target,
    paper_losses,
    released_losses,
    restore_stage,
)
from networks.build import new_network
from networks.segmenter import Segmenter
from readers import DatasetError
from report import (
    iou_table,
    save_anchor_distances,
    save_curves,
    save_label_quality,
    save_margin_curves,
    save_rows,
)
from scores import evaluate, label_quality, margin_counts, predict, select
from settings import parse_settings
from streams import RandomStream
from torch import nn
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
            self.scores[phase.name] = anchorda.ConfusionMatrix(NUM_CLASSES)
            self.scores[phase.name].counts.copy_(finished["confusion"])
            return
        train(phase, self.training, self.run)
        scores = evaluate(network, self.data.evaluation, self.data).cpu()
        self.scores[phase.name] = scores
        self.run.records.evaluation(phase.name, scores)
        parts = {"network": network.state_dict(), "held": dict(phase.held)}
        self.run.finish(phase.name, {**parts, "confusion": scores.counts})
        if parallel.is_main():
            print(f"\n{iou_table(self.scores, self.data.evaluated)}\n", flush=True)


def adapt(arguments: list[str] | None = None) -> Path:
    """Run the experiment of a command line, by default this process's; return its report's folder.

    Baseline, if asked for; warm-up; stages.
    """
    settings = parse_settings(arguments)
    run = Run(settings.run, settings.plain())
    if parallel.is_main():
        settings.save(settings.run.output / "settings.toml")
    data = open_data(folders(settings.data, run), run.loading)
    experiment = Experiment(run, data, settings.training)
    initial_network = partial(new_network, settings.network, settings.run.seed, run.device)

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
    run.records.close()
    stage = stage or begin_stage(network, data, settings.stages)

    folder = settings.run.output / "report"
    if parallel.is_main():
        folder.mkdir(exist_ok=True)
        write_text(folder / "iou.txt", iou_table(experiment.scores, data.evaluated) + "\n")
        write_text(folder / "anchors.txt", "\n".join(tables))
        networks = {"warm-up": warm, "adapted": network.eval()}
        draw_panels(folder, networks, stage, data, settings.stages.labels)
        save_curves(folder / "curves.png", settings.run.output / "metrics.jsonl")
        save_label_quality(folder / "label_quality.png", settings.run.output / "metrics.jsonl")
        save_anchor_distances(folder / "anchor_distances.png", stage.labeler.centroids.cpu())
    draw_margins(folder, stage, data)
    return folder


def folders(settings: DataSettings, run: Run) -> DataSettings:
    """The data settings; without folders in them, those of a synthetic pair that is drawn now."""
    if settings.source is not None:
        return settings
    folder = run.settings.output / "synthetic"
    if parallel.is_main():
        write_synthetic_pair(folder, seed=run.settings.seed, source_format=settings.source_format)
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
        discriminator = Discriminator(NUM_CLASSES).to(experiment.run.device)
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
    """Label the target anew and train on both domains; the stage and a table of its anchors."""
    name, data, run, training = (
        f"stage {number}",
        experiment.data,
        experiment.run,
        experiment.training,
    )
    held = run.held(name)
    if held is None:
        stage = begin_stage(network, data, settings)
        held = {"stage": stage.plain(), "health": anchor_table(stage, previous)}
        for kind, quality in label_quality(stage, data, settings.labels).items():
            run.records.pseudo_labels(name, kind, quality)
    else:
        stage = restore_stage(network, held["stage"])
    count = training.iterations(settings.stage_iterations)
    optimizer = make_optimizer(network, settings.stage_learning_rate, training)
    objective = paper_losses if settings.objective == "paper" else released_losses
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
            held=held,
        )
    )
    return stage, held["health"]


def anchor_table(stage: Stage, previous: Stage | None) -> str:
    """Counts, nearest neighbors and drift of a stage's anchors."""
    before = None if previous is None else previous.labeler.centroids
    health = anchorda.anchor_health(stage.labeler.centroids, stage.counts, previous=before)
    return health.table(CLASS_NAMES)


# ---------------------------------------------------------------------------------------- pictures


def draw_panels(
    folder: Path, networks: Mapping[str, Segmenter], stage: Stage, data: Data, kinds: str
) -> None:
    """Four evaluation images: truth, predictions of the networks, and pseudo-labels of a stage."""
    rows = []
    for index in range(0, len(data.evaluation), max(1, len(data.evaluation) // 4))[:4]:
        image, truth = data.evaluation[index]
        images = image[None].to(data.loading.device)
        predictions = [predict(network, images, truth.shape)[0] for network in networks.values()]
        maps = [*label_target(stage, images, kinds).values()]
        pseudo = anchorda.combine_pseudo_labels(maps[0], maps[-1], "union")[0]
        rows.append((image, [truth, *predictions, pseudo]))
    save_rows(folder / "panels.png", ["image", "truth", *networks, "last pseudo-labels"], rows)


def draw_margins(folder: Path, stage: Stage, data: Data) -> None:
    """The curves of other minimum margins, which all processes count together."""
    margins = {
        domain: margin_counts(stage, images, data)
        for domain, images in (("held-out source", data.held_out), ("target", data.analysis))
        if images is not None
    }
    if parallel.is_main():
        save_margin_curves(folder / "margins.png", margins, stage.labeler.by_anchor.min_margin)


def main() -> None:
    """Run from the command line."""
    try:
        folder = adapt()
    except (DatasetError, FloatingPointError) as error:
        # From a worker process the message comes behind a traceback.
        sys.exit("error: " + str(error).rpartition("DatasetError: ")[2])
    if parallel.is_main():
        print(f"Report: {folder}")
    parallel.stop()


if __name__ == "__main__":
    main()

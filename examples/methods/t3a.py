"""T3A: adjusts the classifier while it predicts, without training (NeurIPS 2021).

    python examples/methods/t3a.py --source DIR --target DIR --classes FILE --output runs/t3a

Iwasawa and Matsuo, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain
Generalization". Each class has a support set: it starts as the row of the classifier, and every
feature that is predicted as the class joins it. The supports of least entropy add up to the new row
of the class. Only target images are used, one batch after the other, in the order they come.

Not as in the paper, which classifies images: the supports are pixels.
"""

import sys
from functools import partial

import steps  # noqa: F401 # finds the modules of the folder above
import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import normalize

import anchorda
import image_folders
import light_network
import segmentation

FILTER = 100  # M: supports of each class that count


class AdjustedClassifier(nn.Module):
    """A network whose classifier follows the images that it is shown.

    Images (N, 3, H, W) to features (N, D, h, w) and adjusted logits (N, C, h, w).
    """

    supports: Tensor
    labels: Tensor
    entropies: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        classifier = network.get_submodule("classifier")
        rows = classifier.get_parameter("weight").detach().clone()
        logits = classifier(rows).flatten(1).detach()
        self.num_classes = len(rows)
        self.register_buffer("supports", rows.flatten(1))
        self.register_buffer("labels", logits.argmax(dim=1))
        self.register_buffer("entropies", entropy(logits))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Let the pixels join the supports, and return features and logits."""
        features, logits = self.network(images)
        rows = features.movedim(1, -1).flatten(0, -2)
        pixels = logits.movedim(1, -1).flatten(0, -2)
        self.join(rows, pixels.argmax(dim=1), entropy(pixels))
        sums, _ = anchorda.class_sums(normalize(self.supports), self.labels, self.num_classes)
        weight = normalize(sums.to(features.dtype))
        return features, torch.einsum("nd...,cd->nc...", features, weight)

    def join(self, rows: Tensor, labels: Tensor, entropies: Tensor) -> None:
        """Add supports; of each class those of least entropy stay, as no others ever count."""
        rows, labels, entropies = (
            torch.cat(parts)
            for parts in (
                (self.supports, rows),
                (self.labels, labels),
                (self.entropies, entropies),
            )
        )
        order = entropies.argsort(stable=True)
        chosen = [order[labels[order] == c][:FILTER] for c in range(self.num_classes)]
        index = torch.cat(chosen)
        self.supports, self.labels = rows[index], labels[index]
        self.entropies = entropies[index]


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the prediction of each row."""
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def main() -> None:
    """Warm up on the source, then adjust the classifier on the evaluation images."""
    options = tyro.cli(segmentation.Options)
    torch.set_num_threads(options.threads)
    if options.source is None or options.target is None or options.classes is None:
        sys.exit("Expected --source, --target and --classes.")
    data = image_folders.open_data(options.source, options.target, options.classes, options.size)
    torch.manual_seed(options.seed)
    start = light_network.build_network(options.network, len(data.classes), options.device)
    warm = segmentation.run_phase("source only", 0, start, segmentation.source_alone, data, options)
    networks = {"source only": warm, "adapted": AdjustedClassifier(warm)}
    scores = {
        name: segmentation.evaluate(network, data.evaluation, data, options)
        for name, network in networks.items()
    }
    predictors = {
        n: partial(segmentation.predict, x, size=options.size) for n, x in networks.items()
    }
    pictures = image_folders.draw_pictures(data.evaluation, predictors, data.classes)
    image_folders.save(options.output / "pictures.png", partial(pictures.savefig, dpi=100))
    image_folders.write_scores(options.output / "scores.json", scores)


if __name__ == "__main__":
    main()

"""Output-space adversarial alignment: AdaptSegNet (Tsai et al., CVPR 2018), single level."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Discriminator(nn.Module):
    """Tells source from target by maps of class probabilities, one logit per patch.

    Five convolutions 4×4 with stride 2, leaky ReLUs of slope 0.2 between them.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        channels = (num_classes, 64, 128, 256, 512)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 2, padding=1))

    def forward(self, probabilities: Tensor) -> Tensor:
        """Logits (N, 1, h, w), positive for source, of probabilities (N, C, H, W), H, W ≥ 32."""
        logits: Tensor = self.layers(probabilities)
        return logits


def fooling_loss(discriminator: nn.Module, target: Tensor) -> Tensor:
    r"""What moves the network: its target predictions should be taken for the source's.

    .. math:: -\mathrm{mean} \log \sigma(D(\mathrm{softmax}(z^t)))

    The discriminator gets no gradient from it.

    Args:
        discriminator: D.
        target: (N, C, H, W), logits z of the target at the size of the images.
    """
    fixed = {name: value.detach() for name, value in discriminator.named_parameters()}
    judged = torch.func.functional_call(discriminator, fixed, (target.softmax(dim=1),))
    return _cross_entropy(judged, 1.0)


def telling_loss(discriminator: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    r"""What trains the discriminator, on predictions that get no gradient from it.

    .. math:: -\tfrac12 \mathrm{mean} \log \sigma(D(\mathrm{softmax}(z^s)))
              -\tfrac12 \mathrm{mean} \log (1 - \sigma(D(\mathrm{softmax}(z^t))))
    """
    judged_source = discriminator(source.detach().softmax(dim=1))
    judged_target = discriminator(target.detach().softmax(dim=1))
    return 0.5 * (_cross_entropy(judged_source, 1.0) + _cross_entropy(judged_target, 0.0))


def _cross_entropy(logits: Tensor, truth: float) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))

"""Networks by name: what a setting or a checkpoint calls them, and the module."""

from pathlib import Path

from classes import NUM_CLASSES
from deeplab import DeepLab, load_backbone, load_network
from network import Segmenter, SmallSegmenter

NETWORKS = ("small", "deeplab18", "deeplab50", "deeplab101")


def build_network(name: str) -> Segmenter:
    """One of `NETWORKS`, with weights drawn from torch's global generator."""
    if name == "small":
        return SmallSegmenter(NUM_CLASSES)
    return DeepLab(NUM_CLASSES, depth=int(name.removeprefix("deeplab")))


def load_weights(network: Segmenter, *, whole: str | None, backbone: str | None) -> None:
    """Load the weights of a whole network, or of its backbone alone; see the loaders' modules.

    Raises:
        ValueError: if they are of another network; the message lists what differs.
    """
    if isinstance(network, DeepLab):
        if whole is not None:
            load_network(network, Path(whole))
        if backbone is not None:
            load_backbone(network, Path(backbone))

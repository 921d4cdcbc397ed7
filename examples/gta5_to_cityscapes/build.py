"""Networks by name: what a setting or a checkpoint calls them, and the module."""

from classes import NUM_CLASSES
from deeplab import DeepLab
from network import Segmenter, SmallSegmenter

NETWORKS = ("small", "deeplab18", "deeplab50", "deeplab101")


def build_network(name: str) -> Segmenter:
    """One of `NETWORKS`, with weights drawn from torch's global generator."""
    if name == "small":
        return SmallSegmenter(NUM_CLASSES)
    return DeepLab(NUM_CLASSES, depth=int(name.removeprefix("deeplab")))

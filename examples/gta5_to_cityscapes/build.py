"""Networks by name: what a setting or a checkpoint calls them, and the module."""

import importlib.util
from pathlib import Path

from classes import NUM_CLASSES
from deeplab import DeepLab, load_backbone, load_network
from network import Segmenter, SmallSegmenter

NETWORKS = (
    *("small", "deeplab18", "deeplab50", "deeplab101"),
    *(f"segformer-b{size}" for size in range(6)),
)


def build_network(name: str) -> Segmenter:
    """One of `NETWORKS`, with weights drawn from torch's global generator.

    Raises:
        ValueError: if there is no such network, or it needs a package that is not installed.
    """
    if name not in NETWORKS:
        raise ValueError(f"Expected one of the networks {', '.join(NETWORKS)}, but got {name!r}.")
    if name == "small":
        return SmallSegmenter(NUM_CLASSES)
    if name.startswith("deeplab"):
        return DeepLab(NUM_CLASSES, depth=int(name.removeprefix("deeplab")))
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            f"The network {name} needs the package transformers, which is not installed. "
            'Install it with: pip install ".[segformer]"'
        )
    # Not at the top: importing transformers takes seconds, and is only for those who have it.
    from segformer import SegFormer

    return SegFormer(NUM_CLASSES, size=name.removeprefix("segformer-"))


def load_weights(network: Segmenter, *, whole: str | None, backbone: str | None) -> None:
    """Load the weights of a whole network, or of its backbone alone; see the loaders' modules.

    Raises:
        ValueError: if they are of another network; the message lists what differs.
    """
    if whole is None and backbone is None:
        return
    if isinstance(network, DeepLab):
        if whole is not None:
            load_network(network, Path(whole))
        if backbone is not None:
            load_backbone(network, Path(backbone))
        return
    from segformer import SegFormer, load_encoder, load_segformer

    assert isinstance(network, SegFormer)
    if whole is not None:
        load_segformer(network, whole)
    if backbone is not None:
        load_encoder(network, backbone)

"""SegFormer (Xie et al., NeurIPS 2021) from `transformers`, with the features of its decoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerModel

from networks.segmenter import ImageNetNormalization, Segmenter, weights_error


class _Size(NamedTuple):
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    decoder: int


_WIDE = (64, 128, 320, 512)
_SIZES = {
    "b0": _Size((2, 2, 2, 2), (32, 64, 160, 256), 256),
    "b1": _Size((2, 2, 2, 2), _WIDE, 256),
    "b2": _Size((3, 4, 6, 3), _WIDE, 768),
    "b3": _Size((3, 4, 18, 3), _WIDE, 768),
    "b4": _Size((3, 8, 27, 3), _WIDE, 768),
    "b5": _Size((3, 6, 40, 3), _WIDE, 768),
}
# Of the ImageNet classifier, for which there is no place in a segmentation network.
_OF_CLASSIFIER = {"classifier.weight", "classifier.bias"}


class SegFormer(Segmenter):
    """SegFormer with a MiT encoder; it sees images in [0, 1] and normalizes them as ImageNet's.

    Args:
        num_classes: C.
        size: of the encoder, "b0" to "b5".
    """

    def __init__(self, num_classes: int, size: str = "b0") -> None:
        super().__init__()
        if size not in _SIZES:
            raise ValueError(f"Expected `size` to be one of {[*_SIZES]}, but got {size!r}.")
        depths, widths, self.feature_dim = _SIZES[size]
        whole = SegformerForSemanticSegmentation(
            SegformerConfig(
                depths=list(depths),
                hidden_sizes=list(widths),
                decoder_hidden_size=self.feature_dim,
                num_labels=num_classes,
            )
        )
        self.encoder = whole.segformer
        self.decoder = whole.decode_head
        # The decoder's last layer becomes the network's own, so that what goes into it comes out.
        self.classifier: nn.Conv2d = self.decoder.classifier
        self.decoder.classifier = nn.Identity()
        self.normalize = ImageNetNormalization()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D, H/4, W/4) and logits (N, C, H/4, W/4), sizes rounded up."""
        hidden = self.encoder(self.normalize(images), output_hidden_states=True).hidden_states
        features = self.decoder(hidden)
        return features, self.classifier(features)


def load_encoder(network: SegFormer, source: str) -> None:
    """Load ImageNet weights into the encoder; the rest stays as it is.

    Args:
        network: of the same size.
        source: a folder of `save_pretrained`, or a name on the hub such as "nvidia/mit-b5".

    Raises:
        ValueError: if there is no such folder or name, or it is of another size, or its weights
            differ in names or shapes, which are listed; the network is as it was.
    """
    size = _size_of(network.encoder.config)
    _load(network.encoder, SegformerModel, source, size, allowed=_OF_CLASSIFIER)


def load_segformer(network: SegFormer, source: str) -> None:
    """Load the weights of a whole segmentation network with the same classes.

    As `load_encoder`, of what a `SegformerForSemanticSegmentation` has saved.
    """
    whole = nn.Module()  # named as theirs
    whole.segformer = network.encoder
    whole.decode_head = network.decoder
    own = network.decoder.classifier
    network.decoder.classifier = network.classifier
    size = _size_of(network.encoder.config)
    try:
        _load(whole, SegformerForSemanticSegmentation, source, size, allowed=set())
    finally:
        network.decoder.classifier = own


_Kind = type[SegformerModel] | type[SegformerForSemanticSegmentation]


def _load(module: nn.Module, kind: _Kind, source: str, size: str, allowed: set[str]) -> None:
    loaded, report = _read(kind, source)
    if _size_of(loaded.config) != size:
        raise ValueError(
            f"Expected {source!r} to hold a SegFormer of {size}, as the network is, but its "
            f"configuration is of {_size_of(loaded.config)}. Choose the network of that size, or "
            "weights of this one."
        )
    own, state = module.state_dict(), loaded.state_dict()
    # What the file lacks has been drawn at random: its shape says nothing.
    missing = {*report["missing_keys"], *(own.keys() - state.keys())}
    differences = {
        "missing": missing,
        "unexpected": {*report["unexpected_keys"], *(state.keys() - own.keys())} - allowed,
        "of another shape": {
            *(str(entry[0]) for entry in report["mismatched_keys"]),
            *(
                f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
                for name, value in state.items()
                if name in own and name not in missing and value.shape != own[name].shape
            ),
        },
    }
    error = weights_error(source, {kind: sorted(names) for kind, names in differences.items()})
    if error is not None:
        raise error
    module.load_state_dict(state)


def _read(
    kind: _Kind, source: str
) -> tuple[SegformerModel | SegformerForSemanticSegmentation, dict[str, set[str]]]:
    """Return the network at a source, and how its file differs from what its configuration says."""
    try:
        loaded, report = kind.from_pretrained(
            source,
            dtype=torch.float32,
            weights_only=True,  # of a pickled file: nothing in it is run
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed, with the rest
        )
    except Exception as error:  # the hub and damaged files have many ways to fail
        raise ValueError(
            f"Expected {source!r} to be a folder that save_pretrained has written, or the name of "
            f"a SegFormer on the hub, but it cannot be loaded: {error}"
        ) from error
    return loaded, report


def _size_of(config: SegformerConfig) -> str:
    for name, size in _SIZES.items():
        if (tuple(config.depths), tuple(config.hidden_sizes)) == (size.depths, size.widths):
            return f"size {name}"
    return f"depths {config.depths} and widths {config.hidden_sizes}"

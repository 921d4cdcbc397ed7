"""The page of mmsegmentation 1.x, with stand-ins for what it uses of mmseg and mmengine.

mmseg itself needs compiled operators. The stand-ins have its calls: samples with or without labels,
a preprocessor, `forward` by mode, a wrapper that calls it, and a runner that calls hooks.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorda
from tests import oracles
from tests.oracles import Array, rows
from tests.recipes.pages import majority, right_means, run_block

PAGE = "mmsegmentation.md"
NUM_CLASSES, CHANNELS, SIZE = 4, 5, 16


class PixelData:
    """mmengine's: a map with a leading dimension."""

    def __init__(self, data: Tensor) -> None:
        assert data.ndim == 3
        self.data = data


class Sample:
    """`SegDataSample`; of the target without `gt_sem_seg`."""

    def __init__(self, labels: Tensor | None = None) -> None:
        if labels is not None:
            self.gt_sem_seg = PixelData(labels.unsqueeze(0))

    def __contains__(self, name: str) -> bool:
        """Return True for a field that is set, as mmengine's elements do."""
        return name in vars(self)


Batch = dict[str, Any]


class Preprocessor:
    """`SegDataPreProcessor`: a list of uint8 images to a normalized batch."""

    def __call__(self, data: Batch, training: bool = False) -> Batch:
        """Return the batch that the network gets."""
        assert training
        inputs = torch.stack([image.float() for image in data["inputs"]]) / 64 - 2
        return {"inputs": inputs, "data_samples": data["data_samples"]}


class DecodeHead(nn.Module):
    """A head that ends in `cls_seg`; batch normalization before it, as in all of mmseg's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.channels = NUM_CLASSES, CHANNELS
        self.fusion_conv = nn.Sequential(nn.Conv2d(8, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
        self.dropout, self.conv_seg = nn.Dropout2d(0.5), nn.Conv2d(CHANNELS, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.conv_seg(self.dropout(self.fusion_conv(x)))
        return logits


class EncoderDecoder(nn.Module):
    """mmseg's: loss, or logits at the resolution of the head."""

    stage: Any  # Of the page's class.

    def __init__(self) -> None:
        super().__init__()
        self.data_preprocessor = Preprocessor()
        self.backbone, self.decode_head = nn.Conv2d(3, 8, 4, stride=4), DecodeHead()

    def forward(  # noqa: D102
        self, inputs: Tensor, data_samples: list[Sample] | None = None, mode: str = "tensor"
    ) -> Any:  # noqa: ANN401
        if mode == "loss":
            assert data_samples is not None
            return self.loss(inputs, data_samples)
        return self.decode_head(self.backbone(inputs))

    def loss(self, inputs: Tensor, data_samples: list[Sample]) -> dict[str, Tensor]:  # noqa: D102
        labels = torch.stack([sample.gt_sem_seg.data for sample in data_samples]).squeeze(1)
        logits = F.interpolate(self(inputs), labels.shape[1:], mode="bilinear")
        losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=255)
        return {"decode.loss_ce": losses.mean()}


class Wrapper(nn.Module):
    """`MMDistributedDataParallel`: calls the module's forward, and no other step of its."""

    module: EncoderDecoder

    def __init__(self, module: EncoderDecoder) -> None:
        super().__init__()
        self.module = module

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the results of its `train_step`."""
        data = self.module.data_preprocessor(batch, training=True)
        losses: dict[str, Tensor] = self.module(**data, mode="loss")
        return losses


class Registry(dict[str, type]):
    """mmengine's, as a decorator."""

    def register_module(self) -> Callable[[type], type]:  # noqa: D102
        def register(cls: type) -> type:
            self[cls.__name__] = cls
            return cls

        return register


class Runner:
    """mmengine's: datasets by configuration, hooks before each iteration."""

    def __init__(self, model: Wrapper) -> None:
        self.model: Any = model
        self.iter = 0

    @staticmethod
    def build_dataloader(config: dict[str, Any]) -> Iterator[Batch]:  # noqa: D102
        assert config["sampler"] == {"type": "DefaultSampler", "shuffle": False, "round_up": False}
        dataset, size = config["dataset"], config["batch_size"]
        for first in range(0, len(dataset), size):
            yield collate(dataset[first : first + size])


def collate(items: Sequence[tuple[Tensor, Tensor | None]]) -> Batch:
    return {
        "inputs": [image for image, _ in items],
        "data_samples": [Sample(labels) for _, labels in items],
    }


class Hook:
    """mmengine's base class."""


def draw_source(count: int) -> list[tuple[Tensor, Tensor | None]]:
    """Return images whose brightness is their class, in patches of 4 × 4 or 8 × 8."""
    items: list[tuple[Tensor, Tensor | None]] = []
    for _ in range(count):
        labels = torch.randint(NUM_CLASSES - 1, (4, 4)).repeat_interleave(4, 0)
        labels = labels.repeat_interleave(4, 1)
        image = (labels * 60 + torch.randint(40, (3, SIZE, SIZE))).to(torch.uint8)
        labels[:2] = torch.randint(NUM_CLASSES, labels[:2].shape)
        labels[torch.rand(labels.shape) < 0.1] = 255
        items.append((image, labels))
    return items


SOURCE_ONLY_STEPS = 30


class Setting:
    """The classes of the page's first block, the configuration of its second, and data."""

    def __init__(self) -> None:
        self.source = draw_source(5)
        self.target = [(image, None) for image, _ in draw_source(5)]
        self.names: dict[str, Any] = {}
        modules: dict[str, dict[str, Any]] = {
            "mmengine": {},
            "mmengine.hooks": {"Hook": Hook},
            "mmengine.model": {"is_model_wrapper": lambda model: isinstance(model, Wrapper)},
            "mmengine.structures": {"PixelData": PixelData},
            "mmseg": {},
            "mmseg.models": {"EncoderDecoder": EncoderDecoder},
            "mmseg.registry": {"HOOKS": Registry(), "MODELS": Registry()},
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, content in modules.items():
                module = ModuleType(name)
                vars(module).update(content)
                patch.setitem(sys.modules, name, module)
            run_block(PAGE, 0, self.names)
        config: dict[str, Any] = {
            "model": {"type": "EncoderDecoder"},
            "train_dataloader": {},
            "source": self.source,
            "target": self.target,
        }
        run_block(PAGE, 1, config)
        self.config = config
        hook = dict(config["custom_hooks"][0])
        self.hook = modules["mmseg.registry"]["HOOKS"][hook.pop("type")](
            **hook | {"begin": 3, "interval": 2}
        )
        model: EncoderDecoder = modules["mmseg.registry"]["MODELS"][config["model"]["type"]]()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(SOURCE_ONLY_STEPS):
            optimizer.zero_grad()
            data = model.data_preprocessor(collate(self.source), training=True)
            losses: dict[str, Tensor] = model(**data, mode="loss")
            losses["decode.loss_ce"].backward()
            optimizer.step()
        self.model = model
        self.runner = Runner(Wrapper(model))

    def begin_stage(self) -> Any:  # noqa: ANN401
        """Return objects that the hook makes at its first iteration."""
        self.runner.iter = 3
        self.hook.before_train_iter(self.runner, 0, None)
        return self.model.stage[0]


@pytest.fixture
def setting() -> Setting:
    return Setting()


def frozen_features(model: EncoderDecoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features by hand, in evaluation mode, of preprocessed images."""
    head = copy.deepcopy(model).eval().decode_head
    with torch.no_grad():
        features = head.fusion_conv(model.backbone(images.float() / 64 - 2))
        return features, head.conv_seg(features)


def anchors_by_hand(setting: Setting) -> Array:
    batches = []
    for image, labels in setting.source:
        assert labels is not None
        batches.append((*frozen_features(setting.model, image[None]), labels[None]))
    return right_means(batches)


def test_a_stage_is_of_the_frozen_network(setting: Setting) -> None:
    expected = anchors_by_hand(setting)
    stage = setting.begin_stage()
    assert np.isfinite(expected).all(axis=1).sum() >= 3
    np.testing.assert_allclose(stage.centroids.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert setting.model.training
    assert not stage.network.training
    covered = []
    for image, _ in setting.target:
        features, _ = frozen_features(setting.model, image[None])
        labels, margins = oracles.margin_labels(rows(features), expected, [-1] * 4, False, 255)
        minimum = stage.by_anchor.min_margin.numpy()
        covered.extend(margins > minimum[labels])
    assert 0.4 < np.mean(covered) < 0.75  # The coverage of 0.5 of each class, of few pixels.


def test_target_samples_get_labels_and_the_source_keeps_its_own(setting: Setting) -> None:
    stage = setting.begin_stage()
    anchors = anchors_by_hand(setting)
    batch = collate([setting.source[0], setting.target[0], setting.source[1], setting.target[1]])
    # Before the training pass moves the running statistics.
    frozen = [frozen_features(setting.model, image[None])[0] for image in batch["inputs"]]
    received = list[Tensor]()
    setting.model.decode_head.fusion_conv.register_forward_hook(
        lambda _, __, output: received.append(output)
    )
    losses = setting.runner.model.loss(batch)
    for number, domain in ((0, setting.source), (2, setting.source)):
        labels = domain[number // 2][1]
        assert labels is not None
        assert torch.equal(batch["data_samples"][number].gt_sem_seg.data[0], labels)
    minimum = stage.by_anchor.min_margin.tolist()
    for number in [1, 3]:
        expected, margins = oracles.margin_labels(
            rows(frozen[number]), anchors, minimum, False, 255
        )
        assert 0 < (expected != 255).sum() < expected.size
        large = oracles.resize_nearest(expected.reshape(4, 4), (SIZE, SIZE))
        # The minimum of a class is the margin of one of these pixels.
        clear = np.abs(margins[:, None] - np.asarray(minimum)).min(axis=1) > 1e-4
        assert clear.mean() > 0.8
        clear = oracles.resize_nearest(clear.reshape(4, 4), (SIZE, SIZE)).astype(bool)
        labeled = batch["data_samples"][number].gt_sem_seg.data[0].numpy()
        assert np.array_equal(labeled[clear], large[clear])

    # In train mode, before the dropout: what the layer before it returned.
    (features,) = received
    labels = torch.stack([sample.gt_sem_seg.data for sample in batch["data_samples"]])
    small = majority(labels, (4, 4))
    pulled = oracles.distance_loss(rows(features), small, anchors, "euclidean", "pixel")
    assert losses["loss_anchor"].item() == pytest.approx(0.1 * pulled, rel=1e-4)
    sum(losses.values()).backward()
    assert setting.model.backbone.weight.grad is not None


def test_before_the_first_stage_the_target_has_no_label(setting: Setting) -> None:
    setting.runner.iter = 2
    setting.hook.before_train_iter(setting.runner, 0, None)
    assert setting.model.stage is None
    batch = collate([setting.target[0], setting.source[0]])
    losses = setting.runner.model.loss(batch)
    assert set(losses) == {"decode.loss_ce"}
    assert (batch["data_samples"][0].gt_sem_seg.data == 255).all()
    assert batch["data_samples"][0].gt_sem_seg.data.dtype == torch.int64


@pytest.mark.parametrize("domain", ["source", "target"])
def test_batches_of_one_domain(setting: Setting, domain: str) -> None:
    setting.begin_stage()
    losses = setting.runner.model.loss(collate(getattr(setting, domain)[:2]))
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_stages_follow_each_other_and_are_no_children(setting: Setting) -> None:
    first = setting.begin_stage()
    setting.runner.iter = 4
    setting.hook.before_train_iter(setting.runner, 0, None)
    assert setting.model.stage[0] is first
    setting.runner.iter = 5
    setting.hook.before_train_iter(setting.runner, 0, None)
    second = setting.model.stage[0]
    assert second is not first
    assert not any("stage" in name for name in setting.model.state_dict())
    # Its copy of the network has no stage in it.
    assert set(second.network.state_dict()) == set(setting.model.state_dict())
    assert second.network.stage is None


def test_after_a_resume_a_stage_begins_at_once(setting: Setting) -> None:
    setting.runner.iter = 4
    setting.hook.before_train_iter(setting.runner, 0, None)
    assert setting.model.stage is not None


def test_a_network_without_a_wrapper(setting: Setting) -> None:
    setting.runner.model = setting.model
    assert setting.begin_stage() is setting.model.stage[0]


def test_the_calibrator_counts_all_ranks(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced = list[object]()
    monkeypatch.setattr(anchorda, "all_reduce", reduced.append)
    setting.begin_stage()
    assert [type(state) for state in reduced] == [anchorda.ScoreCalibrator]


def test_the_configuration(setting: Setting) -> None:
    config = setting.config
    assert config["model"]["type"] == "AnchoredEncoderDecoder"
    assert config["train_dataloader"]["dataset"]["datasets"] == [setting.source, setting.target]
    assert config["custom_imports"] == {"imports": ["anchored"]}
    assert config["custom_hooks"][0]["begin"] > 0
    assert config["custom_hooks"][0]["interval"] > 0

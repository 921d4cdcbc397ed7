"""The page of DAFormer, HRDA and MIC, its lines inside of a step with what surrounds them there.

The stand-in has the shapes, signatures and order of the real `DACS.forward_train`: a teacher whose
parameters alone are averaged and which stays in train mode with dropout off, class mixing, weights
with rows of zeros, two backward passes, and data in pairs inside of DataContainers.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anchorda
from tests import oracles
from tests.oracles import Array, rows
from tests.recipes.pages import RECIPES, assert_labels, evaluated, majority, right_means, run_block

PAGE = "daformer.md"
NUM_CLASSES, CHANNELS, SIZE = 6, 5, 32
HOOD, SKY = 8, 3
Metas = Sequence[dict[str, Any]]


class DAFormerHead(nn.Module):
    """Fusion with batch normalization, dropout, classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fuse_layer = nn.Sequential(
            nn.Conv2d(8, channels, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(channels, NUM_CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.conv_seg(self.dropout(self.fuse_layer(x)))
        return logits


class HRDAHead(nn.Module):
    """One head for the context and the detail crop, of the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = DAFormerHead(channels)

    def forward(self, inputs: list[Tensor]) -> Tensor:  # noqa: D102
        context, detail = (self.head(x) for x in inputs)
        return F.interpolate(context, scale_factor=2) + 0.1 * F.pad(detail, (0, 4, 4, 0))


class Segmentor(nn.Module):
    """`EncoderDecoder`, or `HRDAEncoderDecoder` with its context at half of the resolution."""

    def __init__(self, hrda: bool) -> None:
        super().__init__()
        # The dropout stands for the DropPath of the encoder.
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Dropout(0.2))
        self.hrda, self.seen = hrda, list[Tensor]()
        self.decode_head: HRDAHead | DAFormerHead = (
            HRDAHead(CHANNELS) if hrda else DAFormerHead(CHANNELS)
        )

    def head(self) -> DAFormerHead:
        """Return the head that ends in the classifier."""
        head = self.decode_head
        return head.head if isinstance(head, HRDAHead) else head

    def logits(self, img: Tensor) -> Tensor:  # noqa: D102
        self.seen.append(img)
        size = img.shape[2:]
        if not self.hrda:
            x = self.backbone(img)
        else:
            crop = img[:, :, size[0] // 2 :, : size[1] // 2]
            x = [self.backbone(F.interpolate(img, scale_factor=0.5)), self.backbone(crop)]
        return F.interpolate(self.decode_head(x), size, mode="bilinear")

    def encode_decode(self, img: Tensor, img_metas: Metas | None) -> Tensor:  # noqa: D102
        assert not (self.hrda and self.training), "HRDA and MIC call generate_pseudo_label"
        return self.logits(img)

    def generate_pseudo_label(self, img: Tensor, img_metas: Metas) -> Tensor:  # noqa: D102
        assert self.hrda, "not in DAFormer"
        return self.logits(img)

    def forward_train(  # noqa: D102
        self,
        img: Tensor,
        img_metas: Metas,
        gt_semantic_seg: Tensor,
        seg_weight: Tensor | None = None,
        return_feat: bool = False,
    ) -> dict[str, Any]:
        losses = F.cross_entropy(
            self.logits(img), gt_semantic_seg.squeeze(1), reduction="none", ignore_index=255
        )
        if seg_weight is not None:
            losses = losses * seg_weight
        features = {"features": [self.backbone(img)]} if return_feat else {}
        return {**features, "decode.loss_seg": losses.mean(), "decode.acc_seg": losses.new_ones(1)}


def update_ema(teacher: nn.Module, student: nn.Module, iteration: int) -> None:
    """Average the parameters alone, as both codebases do."""
    alpha = min(1 - 1 / (iteration + 1), 0.9)
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.detach_()
        old.data = alpha * old.data + (1 - alpha) * new.data


def stop_dropout(teacher: nn.Module) -> None:
    for module in teacher.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.training = False


def weights_of(probability: Tensor, threshold: float) -> Tensor:
    """Return the share of sure pixels everywhere, but 0 in the rows of sky and hood."""
    weights = (probability >= threshold).float().mean() * torch.ones_like(probability)
    weights[:, :SKY] = 0
    weights[:, -HOOD:] = 0
    return weights


class Call(NamedTuple):
    """Output of the fusion layer of one of the models."""

    model: str
    features: Tensor


class DACS(nn.Module):
    """The order of `forward_train`; at five places the lines of the page."""

    anchors: anchorda.CategoryAnchors
    fdist_classes: list[int]

    def __init__(self, codebase: "Codebase", **cfg: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.num_classes = cfg["model"]["decode_head"]["num_classes"]
        self.codebase, self.local_iter = codebase, 0
        hrda = cfg["model"]["type"] == "HRDAEncoderDecoder"
        self.model, self.ema_model, self.imnet_model = (Segmentor(hrda) for _ in range(3))
        self.names: dict[str, Any] = {"self": self, "cfg": cfg, "anchorda": anchorda, "F": F}
        self.names["torch"] = torch
        run_block(PAGE, 0, self.names)
        if hrda:
            self.names["contextlib"] = __import__("contextlib")
            run_block(PAGE, 6, self.names)
        self.calls = list[Call]()
        for name, model in (("student", self.model), ("teacher", self.ema_model)):
            model.head().fuse_layer.register_forward_hook(self._recorder(name))
        self.parsed = list[dict[str, float]]()

    def _recorder(self, name: str) -> Any:  # noqa: ANN401
        def record(_: nn.Module, __: object, output: Tensor) -> None:
            self.calls.append(Call(name, output.detach().clone()))

        return record

    def get_model(self) -> Segmentor:  # noqa: D102
        return self.model

    def get_ema_model(self) -> Segmentor:  # noqa: D102
        return self.ema_model

    def _parse_losses(self, losses: dict[str, Tensor]) -> Tensor:
        self.parsed.append({name: value.item() for name, value in losses.items()})
        return torch.stack([value for name, value in losses.items() if "loss" in name]).sum()

    def forward_train(
        self,
        img: Tensor,
        img_metas: Metas,
        gt_semantic_seg: Tensor,
        target_img: Tensor,
        target_img_metas: Metas,
    ) -> None:
        """One step."""
        update_ema(self.ema_model, self.model, self.local_iter)
        names = self.names
        names |= {key: value for key, value in locals().items() if key != "names"}
        run_block(PAGE, 1, names, self.codebase.edits(2))
        names["clean_losses"].pop("features")
        self._parse_losses(names["clean_losses"]).backward(retain_graph=True)
        stop_dropout(self.ema_model)
        run_block(PAGE, 2, names, self.codebase.edits(3))
        probability, pseudo_label = torch.softmax(names["ema_logits"].detach(), dim=1).max(dim=1)
        weight = weights_of(probability, 0.4)
        names["pseudo_label"], names["pseudo_weight"] = pseudo_label, weight
        # Pixels of half of the source's classes over the target; of the source they weigh 1.
        mask = torch.isin(gt_semantic_seg, torch.arange(0, NUM_CLASSES, 2))
        names["mixed_img"] = torch.where(mask, img, target_img)
        names["mixed_lbl"] = torch.where(mask, gt_semantic_seg, pseudo_label.unsqueeze(1))
        names[self.codebase.weights] = torch.where(mask.squeeze(1), 1.0, weight)
        run_block(PAGE, 3, names, self.codebase.edits(4))
        names["mix_losses"].pop("features", None)
        self._parse_losses(names["mix_losses"]).backward()
        self.local_iter += 1


class Codebase(NamedTuple):
    """One of the three codebases, with the replacements of its column of the page's table."""

    model: str
    weights: str
    rows: list[tuple[str, str, str]]

    def edits(self, place: int) -> dict[str, str]:
        """Return the replacements in the lines of that number."""
        pairs = {}
        for old, only_in, new in self.rows:
            if not only_in or int(only_in) == place:
                # Whatever X is.
                for who in ("student", "teacher", "network") if "X." in old else ("",):
                    pairs[old.replace("X.", f"{who}.")] = new.replace("X.", f"{who}.")
        return pairs


def column(number: int, name: str) -> list[tuple[str, str, str]]:
    """Return the replacements in a column of the page's table."""
    page = (RECIPES / PAGE).read_text(encoding="utf-8")
    found = []
    for old, place, *cells in re.findall(
        r"^\| `(.+?)`(?: in (\d))? \| (.+?) \| (.+?) \|$", page, re.MULTILINE
    ):
        cell = cells[number]
        if f"{name}: " in cell:
            cell = cell.split(f"{name}: ")[1].split(";")[0]
        if "as above" not in cell:
            found.append((old, place, cell.strip("`")))
    return found


CODEBASES = {
    "DAFormer": Codebase("EncoderDecoder", "pseudo_weight", []),
    "HRDA": Codebase("HRDAEncoderDecoder", "pseudo_weight", column(0, "HRDA")),
    "MIC": Codebase("HRDAEncoderDecoder", "mixed_seg_weight", column(0, "MIC")),
}


def draw_labels(classes: int = NUM_CLASSES - 1) -> Tensor:
    """Return patches of 8 × 8, so that cells of stride 4 and 8 have a majority; some ignored."""
    patches = torch.randint(classes, (2, 1, SIZE // 8, SIZE // 8))
    patches[torch.rand(patches.shape) < 0.1] = 255
    labels = patches.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    labels[:, :, :2] = torch.randint(classes, labels[:, :, :2].shape)
    return labels


class Step(NamedTuple):
    """Inputs and results of a step."""

    img: Tensor
    labels: Tensor
    target_img: Tensor
    calls: list[Call]
    losses: list[dict[str, float]]
    names: dict[str, Any]


def make(codebase: str) -> DACS:
    chosen = CODEBASES[codebase]
    head = {"num_classes": NUM_CLASSES, "channels": CHANNELS}
    model = {"type": chosen.model, "decode_head": head}
    return DACS(chosen, model=model)


def train(uda: DACS, steps: int = 2) -> list[Step]:
    """Return steps of SGD, in train mode throughout."""
    optimizer, done = torch.optim.SGD(uda.model.parameters(), lr=0.05), []
    uda.train()
    metas: Metas = [{}, {}]
    for _ in range(steps):
        (img, target), labels = torch.randn(2, 2, 3, SIZE, SIZE), draw_labels()
        given = [tensor.clone() for tensor in (img, labels, target)]
        uda.calls, uda.parsed = [], []
        uda.model.seen.clear()
        uda.ema_model.seen.clear()
        optimizer.zero_grad()
        uda.forward_train(img, metas, labels, target, metas)
        optimizer.step()
        assert all(map(torch.equal, given, (img, labels, target)))
        done.append(Step(img, labels, target, uda.calls, uda.parsed, dict(uda.names)))
    return done


def of(step: Step, model: str, number: int, codebase: str) -> Tensor:
    """Return features of a run of that model: of the head's only call, or of the first of two."""
    calls = [call.features for call in step.calls if call.model == model]
    return calls[number if codebase == "DAFormer" else 2 * number]


def anchors_by_hand(steps: Sequence[Step], codebase: str) -> Array:
    """Return the moving average of the teacher's source features, from what its layer returned."""
    batches = []
    for step in steps:
        features = of(step, "teacher", 0, codebase)
        batches.append((rows(features), majority(step.labels, features.shape[2:])))
    return oracles.stream_anchors(batches, NUM_CLASSES, CHANNELS, momentum=0.01)[0]


@pytest.mark.parametrize("codebase", CODEBASES)
def test_anchors_are_the_teacher_s_moving_average(codebase: str) -> None:
    uda = make(codebase)
    steps = train(uda)
    expected = anchors_by_hand(steps, codebase)
    assert np.isfinite(expected).all(axis=1).tolist() == [True] * 5 + [False]
    np.testing.assert_allclose(uda.anchors.compute().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codebase", CODEBASES)
def test_the_teacher_runs_once_on_each_domain_in_train_mode_without_dropout(codebase: str) -> None:
    uda = make(codebase)
    (step,) = train(uda, 1)
    assert [img is step.img for img in uda.ema_model.seen] == [True, False]
    assert uda.ema_model.seen[1] is step.target_img
    assert len(uda.model.seen) == 2
    # By hand, with the statistics of the batch: what the running ones would give is another thing.
    teacher = copy.deepcopy(uda.ema_model)
    head = teacher.head()
    scaled = step.img if codebase == "DAFormer" else F.interpolate(step.img, scale_factor=0.5)
    by_hand = head.fuse_layer(teacher.backbone(scaled))
    torch.testing.assert_close(of(step, "teacher", 0, codebase), by_hand)
    stale = head.eval().fuse_layer(teacher.eval().backbone(scaled))
    assert (stale - by_hand).abs().mean() > 0.2


@pytest.mark.parametrize("codebase", CODEBASES)
def test_labels_are_the_softmax_times_the_assignment(codebase: str) -> None:
    uda = make(codebase)
    steps = train(uda)
    features = of(steps[-1], "teacher", 1, codebase)
    distances = oracles.anchor_distances(rows(features), anchors_by_hand(steps, codebase))
    near = np.stack([oracles.softmax(-row) for row in distances])
    assert (near[:, -1] == 0).all()
    near_map = torch.from_numpy(near.reshape(2, *features.shape[2:], -1)).movedim(3, 1)
    near_map = F.interpolate(near_map, (SIZE, SIZE), mode="bilinear", align_corners=False)
    teacher = copy.deepcopy(uda.ema_model)
    probabilities = teacher.logits(steps[-1].target_img).double().softmax(dim=1)
    product = probabilities * near_map
    product = product / product.sum(dim=1, keepdim=True)
    got = steps[-1].names["ema_logits"].softmax(dim=1)
    torch.testing.assert_close(got.double(), product, rtol=0, atol=1e-5)
    assert not torch.equal(product.argmax(dim=1), probabilities.argmax(dim=1))


def test_without_an_anchor_nothing_is_sure() -> None:
    uda = make("DAFormer")
    uda.train()
    metas: Metas = [{}, {}]
    img, ignored = torch.randn(2, 3, SIZE, SIZE), torch.full((2, 1, SIZE, SIZE), 255)
    uda.forward_train(img, metas, ignored, img.flip(0), metas)
    assert uda.names["ema_logits"].isfinite().all()
    assert (uda.names["pseudo_weight"] == 0).all()
    assert uda.parsed[0]["loss_anchor"] == uda.parsed[1]["loss_anchor"] == 0


@pytest.mark.parametrize("codebase", CODEBASES)
def test_losses_of_a_step(codebase: str) -> None:
    steps = train(make(codebase))
    before, step = anchors_by_hand(steps[:1], codebase), steps[1]
    features = of(step, "student", 0, codebase)
    small = majority(step.labels, features.shape[2:])
    pulled = oracles.distance_loss(rows(features), small, before, "euclidean", "pixel")
    assert step.losses[0]["loss_anchor"] == pytest.approx(0.1 * pulled, rel=1e-5)
    assert steps[0].losses[0]["loss_anchor"] == 0  # No class is seen yet.

    after, features = anchors_by_hand(steps, codebase), of(step, "student", 1, codebase)
    small = majority(step.names["mixed_lbl"], features.shape[2:])
    factor = SIZE // features.shape[2]
    weights = F.avg_pool2d(step.names[CODEBASES[codebase].weights], factor)
    assert (weights[:, -1] < 1).any()
    assert ((weights == 0) & (torch.from_numpy(small.reshape(weights.shape)) != 255)).any()
    pulled = oracles.distance_loss(
        rows(features), small, after, "euclidean", "pixel", weights.double().numpy().reshape(-1)
    )
    assert step.losses[1]["loss_anchor"] == pytest.approx(0.1 * pulled, rel=1e-5)
    without = oracles.distance_loss(rows(features), small, after, "euclidean", "pixel")
    assert pulled < 0.95 * without


def test_the_losses_reach_the_student_and_not_the_anchors() -> None:
    uda = make("DAFormer")
    train(uda)
    gradient = next(uda.model.head().fuse_layer.parameters()).grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in uda.ema_model.parameters())
    assert not uda.anchors.compute().requires_grad


def test_sums_of_all_ranks_move_the_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_two_ranks(sums: anchorda.ClassSums) -> anchorda.ClassSums:
        return anchorda.ClassSums(2 * sums.sums, 2 * sums.counts)

    alone = make("DAFormer")
    torch.manual_seed(1)
    train(alone, 1)
    monkeypatch.setattr(anchorda, "all_reduce_class_sums", of_two_ranks)
    both = make("DAFormer")
    torch.manual_seed(1)
    train(both, 1)
    assert torch.equal(both.anchors.counts, 2 * alone.anchors.counts)


def test_where_the_anchors_live() -> None:
    """A child without parameters: in the checkpoint, and not wrapped for DDP by mmseg's wrapper."""
    uda = make("DAFormer")
    assert {"anchors.means", "anchors.counts"} <= set(uda.state_dict())
    assert not list(uda.anchors.parameters())
    for name in re.findall(r"`(anchors\.\w+)`", (RECIPES / PAGE).read_text(encoding="utf-8")):
        assert name in uda.state_dict()


def test_the_feature_distance_is_the_code_s() -> None:
    feat, feat_imnet = [torch.randn(2, 5, 4, 4, requires_grad=True)], [torch.randn(2, 5, 4, 4)]
    labels = torch.randint(NUM_CLASSES, (2, 1, 4, 4))
    fdist = DACS.__new__(DACS)
    nn.Module.__init__(fdist)
    fdist.fdist_classes = [1, 3]
    names: dict[str, Any] = {
        "self": fdist,
        "feat": feat,
        "feat_imnet": feat_imnet,
        "lay": -1,
        "gt_rescaled": labels,
        "anchorda": anchorda,
    }
    run_block(PAGE, 4, names)
    chosen = torch.isin(labels.squeeze(1), torch.tensor([1, 3]))
    expected = torch.norm(feat[0] - feat_imnet[0], dim=1, p=2)[chosen].mean()
    torch.testing.assert_close(names["feat_dist"], expected)
    names["gt_rescaled"] = torch.zeros_like(labels)
    run_block(PAGE, 4, names)
    zero = names["feat_dist"]
    assert zero.item() == 0  # NaN in the code.
    zero.backward()


class DataContainer:
    """mmcv's: a list with the batch of each GPU."""

    def __init__(self, data: Tensor) -> None:
        self.data = [data]


class UDADataset:
    """Pairs; the source and the target alone are its attributes."""

    def __init__(self, source: list[dict[str, Tensor]], target: list[dict[str, Tensor]]) -> None:
        self.source, self.target = source, target


class Config(dict[str, Any]):
    """mmcv's: keys are attributes."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401, D105
        return self[name]


def build_dataloader(
    dataset: list[dict[str, Tensor]],
    samples_per_gpu: int,
    workers_per_gpu: int,
    num_gpus: int = 1,
    dist: bool = True,
    shuffle: bool = True,
) -> Iterator[dict[str, DataContainer]]:
    """Return a loader with mmseg's defaults: distributed and shuffled."""
    assert not dist
    order = torch.randperm(len(dataset)).tolist() if shuffle else range(len(dataset))
    for first in range(0, len(dataset), samples_per_gpu):
        items = [dataset[i] for i in order[first : first + samples_per_gpu]]
        keys = items[0]
        yield {key: DataContainer(torch.stack([item[key] for item in items])) for key in keys}


@pytest.mark.parametrize("codebase", CODEBASES)
def test_a_labeling_pass(codebase: str) -> None:
    uda = make(codebase)
    train(uda, 3)
    source = [
        {"img": torch.randn(3, SIZE, SIZE), "gt_semantic_seg": draw_labels()[0]} for _ in range(3)
    ]
    target = [{"img": torch.randn(3, SIZE, SIZE)} for _ in range(3)]  # No labels of the target.
    names = uda.names | {
        "model": uda,
        "cfg": Config(
            data=Config(samples_per_gpu=2, workers_per_gpu=0),
            model=Config(decode_head=Config(channels=CHANNELS)),
        ),
        "distributed": False,
        "build_dataloader": build_dataloader,
        "datasets": [UDADataset(source, target)],
    }
    teacher = evaluated(uda.ema_model, uda.model)
    head = teacher.head()
    with torch.no_grad():
        run_block(PAGE, 5, names, CODEBASES[codebase].edits(6))

        def features_of(img: Tensor) -> Tensor:
            scaled = img if codebase == "DAFormer" else F.interpolate(img, scale_factor=0.5)
            features: Tensor = head.fuse_layer(teacher.backbone(scaled))
            return features

        batches = []
        for pair in source:
            features = features_of(pair["img"][None])
            logits = F.interpolate(
                teacher.logits(pair["img"][None]), features.shape[2:], mode="bilinear"
            )
            batches.append((features, logits, pair["gt_semantic_seg"]))
        anchors = right_means(batches)
        assert np.isfinite(anchors).all(axis=1).sum() >= 2
        stage = names["stage"]
        np.testing.assert_allclose(stage.centroids.numpy(), anchors, rtol=1e-4, atol=1e-5)

        features = features_of(target[2]["img"][None])
    assert names["pseudo_labels"].shape == (1, *features.shape[2:])
    minimum = stage.by_anchor.min_margin.tolist()
    assert_labels(names["pseudo_labels"], rows(features), anchors, minimum)
    assert stage.network.training is False
    for name, buffer in stage.network.named_buffers():
        assert torch.equal(buffer, uda.model.get_buffer(name))

"""A tap takes what a module returned or received, and leaves nothing behind."""

import gc
import re
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import anchorda
from anchorda.taps import FeatureTap
from tests.oracles import flat, rows, stream_anchors


class Network(nn.Module):
    """Returns logits alone, as most do."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Tanh())
        self.classifier = nn.Conv2d(5, 4, 1)

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        logits: Tensor = self.classifier(self.backbone(images))
        return logits


class Returning(nn.Module):
    """Returns whatever it was made with, and takes its input by any name."""

    def __init__(self, value: object = None) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: object, **kwargs: object) -> object:  # noqa: D102
        return self.value


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 7, 10)


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def test_output_and_input_are_the_modules_own(network: Network, images: Tensor) -> None:
    with (
        FeatureTap(network.backbone) as output,
        FeatureTap(network.classifier, "input") as received,
    ):
        logits = network(images)
    assert output.features is received.features  # No copy.
    assert torch.equal(output.features, network.backbone(images))
    assert torch.equal(network.classifier(received.features), logits)
    with FeatureTap(network) as whole:
        logits = network(images)
    assert whole.features is logits


def test_the_last_of_several_calls_counts(network: Network, images: Tensor) -> None:
    with FeatureTap(network.backbone) as tap:
        network(images)
        network(2 * images)
        inside = tap.features
    assert tap.features is inside
    assert torch.equal(inside, network.backbone(2 * images))
    network(3 * images)  # Outside: not seen.
    assert torch.equal(tap.features, network.backbone(2 * images))


def test_gradients_flow_as_without_a_tap(network: Network, images: Tensor) -> None:
    with FeatureTap(network.backbone) as tap:
        logits = network(images)
    (logits.square().sum() + tap.features.sin().sum()).backward()
    tapped = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    features = network.backbone(images)
    (network.classifier(features).square().sum() + features.sin().sum()).backward()
    for parameter, gradient in zip(network.parameters(), tapped, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=0)


def test_no_gradient_where_none_is_asked_for(network: Network, images: Tensor) -> None:
    with torch.no_grad(), FeatureTap(network.backbone) as tap:
        network(images)
    assert not tap.features.requires_grad


def test_autocast_keeps_the_dtype_of_the_module(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1))
    with torch.autocast("cpu", torch.bfloat16), FeatureTap(network[0]) as tap:
        logits = network(images)
    assert logits.dtype == tap.features.dtype == torch.bfloat16
    labels = torch.randint(4, (2, 7, 10))
    loss = anchorda.anchor_distance_loss(tap.features, labels, torch.randn(4, 5))
    assert loss.dtype == torch.float32
    loss.backward()
    assert network[0].weight.grad is not None


def test_a_later_operation_in_place_shows(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(inplace=True))
    with FeatureTap(network[0]) as tap:
        output = network(images)
    assert torch.equal(tap.features, output)
    assert tap.features.min() == 0


def test_after_an_exception_nothing_is_left(network: Network, images: Tensor) -> None:
    tap = FeatureTap(network.backbone)

    def fail_after_a_call() -> None:
        with tap:
            network(images)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_a_call()
    assert hooks(network) == 0
    with pytest.raises(RuntimeError, match="call of Sequential"):
        _ = tap.features
    with tap:
        network(images)
    assert torch.equal(tap.features, network.backbone(images))


def test_entering_again_forgets(network: Network, images: Tensor) -> None:
    tap = FeatureTap(network.backbone)
    with tap:
        network(images)
    with tap, pytest.raises(RuntimeError, match="but got none"):
        _ = tap.features


def test_an_entered_tap_cannot_be_entered(network: Network, images: Tensor) -> None:
    tap = FeatureTap(network.backbone)
    with tap:
        network(images)
        with pytest.raises(RuntimeError, match="Expected a tap that is not entered"), tap:
            pass
        assert hooks(network) == 1  # The outer one goes on.
    assert hooks(network) == 0
    assert torch.equal(tap.features, network.backbone(images))


def test_two_taps_of_one_module_do_not_disturb_each_other(network: Network, images: Tensor) -> None:
    with FeatureTap(network.backbone) as outer:
        with FeatureTap(network.backbone) as inner:
            network(images)
        network(-images)
    assert torch.equal(inner.features, network.backbone(images))
    assert torch.equal(outer.features, network.backbone(-images))


@pytest.fixture
def _no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_garbage_collector")
@pytest.mark.parametrize("end", ["out of scope", "entered again", "exception"])
def test_the_graph_goes_with_the_tap(network: Network, images: Tensor, end: str) -> None:
    """By counting references alone: a tap and its module are in no cycle."""
    tap = FeatureTap(network.backbone)
    with tap:
        network(images)
    graph = weakref.ref(tap.features)
    assert graph() is not None
    if end == "out of scope":
        del tap
    elif end == "entered again":
        tap.__enter__()
    else:
        tap.__exit__(ValueError, ValueError(), None)
    assert graph() is None


@pytest.mark.parametrize(
    ("value", "described"),
    [
        ((torch.ones(1), torch.ones(1)), "tuple of Tensor, Tensor"),
        ([torch.ones(1)], "list of Tensor"),
        ({"out": torch.ones(1), "aux": torch.ones(1)}, "dict with 'out', 'aux'"),
        (OrderedDict(out=torch.ones(1)), "OrderedDict with 'out'"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_tensor_is_named(value: object, described: str) -> None:
    module = Returning(value)
    with FeatureTap(module) as tap:
        module()
    message = (
        f"Expected the output of Returning to be a torch.Tensor, but got {described}. Tap a module "
        'before or behind it that returns, or with of="input" receives, just the features.'
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        _ = tap.features


def test_the_input_is_the_first_argument(images: Tensor) -> None:
    module = Returning()
    with FeatureTap(module, of="input") as tap:
        module(images, 7, 10)
        assert tap.features is images
        module(images=2 * images, size=7)
        assert torch.equal(tap.features, 2 * images)
        module([images])
        with pytest.raises(TypeError, match=r"the input of Returning .* got list of Tensor"):
            _ = tap.features
        module()
        with pytest.raises(TypeError, match=r"the input of Returning .* got NoneType"):
            _ = tap.features


def test_reading_before_a_call_is_an_error(network: Network) -> None:
    message = "Expected a call of Sequential inside of the `with`, but got none."
    for tap in (FeatureTap(network.backbone), FeatureTap(network.backbone).__enter__()):
        with pytest.raises(RuntimeError, match=message):
            _ = tap.features


def test_wrong_arguments_are_rejected(network: Network) -> None:
    with pytest.raises(TypeError, match=r"Expected `module` .* got str. Pass the module itself"):
        FeatureTap("backbone")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Expected `module` to be a torch.nn.Module, but got None"):
        FeatureTap(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Expected `of` to be one of 'output', 'input'"):
        FeatureTap(network, of="outputs")  # type: ignore[arg-type]


def test_it_is_no_part_of_a_network(network: Network) -> None:
    network.tap = FeatureTap(network.backbone)  # type: ignore[assignment]
    assert "tap" not in dict(network.named_modules())
    assert repr(network.tap) == "FeatureTap(Sequential, of='output')"


def test_copies_of_data_parallel_are_an_error(network: Network, images: Tensor) -> None:
    """`DataParallel` on several GPUs calls such copies, and never the module itself."""
    replica = network.backbone._replicate_for_data_parallel()
    for name, child in network.backbone.named_children():
        setattr(replica, name, child)
    with FeatureTap(network.backbone) as tap:
        replica(images[:1])
    with pytest.raises(RuntimeError, match="Use DistributedDataParallel instead"):
        _ = tap.features


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_distributed_data_parallel(
    network: Network, images: Tensor, find_unused_parameters: bool
) -> None:
    wrapper = DistributedDataParallel(network, find_unused_parameters=find_unused_parameters)
    with FeatureTap(wrapper.module.backbone) as tap:
        logits = wrapper(images)
    (logits.sum() + tap.features.square().sum()).backward()
    assert torch.equal(network.classifier(tap.features), logits)
    with_tap = network.backbone[0].weight.grad
    network.zero_grad()
    features = network.backbone(images)
    (network.classifier(features).sum() + features.square().sum()).backward()
    torch.testing.assert_close(with_tap, network.backbone[0].weight.grad)


class Branched(Network):
    """Computes more than it returns."""

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        features = self.backbone(images)
        self.classifier(features)
        return torch.tanh(features)


@pytest.mark.usefixtures("_one_rank")
def test_a_tap_beside_what_is_returned_is_unused_to_ddp(images: Tensor) -> None:
    """It is for DDP to see: the tapped classifier has a gradient, although it is "unused"."""
    network = Branched()
    wrapper = DistributedDataParallel(network, find_unused_parameters=True)
    with FeatureTap(network.classifier) as tap:
        features = wrapper(images)
    loss = features.sum() + tap.features.square().sum()
    with pytest.raises(RuntimeError, match="mark a variable ready only once"):
        loss.backward()


@pytest.fixture
def _forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_forget_compiled")
def test_a_compiled_network_does_not_know_a_later_tap(network: Network, images: Tensor) -> None:
    compiled = torch.compile(network, backend="aot_eager")
    compiled(images)
    with FeatureTap(network.classifier, of="input") as tap:
        compiled(images)
    with pytest.raises(RuntimeError, match=r"network in torch.compile, compile the parts"):
        _ = tap.features


@pytest.mark.usefixtures("_forget_compiled")
def test_compiled_parts_around_a_tap(network: Network, images: Tensor) -> None:
    whole = nn.Sequential(network, nn.Conv2d(4, 2, 1))
    network.compile(fullgraph=True, backend="aot_eager")
    whole(images)
    for scale in (1, 2, 3):
        with FeatureTap(whole[1], of="input") as tap:
            output = whole(scale * images)
        assert torch.equal(whole[1](tap.features), output)
        (gradient,) = torch.autograd.grad(output.sum(), tap.features, retain_graph=True)
        assert gradient.abs().sum() > 0
        tap.features.sum().backward()
        whole(images)


class Checkpointed(nn.Module):
    """Runs its layers again in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, images: Tensor) -> Tensor:  # noqa: D102
        output: Tensor = checkpoint(self.layers, images, use_reentrant=self.use_reentrant)
        return output


# torch 2.4 warns of itself.
@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")
def test_checkpointed_modules(images: Tensor) -> None:
    images.requires_grad_()
    network = Checkpointed(use_reentrant=False)
    with FeatureTap(network.layers[0]) as tap:
        output = network(images)
        features = tap.features
        (output.sum() + features.square().sum()).backward()
        assert tap.features is not features  # Of the second run.
    expected = network.layers[0](images)
    gradient = network.layers[0].weight.grad
    network.zero_grad()
    (network.layers[1](expected).sum() + expected.square().sum()).backward()
    torch.testing.assert_close(gradient, network.layers[0].weight.grad)

    network = Checkpointed(use_reentrant=True)
    with FeatureTap(network.layers[0]) as inside, FeatureTap(network) as end:
        network(images)
    assert not inside.features.requires_grad
    assert end.features.requires_grad


def test_a_stage_taps_its_own_copy(network: Network) -> None:
    """Inside of `extract` a tap works on the frozen copy, not on the network it is a copy of."""

    def extract(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        with FeatureTap(network.get_submodule("classifier"), of="input") as tap:
            logits = network(images)
        return tap.features, logits

    source = [(torch.randn(2, 3, 8, 6), torch.randint(4, (2, 8, 6))) for _ in range(2)]
    stage = anchorda.StageLabeler.from_source(
        network, source, anchorda.CategoryAnchors(4, 5), extract=extract
    )
    batches = []
    for images, labels in source:
        features = network.backbone(images)
        labels = anchorda.resize_labels(labels, features.shape[2:])
        kept = anchorda.keep_correct(labels, network.classifier(features))
        batches.append((rows(features), flat(kept)))
    expected, _ = stream_anchors(batches, 4, 5)
    torch.testing.assert_close(
        stage.centroids.double(), torch.from_numpy(expected), rtol=1e-6, atol=1e-7, equal_nan=True
    )
    assert hooks(stage) == hooks(network) == 0

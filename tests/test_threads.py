"""Threads that share a call: the same results, and no setting of the caller changes."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import anchorda
from anchorda._ops import blocks, choice, threads
from tests.oracles import draw

pytestmark = pytest.mark.skipif(threads._runtime() is None, reason="torch has no OpenMP here")


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use three threads, which share small features too."""
    monkeypatch.setattr(blocks, "_FEW_ELEMENTS", 0)
    monkeypatch.setattr(blocks, "_BLOCK_PIXELS_CPU", 16)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def settings() -> list[int]:
    """Return the number of torch's threads here, in a new thread, and in backward."""
    seen = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()

    def hook(grad: Tensor) -> None:
        seen.append(torch.get_num_threads())

    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(hook)
    leaf.sum().backward()
    return seen


def results(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the results of every operator that threads share."""
    torch.manual_seed(0)
    features, labels, _, anchors = draw((3, 11, 13), 7, 4, dtype)
    features.requires_grad_()
    calls: list[Callable[[], Tensor]] = [
        lambda: anchorda.anchor_distance_loss(features, labels, anchors),
        lambda: anchorda.anchor_contrastive_loss(features, labels, anchors),
        lambda: anchorda.anchor_distances(features, anchors).sum(),
        lambda: anchorda.image_centroids(features, labels, 4)[0].nan_to_num().sum(),
    ]
    found = [*anchorda.AnchorPseudoLabeler(0.1)(features, anchors)]
    found += anchorda.class_sums(features, labels, 4)
    for call in calls:
        value = call()
        found += [value.detach(), *torch.autograd.grad(value, features)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("few", [0, 2**19])
@pytest.mark.usefixtures("three_threads")
def test_any_number_of_threads_gives_the_same_results(
    dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_FEW_ELEMENTS", few)
    torch.set_num_threads(1)
    alone = results(dtype)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        shared = results(dtype)
        # Blocks differ, and so does the rounding of products at their ends.
        torch.testing.assert_close(shared, alone)
        assert torch.equal(shared[2], alone[2])  # the class sums
        for got, expected in zip(results(dtype), shared, strict=True):
            assert torch.equal(got, expected)
    with torch.inference_mode():
        features, labels, _, anchors = draw((3, 11, 13), 7, 4, dtype)
        found = anchorda.class_sums(features, labels, 4)
        labeled = anchorda.AnchorPseudoLabeler(0.1)(features, anchors)
    assert torch.equal(found.sums.clone() + 0, anchorda.class_sums(features, labels, 4).sums)
    assert torch.equal(labeled.labels, anchorda.AnchorPseudoLabeler(0.1)(features, anchors).labels)


@pytest.mark.usefixtures("three_threads")
def test_no_setting_changes_in_any_thread() -> None:
    before = settings()
    assert before == [3, 3, 3]
    results()
    assert settings() == before
    torch.set_num_threads(2)
    results()
    assert settings() == [2, 2, 2]


@pytest.mark.usefixtures("three_threads")
def test_each_thread_runs_alone_and_without_gradients() -> None:
    seen: list[tuple[str, int]] = []

    def work(items: Iterator[int]) -> None:
        name = threading.current_thread().name
        barrier.wait(timeout=30)  # so that no thread draws all items
        seen.extend((name, item) for item in items)
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()

    barrier = threading.Barrier(3)
    threads.share_among_threads(work, range(40))
    assert sorted(item for _, item in seen) == list(range(40))
    assert threading.current_thread().name not in {name for name, _ in seen}


@pytest.mark.usefixtures("three_threads")
def test_an_error_is_raised_after_all_threads_are_done() -> None:
    done: list[int] = []

    def work(items: Iterator[int]) -> None:
        barrier.wait(timeout=30)
        for item in items:
            if item == 0:
                raise ValueError("of the first")
            done.append(item)

    barrier = threading.Barrier(3)
    with pytest.raises(ValueError, match="of the first"):
        threads.share_among_threads(work, range(20))
    assert sorted(done) == list(range(1, 20))
    assert settings() == [3, 3, 3]
    results()


def test_one_thread_is_the_calling_one() -> None:
    seen = []

    def work(items: Iterator[int]) -> None:
        seen.append((threading.get_ident(), list(items)))

    threads.share_among_threads(work, [1, 2])
    assert seen == [(threading.get_ident(), [1, 2])]
    assert settings() == [1, 1, 1]


@pytest.mark.usefixtures("three_threads")
def test_without_the_runtime_the_calling_thread_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results()
    monkeypatch.setattr(threads, "_runtime", lambda: None)
    monkeypatch.setattr(threads, "_pool", None)
    for got, wanted in zip(results(), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("three_threads")
def test_calls_from_several_threads_at_once() -> None:
    features, labels, _, anchors = draw((3, 11, 13), 7)
    expected = anchorda.AnchorPseudoLabeler()(features, anchors)
    found = []

    def call() -> None:
        for _ in range(5):
            found.append(anchorda.AnchorPseudoLabeler()(features, anchors))
            anchorda.class_sums(features, labels, 4)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 20
    assert all(torch.equal(pseudo.scores, expected.scores) for pseudo in found)


FORK = """
import os, torch, anchorda
from anchorda._ops import threads
torch.set_num_threads(3)
features, anchors = torch.randn(2, 16, 40, 50), torch.randn(4, 16)
labels = torch.randint(0, 4, (2, 40, 50))
expected = anchorda.class_sums(features, labels, 4).sums
assert threads._pool.cache_info().currsize == 1
child = os.fork()
if child == 0:
    same = torch.equal(anchorda.class_sums(features, labels, 4).sums, expected)
    os._exit(0 if same and torch.get_num_threads() == 3 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(anchorda.class_sums(features, labels, 4).sums, expected)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_after_a_fork() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr

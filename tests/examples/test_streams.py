"""A stream depends on seed and number alone, and processes share it."""

from pathlib import Path

import parallel
import pytest
import torch
from readers import DatasetError, ResizeAndCrop, UnlabeledImages
from streams import Loading, RandomStream, each_once, numbers, seed_of
from synthetic import write_synthetic_pair
from torch import Tensor


class Numbers:
    """Seven samples, each its number and what was drawn for it."""

    def __len__(self) -> int:
        """Return the number of samples, 7."""
        return 7

    def read(self, index: int, generator: torch.Generator | None = None) -> Tensor:
        """Return the number, and a draw."""
        assert generator is not None
        return torch.tensor([index, int(torch.randint(1 << 30, (), generator=generator))])

    def path(self, index: int) -> Path:
        """Return a name."""
        return Path(f"{index}.png")


def batches(first: int = 0, workers: int = 0, seed: int = 0) -> list[list[list[int]]]:
    stream = RandomStream(Numbers(), (seed, 1))
    loader = stream.batches(first, 6, 4, Loading(workers))
    return [batch.tolist() for batch in loader]


def test_samples_depend_on_seed_and_number_alone() -> None:
    everything = batches()
    assert len(everything) == 6
    torch.manual_seed(99)  # nor on torch's global generator
    assert batches(workers=2) == everything
    assert batches(first=4) == everything[4:]
    assert batches(seed=1) != everything


def test_every_round_is_a_new_order_of_all() -> None:
    stream = RandomStream(Numbers(), (3,))
    rounds = [[stream.index(7 * k + i) for i in range(7)] for k in range(5)]
    assert all(sorted(order) == list(range(7)) for order in rounds)
    assert len({tuple(order) for order in rounds}) == 5
    draws = [int(stream[7 * k + rounds[k].index(2)][1]) for k in range(5)]
    assert len(set(draws)) == 5  # the same sample is drawn anew each time


def test_processes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches()
    shares = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "size", lambda: 2)
        shares.append(batches())
    for batch, first, second in zip(whole, *shares, strict=True):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(batch)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_processes_see_every_sample_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.utils.data.TensorDataset(torch.arange(3))
    seen = []
    monkeypatch.setattr(parallel, "size", lambda: size)
    for rank in range(size):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        loaded = each_once(samples, "samples", Loading(0))
        seen += [int(number) for (number,) in loaded]
    assert sorted(seen) == [0, 1, 2]


def test_files_are_those_of_the_samples() -> None:
    stream = RandomStream(Numbers(), (0,))
    files = stream.files(numbers(2, 4))
    assert files == [Path(f"{int(stream[k][0])}.png") for k in (8, 9, 10, 11)]


def test_seeds_differ_if_any_number_does() -> None:
    seeds = {seed_of(a, b, c) for a in range(4) for b in range(4) for c in range(4)}
    assert len(seeds) == 64
    assert seed_of(1, 2) != seed_of(1, 2, 1)
    assert min(seeds) >= 0
    torch.Generator().manual_seed(max(seeds))


def test_a_broken_file_is_named_from_a_worker(tmp_path: Path) -> None:
    source, _ = write_synthetic_pair(
        tmp_path, seed=0, source_images=2, target_images=1, val_images=1, height=48
    )
    images = sorted((source / "images").iterdir())
    images[1].write_bytes(images[1].read_bytes()[:300])
    stream = RandomStream(UnlabeledImages(images, ResizeAndCrop("height:16", (8, 8))), (0,))
    with pytest.raises(DatasetError, match=images[1].name):
        list(stream.batches(0, 1, 2, Loading(1)))

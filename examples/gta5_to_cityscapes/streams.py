"""Batches: random ones without end, and every sample once; each process reads its share.

What is drawn for sample number k of a stream depends on the stream's seed and on k alone. So a
run that goes on at any iteration, with any number of workers or processes, sees what it would have
seen; no random state has to be saved for it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import parallel
import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

Item_co = TypeVar("Item_co", covariant=True)
Item = TypeVar("Item")


class Images(Protocol[Item_co]):
    """A data set that can be read with randomness of the caller's choice."""

    def __len__(self) -> int:
        """Count the images."""

    def read(self, index: int, generator: torch.Generator | None = None) -> Item_co:
        """Read one sample."""

    def path(self, index: int) -> Path:
        """The image file of one sample."""


class Loading(NamedTuple):
    """How batches are read."""

    workers: int
    pinned: bool
    """Whether they end in memory from which a GPU can fetch them by itself."""


def seed_of(*numbers: int) -> int:
    """One seed out of several numbers, such that any difference in them gives another."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class RandomStream(Dataset[Item], Generic[Item]):
    """Samples of a data set in a new random order each time round, each with draws of its own.

    Args:
        images: the data set.
        seed: of all that is drawn; numbers that name the stream, such as run, phase and domain.
    """

    def __init__(self, images: Images[Item], seed: Sequence[int]) -> None:
        self.images = images
        self.seed = tuple(seed)
        self._order: tuple[int, list[int]] = (-1, [])

    def index(self, number: int) -> int:
        """Which sample of the data set sample `number` of the stream is."""
        around, place = divmod(number, len(self.images))
        if self._order[0] != around:
            generator = torch.Generator().manual_seed(seed_of(*self.seed, 0, around))
            order = torch.randperm(len(self.images), generator=generator)
            self._order = (around, order.tolist())
        return self._order[1][place]

    def __getitem__(self, number: int) -> Item:
        """Sample `number` of the stream."""
        generator = torch.Generator().manual_seed(seed_of(*self.seed, 1, number))
        return self.images.read(self.index(number), generator)

    def files(self, numbers: Sequence[int]) -> list[Path]:
        """The image files of samples."""
        return [self.images.path(self.index(number)) for number in numbers]

    def batches(self, first: int, count: int, size: int, loading: Loading) -> DataLoader[Item]:
        """This process's share of batches number `first` to `count` − 1, of `size` in all."""
        share = [numbers(k, size)[parallel.rank() :: parallel.size()] for k in range(first, count)]
        return DataLoader(
            self,
            batch_sampler=share,
            num_workers=loading.workers,
            pin_memory=loading.pinned,
        )


def numbers(batch: int, size: int) -> list[int]:
    """The numbers in the stream of the samples of a batch, over all processes."""
    return list(range(batch * size, (batch + 1) * size))


def each_once(dataset: Dataset[Item], title: str, loading: Loading) -> "tqdm[Item]":
    """This process's share of a data set in order, as batches of one: whole images differ in size.

    Together the processes see every sample once, not one of them twice.
    """
    share = range(parallel.rank(), len(dataset), parallel.size())  # type: ignore[arg-type]
    loader = DataLoader(
        Subset(dataset, share), num_workers=loading.workers, pin_memory=loading.pinned
    )
    return tqdm(loader, desc=title, leave=False, disable=not parallel.is_main())

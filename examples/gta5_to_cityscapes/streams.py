"""Random batches without end, and every sample once; each process reads its share.

All that is drawn for sample number k of a stream depends on the stream's seed and on k alone. So a
run that is resumed at any iteration, with any number of workers or processes, sees the samples it
would have seen, and no random state has to be saved.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import parallel
import torch
from torch import Tensor
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
        """Return the image file of one sample."""


class Loading(NamedTuple):
    """The processes that read batches, and the device that needs them."""

    workers: int
    device: torch.device = torch.device("cpu")

    @property
    def pinned(self) -> bool:
        """True if batches are read into memory from which a GPU can fetch them by itself."""
        return self.device.type == "cuda"


def seed_of(*numbers: int) -> int:
    """Return a seed made of several numbers, another one for any difference in them."""
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
        """Return the index in the data set of sample `number` of the stream."""
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
        """Return the image files of samples."""
        return [self.images.path(self.index(number)) for number in numbers]

    def batches(self, first: int, count: int, size: int, loading: Loading) -> DataLoader[Item]:
        """Return this process's share of batches `first` to `count` − 1, of `size` in all."""
        share = [numbers(k, size)[parallel.rank() :: parallel.size()] for k in range(first, count)]
        return DataLoader(
            self,
            batch_sampler=share,
            num_workers=loading.workers,
            pin_memory=loading.pinned,
        )


def numbers(batch: int, size: int) -> list[int]:
    """Return the numbers in the stream of the samples of a batch, over all processes."""
    return list(range(batch * size, (batch + 1) * size))


def each_once(dataset: Dataset[Item], title: str, loading: Loading) -> Iterator[Item]:
    """Yield this process's share of a data set in order, on the device, as batches of one.

    Whole images differ in size, so that they are not stacked. Together the processes read every
    sample once, none of them twice.
    """
    share = range(parallel.rank(), len(dataset), parallel.size())  # type: ignore[arg-type]
    loader = DataLoader(
        Subset(dataset, share), num_workers=loading.workers, pin_memory=loading.pinned
    )
    for batch in tqdm(loader, desc=title, leave=False, disable=not parallel.is_main()):
        yield _on_device(batch, loading.device)


def _on_device(batch: Any, device: torch.device) -> Any:  # noqa: ANN401
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return [tensor.to(device, non_blocking=True) for tensor in batch]

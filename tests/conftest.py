"""The conditions of every test: poisoned memory, one thread, a fixed seed; and shared fixtures."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from anchorda._ops import blocks
from tests.oracles import BLOCKS

settings.register_profile("local", deadline=None, max_examples=20)
settings.register_profile("ci", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

if not torch.cuda.is_available():
    # Before anything imports Triton: without a GPU its interpreter runs the kernels.
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
# Uninitialized memory is filled with NaN and the largest integer: an unwritten result is seen.
torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BLOCKS)
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Limit the blocks of operators to this many elements: pixel by pixel to all at once."""
    elements: int = request.param
    monkeypatch.setattr(blocks, "_PART_BYTES_CPU", 8 * elements)
    monkeypatch.setattr(blocks, "_BLOCK_PIXELS_CPU", max(1, elements // 3))
    return elements


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of golden numbers; see its README."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a source and a target of a few small synthetic images, for the trainer."""
    from synthetic import write_synthetic_pair

    root = tmp_path_factory.mktemp("pair")
    return write_synthetic_pair(
        root, seed=0, source_images=5, target_images=4, val_images=2, height=48
    )


@pytest.fixture
def _without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the trainer's pictures out, which take longer than a tiny run."""
    import train

    def write_report(experiment: train.Experiment, *_: object) -> Path:
        folder = experiment.run.settings.output / "report"
        folder.mkdir(exist_ok=True)
        return folder

    monkeypatch.setattr(train, "write_report", write_report)

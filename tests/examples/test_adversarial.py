"""The two losses of output-space alignment, and who gets which gradient."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from warm_up import Discriminator, alignment_loss, discrimination_loss


def logits(seed: int, classes: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, classes, 64, 96, generator=generator, requires_grad=True)


def discriminator() -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(5)


def probability(judge: Discriminator, of: Tensor) -> NDArray[np.float64]:
    """Return the probability of the source for each patch, by hand."""
    scores = of.detach().double().numpy()
    power = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares = torch.from_numpy(power / power.sum(axis=1, keepdims=True))
    judged: NDArray[np.float64] = judge.double()(shares).detach().numpy()
    judge.float()
    chance: NDArray[np.float64] = 1 / (1 + np.exp(-judged))
    return chance


def test_it_has_the_published_layers() -> None:
    shapes = {name: tuple(p.shape) for name, p in Discriminator(19).named_parameters()}
    weights = [shape for name, shape in shapes.items() if name.endswith("weight")]
    assert weights == [
        *((64, 19, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4), (1, 512, 4, 4)),
    ]
    assert Discriminator(5)(logits(0)).shape == (2, 1, 2, 3)
    assert Discriminator(5)(logits(0)[..., :32, :32]).shape == (2, 1, 1, 1)


def test_fooling_is_taking_the_target_for_the_source() -> None:
    judge, target = discriminator(), logits(1)
    loss = alignment_loss(judge, target)
    expected = -np.log(probability(judge, target)).mean()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-6)
    loss.backward()
    assert target.grad is not None
    assert target.grad.abs().sum() > 0
    assert all(p.grad is None for p in judge.parameters())


def test_telling_is_the_mean_of_both_domains() -> None:
    judge, source, target = discriminator(), logits(1), logits(2)
    loss = discrimination_loss(judge, source, target)
    by_source = -np.log(probability(judge, source)).mean()
    by_target = -np.log(1 - probability(judge, target)).mean()
    np.testing.assert_allclose(loss.item(), (by_source + by_target) / 2, rtol=1e-6)
    loss.backward()
    assert source.grad is None
    assert target.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in judge.parameters())


def test_each_moves_what_it_is_for() -> None:
    judge = discriminator()
    source = torch.randn(2, 5, 32, 32, generator=torch.Generator().manual_seed(3))
    source[:, 0] += 3.0
    target = torch.randn(2, 5, 32, 32, generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.Adam(judge.parameters(), 1e-3)
    before = discrimination_loss(judge, source, target).item()
    for _ in range(20):
        optimizer.zero_grad()
        discrimination_loss(judge, source, target).backward()
        optimizer.step()
    assert discrimination_loss(judge, source, target).item() < 0.5 * before
    target.requires_grad_()
    mover = torch.optim.Adam([target], 0.1)
    first = target.softmax(dim=1)[:, 0].mean().item()
    for _ in range(20):
        mover.zero_grad()
        alignment_loss(judge, target).backward()
        mover.step()
    assert target.softmax(dim=1)[:, 0].mean().item() > first + 0.1

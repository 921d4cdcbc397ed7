"""A slice of the random calls of `tests.fuzz`, and that no public name is left out of them."""

import pytest

from tests import fuzz
from tests.test_public_api import public_names


def test_every_public_name_has_a_target_or_a_reason() -> None:
    called = {name for names in fuzz.NAMES.values() for name in names}
    missing = set(public_names()) - called - set(fuzz.NOT_CALLED)
    assert not missing, f"write a target in tests/fuzz.py, or a reason, for {sorted(missing)}"
    assert called & set(fuzz.NOT_CALLED) == set()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_random_calls(name: str) -> None:
    outcomes = [fuzz.run(seed, [name]) for seed in range(12)]
    assert not [outcome.message for outcome in outcomes if outcome.kind == "fault"]
    assert any(outcome.kind == "returned what the oracle says" for outcome in outcomes)

"""Choice of the module that computes an operator for given inputs.

`README.md` has the same as a table.
"""

import functools
import subprocess
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, reference

_OF_KERNELS = ("class_sums", "nearest_anchors", "pixel_losses", "pixel_losses_backward")
_OF_FLOAT32_PRODUCTS = ("nearest_anchors", "contrastive_losses", "contrastive_losses_backward")
# Elements of the features, below which plain float64 is as fast on a CPU.
_FEW_ELEMENTS = 2**19
_MOST_ROWS = 256  # of anchors or sums; more do not fit the shared memory of smaller GPUs


def module_for(
    operator: str, features: Tensor, anchors: Tensor | None = None, num_classes: int = 1
) -> ModuleType:
    """Return the module whose function of that name computes these inputs fastest."""
    if _is_cpu(features.device):
        return cpu if _cpu_is_faster(operator, features) else reference
    kernels = _kernels(features.device) if operator in _OF_KERNELS else None
    if kernels is None or not _kernels_support(operator, features, anchors, num_classes):
        return reference
    return kernels


def _is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _cpu_is_faster(operator: str, features: Tensor) -> bool:
    """Return True for operators of `cpu`, unless they would be less precise than is asked for."""
    if features.dtype == torch.float64:
        return False
    if operator == "class_sums":
        return True
    if operator not in _OF_FLOAT32_PRODUCTS or features.numel() < _FEW_ELEMENTS:
        return False
    try:  # a user may let float32 be multiplied in less
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by the newer interface, for which this one does not answer
        return False


def _kernels_support(
    operator: str, features: Tensor, anchors: Tensor | None, num_classes: int
) -> bool:
    """Return True if the kernels compute these inputs.

    They need pixels at one distance in memory within an image, whatever the layout, and nothing in
    float64, which is to be computed as such.
    """
    if features.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if anchors is not None and anchors.dtype == torch.float64:
        return False
    rows = num_classes
    if operator == "nearest_anchors" and anchors is not None:
        rows = anchors.shape[:-1].numel()
    if rows > _MOST_ROWS or features.numel() == 0 or 0 in features.stride():
        return False
    try:
        maps = features.view(*features.shape[:2], -1)
    except RuntimeError:
        return False
    return maps.shape[0] * maps.shape[2] < 2**31


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """Return the Triton kernels where they run: on NVIDIA GPUs that have TF32."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        import triton

        # Triton 3.0 to 3.2 abort the process where they compile the class sums.
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
            return None
        # Builds Triton's launcher, for which a C compiler or Python's headers may be missing.
        triton.runtime.driver.active.get_current_device()
        from . import kernels
    except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError):
        return None
    return kernels

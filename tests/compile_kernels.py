"""Compile every Triton kernel for a GPU, which need not be there.

python tests/compile_kernels.py 90
"""

import sys
import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anchorda._ops import kernels

PIXELS = {"pixels": "i32", "per_image": "i32", "channels": "i32"}
STRIDES = {"stride_image": "i32", "stride_channel": "i32"}
BLOCKS = {"stride_pixel": 1, "BLOCK_PIXELS": 64, "BLOCK_CHANNELS": 32}


def compile_for(
    capability: int, kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, int]
) -> None:
    """Compile one kernel to machine code, and print its name and size."""
    constants = {**BLOCKS, **constants}
    known = {**types, **PIXELS, **STRIDES, **dict.fromkeys(constants, "constexpr")}
    signature = {name: known[name] for name in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={k: v for k, v in constants.items() if k in signature},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(compiled.metadata.name, len(compiled.asm["cubin"]))


def main() -> None:
    """Compile all, for features in float32 and in bfloat16."""
    capability = int(sys.argv[1])
    for features in ("*fp32", "*bf16"):
        of = {"features": features, "labels": "*i64", "points": "*fp32", "losses": "*fp32"}
        results = {"squares": "*fp32", "nearest": "*fp32", "second": "*fp32", "classes": "i32"}
        for count in (32, 256):
            compile_for(
                capability, kernels._nearest_kernel, {**of, **results}, {"BLOCK_CLASSES": count}
            )
        sums = {"impure": "*i32", "sums": "*fp64", "counts": "*i64", "classes": "i32"}
        for again in (False, True):
            constants = {"BLOCK_CLASSES": 32, "LENGTH": 640, "AGAIN": again}
            compile_for(capability, kernels._sums_kernel, {**of, **sums}, constants)
        clean = {"impure": "*i32", "clean": "*i64"}
        compile_for(capability, kernels._clean_kernel, {**of, **clean}, {})
        grads = {"grad_losses": "*fp32", "grad": features}
        grads |= {"grad_stride_image": "i32", "grad_stride_channel": "i32"}
        for distance in kernels._DISTANCES.values():
            compile_for(capability, kernels._losses_kernel, of, {"DISTANCE": distance})
            constants = {"DISTANCE": distance, "grad_stride_pixel": 1}
            compile_for(capability, kernels._losses_backward_kernel, {**of, **grads}, constants)


if __name__ == "__main__":
    # Triton 3.9 says that a default of its own will change.
    warnings.simplefilter("ignore")
    main()

"""Compile every Triton kernel for a GPU, which need not be there.

python tests/compile_kernels.py 90
"""

import itertools
import sys
import warnings

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from anchorda._ops import kernels

SIZE = {"per_image": "i32", "channels": "i32", "stride_image": "i32", "stride_channel": "i32"}
LOSSES = {"BLOCK_PIXELS": 64, "BLOCK_CHANNELS": 32}


def compile_for(
    capability: int, kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, int]
) -> None:
    """Compile one kernel to machine code, and print its name, shared memory and size."""
    constants = {"stride_pixel": 1, **constants}
    warps = constants.pop("num_warps", 4)
    known = {**types, **SIZE, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: known[name] for name in kernel.arg_names},
        constexprs=constants,
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    print(compiled.metadata.name, compiled.metadata.shared, len(compiled.asm["cubin"]))


def main() -> None:
    """Compile all, for features in float32 and in bfloat16, for few classes and for the most."""
    capability = int(sys.argv[1])
    for features in ("*fp32", "*bf16"):
        of = {"features": features, "labels": "*i64", "points": "*fp32", "losses": "*fp32"}
        of["present"] = "*i1"
        results = {"squares": "*fp32", "nearest": "*fp32", "second": "*fp32", "classes": "i32"}
        results["of_class"] = "i32"
        sums = {"found": "*i32", "sums": "*fp64", "counts": "*i64", "classes": "i32"}
        sums |= {"length": "i32", "tiles": "i32"}
        for classes in (19, 256):
            blocks = kernels.nearest_blocks(classes)
            compile_for(capability, kernels._nearest_kernel, {**of, **results}, blocks)
            for cleaned in (False, True):
                blocks = {**kernels.sums_blocks(classes), "CLEANED": cleaned}
                compile_for(capability, kernels._sums_kernel, {**of, **sums}, blocks)
        clean = {"found": "*i32", "clean": "*i64"}
        compile_for(capability, kernels._clean_kernel, {**of, **clean}, LOSSES)
        grads = {"grad_losses": "*fp32", "grad": features}
        grads |= {"grad_stride_image": "i32", "grad_stride_channel": "i32"}
        for distance, of_class in itertools.product(kernels._DISTANCES.values(), (1, 3)):
            blocks = {**LOSSES, "DISTANCE": distance, "OF_CLASS": of_class}
            compile_for(capability, kernels._losses_kernel, of, blocks)
            blocks["grad_stride_pixel"] = 1
            compile_for(capability, kernels._losses_backward_kernel, {**of, **grads}, blocks)


if __name__ == "__main__":
    # Triton 3.9 says that a default of its own will change.
    warnings.simplefilter("ignore")
    main()

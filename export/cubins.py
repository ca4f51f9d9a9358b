"""Kernels of a plan compiled ahead of time for one GPU architecture, without a GPU.

Triton compiles each different launch to machine code (a cubin). At run time neither Triton nor torch is needed.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import ExportError, MissingDependencyError
from ..kernels.plan import PDL_FROM, Kernel, Launch, Plan

# KiB of shared memory that one program may take (CUDA C++ programming guide, table of
# compute capabilities); Triton does not check it ahead of time.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 110: 227, 120: 99, 121: 99}
TYPES = {"float16": "*fp16", "float32": "*fp32", "uint8": "*u8", "int32": "*i32"}
# Triton 3.6 brings assemblers of CUDA 12.8 and, for Blackwell, 12.9; they do not know these.
NEEDS_CUDA_13 = (110,)


def check_targets(targets: list[str]) -> list[int]:
    """["sm_87", "sm_90"] -> [87, 90]. Raises ExportError for an unknown name."""
    known = {f"sm_{arch}": arch for arch in SHARED_KIB}
    for target in targets:
        if target not in known:
            raise ExportError(f"targets: expected some of {', '.join(known)}; got {target!r}")
    return sorted({known[target] for target in targets})


def compile_plan(plan: Plan, arch: int) -> Iterator[tuple[str, Kernel]]:
    """Each different kernel of the plan with its key, as soon as it is compiled; about a second each.

    Raises ExportError where the compiler refuses or the result does not fit the GPU; MissingDependencyError
    without Triton.
    """
    done = set()
    for launch in plan.all_launches:
        key = plan.kernel_key(launch)
        if key not in done:
            done.add(key)
            yield key, compile_launch(launch, plan, arch)


def compile_launch(launch: Launch, plan: Plan, arch: int) -> Kernel:
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as exc:
        raise MissingDependencyError("Triton", "kernels") from exc
    if triton.knobs.runtime.interpret:
        raise ExportError("TRITON_INTERPRET is set, so Triton does not compile; unset it and export again")
    if arch in NEEDS_CUDA_13:
        use_cuda_13_assembler(arch)
    triton.knobs.compilation.disable_line_info = True  # a third of the size
    from ..kernels.jit import device_function, step

    signature, constants, attributes = {}, {}, {}
    for place, (name, call) in enumerate(zip(("first", "second"), launch.calls, strict=False)):
        function, arguments = (3, 4) if place else (0, 1)
        signature[name], constants[(function,)] = "constexpr", device_function(call)
        kinds = []
        for index, buffer in enumerate(call.buffers):
            kinds.append("constexpr" if buffer is None else TYPES[plan.buffers[buffer].dtype])
            if buffer is None:
                constants[arguments, index] = None
            elif plan.buffers[buffer].kind != "frame":  # that one may begin anywhere
                attributes[arguments, index] = [["tt.divisibility", 16]]
        for index, value in enumerate(call.constants, len(call.buffers)):
            kinds.append("constexpr")
            constants[arguments, index] = value
        signature[f"{name}_arguments"] = tuple(kinds)
    if len(launch.calls) == 1:
        signature |= {"second": "constexpr", "second_arguments": "constexpr"}
        constants |= {(3,): None, (4,): None}
        constants |= {(2,): 0}
    signature |= {"n_first": "constexpr" if len(launch.calls) == 1 else "i32", "PDL": "constexpr"}
    constants |= {(5,): arch >= PDL_FROM}
    order = ("first", "first_arguments", "n_first", "second", "second_arguments", "PDL")
    source = ASTSource(step, {name: signature[name] for name in order}, constants, attributes)
    what = " and ".join(call.op for call in launch.calls)
    options = {"num_warps": launch.num_warps, "launch_pdl": arch >= PDL_FROM}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as exc:  # Triton's, LLVM's and the assembler's errors share no base class
        cause = exc  # Triton wraps an error once for each function it was in
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"{what}: Triton {triton.__version__} cannot compile it for sm_{arch}: {cause}") from exc
    facts = compiled.metadata
    if facts.shared > SHARED_KIB[arch] * 1024:
        raise ExportError(
            f"{what}: takes {facts.shared} bytes of shared memory; sm_{arch} has {SHARED_KIB[arch]} KiB"
        )
    if facts.global_scratch_size or facts.profile_scratch_size or facts.num_ctas != 1:
        raise ExportError(f"{what}: needs scratch memory or a cluster, which the runtime does not give it")
    return Kernel(facts.name, compiled.asm["cubin"], facts.shared, facts.num_warps)


def use_cuda_13_assembler(arch: int) -> None:
    """Points Triton to CUDA 13's ptxas, which knows sm_110. Raises ExportError where there is none."""
    if "TRITON_PTXAS_BLACKWELL_PATH" in os.environ:
        return
    found = next(filter(None, map(shutil.which, ("ptxas", "/usr/local/cuda/bin/ptxas"))), None)
    if found is None:
        raise ExportError(
            f"sm_{arch} needs the assembler of CUDA 13: install the CUDA toolkit, or set "
            "TRITON_PTXAS_BLACKWELL_PATH to its ptxas"
        )
    os.environ["TRITON_PTXAS_BLACKWELL_PATH"] = str(Path(found).resolve())

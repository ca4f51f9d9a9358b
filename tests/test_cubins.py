"""Kernels compiled ahead of time, in a process of its own: here Triton interprets."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'omniad-edge[kernels]'")

from omniad_edge.errors import ExportError
from omniad_edge.export.cubins import NEEDS_CUDA_13, SHARED_KIB, check_targets

ARCHITECTURES = [pytest.param(a, marks=[] if a in (87, 90) else pytest.mark.slow) for a in SHARED_KIB]
COMPILE = """
import json, sys
sys.path.insert(0, "tests")
from omniad_edge.export.fused_parts import compile_plans
from omniad_edge.kernels.fold import fold
from omniad_edge.kernels.network_plan import build_plan
from omniad_edge.kernels.plugin_plan import plugin_plans
from omniad_edge.model import ModelConfig, OmniAD

arch = int(sys.argv[1])
network = fold(OmniAD(ModelConfig()))
plan = build_plan(network, batch=1)
plans = (plan, *plugin_plans(network))
kernels = compile_plans(plans, arch)
assert set(kernels) == {plan.kernel_key(launch) for plan in plans for launch in plan.all_launches}
assert plan.front.calls[0].op == "resize.resize" and plan.front not in plan.launches
rows = [[k.name, len(k.cubin), k.shared_bytes, k.num_warps, k.cubin[:4].hex()] for k in kernels.values()]
print(json.dumps(rows))
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=kept | environment
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_default_network_compiles(arch):
    if arch in NEEDS_CUDA_13 and not shutil.which("ptxas"):
        pytest.skip(f"sm_{arch} needs CUDA 13's ptxas on the path")
    done = python(COMPILE, str(arch))
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) < 60
    assert sum(size for _, size, *_ in kernels) < 2e6
    for name, size, shared_bytes, num_warps, magic in kernels:
        assert name and size > 1000 and num_warps in (4, 8) and magic == b"\x7fELF".hex()
        assert shared_bytes <= SHARED_KIB[arch] * 1024


def test_under_the_interpreter_it_says_why_not():
    done = python(COMPILE, "90", TRITON_INTERPRET="1")
    assert done.returncode != 0 and "TRITON_INTERPRET is set" in done.stderr


def test_targets():
    assert check_targets(["sm_90", "sm_87", "sm_90"]) == [87, 90]
    assert check_targets([]) == []
    with pytest.raises(ExportError, match=r"expected some of sm_80, .*; got 'sm_75'"):
        check_targets(["sm_75"])

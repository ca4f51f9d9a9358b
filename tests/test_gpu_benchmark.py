"""The GPU check where there is no GPU: it says so, and does not pass."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'omniad-edge[kernels]'")

ROOT = Path(__file__).resolve().parents[1]


def script(*command: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PATH": path})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run benchmarks/gpu_check.sh itself")
def test_without_a_gpu_it_fails_in_words(tmp_path):
    done = script("benchmarks/gpu_check.sh", "--only", "e2e", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "no NVIDIA GPU" in done.stderr and "failed: e2e" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("--only", "nope"), ("--fast",)])
def test_usage(arguments):
    done = script("benchmarks/gpu_check.sh", *arguments)
    assert done.returncode == 2 and arguments[-1] in done.stderr

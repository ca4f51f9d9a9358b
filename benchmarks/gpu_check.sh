#!/usr/bin/env bash
# Everything a GPU has to say about the fused engine, in one command, without a network and without installing:
#     benchmarks/gpu_check.sh [--only kernels,e2e,latency,probes,training] [--out FOLDER]
# Needs python3 with torch, Triton 3.6 or newer, cuda-bindings, onnx, onnxruntime, opencv, pillow, safetensors, rich, scipy,
# hypothesis and pytest. The native runtime is built anew where there are cmake and a C++ compiler; else it is left out.
# Under 9 minutes, and what torch.compile takes for training; each part writes its own file to FOLDER (default: benchmarks/results) as soon as it is done.
set -uo pipefail
cd "$(dirname "$0")/.."
only=kernels,e2e,latency,probes,training
out=benchmarks/results
while [ $# -gt 0 ]; do
  case "$1" in
    --only) only=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    *) echo "gpu_check: unknown option $1; expected --only PARTS or --out FOLDER" >&2; exit 2 ;;
  esac
done
for part in ${only//,/ }; do
  case "$part" in kernels | e2e | latency | probes | training) ;; *) echo "gpu_check: unknown part $part" >&2; exit 2 ;; esac
done

# The package's folders are mapped by setup.py; here links stand for that.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
mkdir "$links/omniad_edge"
ln -s "$PWD"/omniad_edge/* "$links/omniad_edge/"
ln -s "$PWD/kernels" "$PWD/export" "$links/omniad_edge/"
export PYTHONPATH="$links" PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$links/triton}
mkdir -p "$out"
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr ' A-Z' '-a-z')
rm -f "$links/omniad_edge/libomniad_runtime.so"
if [ -n "$gpu" ] && command -v cmake >/dev/null && cmake -S . -B "$links/native" >/dev/null && cmake --build "$links/native" -j >/dev/null; then
  ln -s "$links/native/libomniad_runtime.so" "$links/omniad_edge/"
fi

failed=()
for part in ${only//,/ }; do
  case "$part" in
    kernels) python3 -m pytest -p no:cacheprovider -m "slow or not slow" tests/test_kernel_*.py tests/test_network_plan.py ;;
    training) python3 benchmarks/training.py --device cuda --json "$out/${gpu:-gpu}-training.json" ;;
    *) python3 benchmarks/gpu.py "$part" --json "$out/${gpu:-gpu}-$part.json" ;;
  esac || failed+=("$part")
done
echo "gpu_check: ${only}; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]

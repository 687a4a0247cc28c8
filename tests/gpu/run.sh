#!/usr/bin/env bash
# Builds the CUDA variants and runs everything that needs a GPU: tests on the device, compute-sanitizer on some of them,
# the Python package on CUDA tensors, the benchmark. Needs a GPU, nvcc, CMake 3.24 and a C++17 compiler; for the Python
# part a torch for CUDA, scikit-build-core, pytest and hypothesis. Downloads nothing; stops after 10 minutes.
#
#     tests/gpu/run.sh [build folder]        a temporary one if none is named
#
# Exit status 0 only if every step passed. A step that cannot run here says why and counts as neither.
set -u
source_folder=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$(mktemp -d)}
table=()
failed=0

step() {  # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS result left=$((585 - SECONDS))
    shift 2
    printf '\n== %s\n' "$name"
    ((limit < left)) || limit=$left
    if ((limit < 1)); then
        table+=("| $name | FAILED: no time was left | |")
        failed=1
        return
    fi
    if timeout "$limit" "$@"; then
        result=passed
    else
        result="FAILED (status $?)"
        failed=1
    fi
    table+=("| $name | $result | $((SECONDS - start)) s |")
}

skip() {  # skip NAME REASON
    printf '\n== %s: not run, %s\n' "$1" "$2"
    table+=("| $1 | not run: $2 | |")
}

for tool in nvidia-smi nvcc cmake; do
    command -v "$tool" >/dev/null || { echo "run.sh: $tool was not found"; exit 2; }
done
nvidia-smi --query-gpu=name,driver_version,compute_cap,clocks.sm,power.draw,utilization.gpu --format=csv || exit 2
nvcc --version | tail -2
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')

generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
step configure 120 cmake -S "$source_folder" -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DLOCALATTN_CUDA=ON \
    -DLOCALATTN_CUDA_ARCHITECTURES="$capability"
layout=()  # the probe of what only tensor cores with asynchronous copies have
((capability < 80)) || layout=(gpu_layout_probe)
step build 300 cmake --build "$build" --parallel "$(nproc)" --target localattn localattn_cuda gpu_attention_test \
    "${layout[@]}" gpu_bench gpu_window_products_test gpu_linear_attention_test \
    gpu_routed_attention_test cuda_attention_test cuda_emulation_test cuda_layout_probe cuda_device_calls_test
test -x "$build/tests/gpu/gpu_attention_test" || { printf '%s\n' "${table[@]}"; exit 1; }

# A skipped test would mean that the GPU went unseen: here that is a failure.
if ((capability < 80)); then
    skip "layout primitives, host against device" "it needs compute capability 8.0"
else
    step "layout primitives, host against device" 60 cmake -DHOST="$build/tests/cuda/cuda_layout_probe" \
        -DDEVICE="$build/tests/gpu/gpu_layout_probe" -P "$source_folder/tests/gpu/same_output.cmake"
fi
step "attention on the device, 3000 problems" 180 "$build/tests/gpu/gpu_attention_test" 3000 1
for operator in window_products linear_attention routed_attention; do
    step "$operator on the device, 1000 problems" 120 env LOCALATTN_TEST_COUNT=1000 "$build/core/gpu_${operator}_test"
done
step "attention under emulation" 120 "$build/tests/cuda/cuda_attention_test" 168 1
step "emulation and C API" 60 ctest --test-dir "$build" --output-on-failure -R 'cuda\.(emulation|device_calls)'

if ! command -v compute-sanitizer >/dev/null; then
    skip "memcheck, racecheck" "compute-sanitizer was not found"
elif compute-sanitizer --tool memcheck "$build/tests/gpu/gpu_attention_test" 1 500 2>&1 | grep -i "device not supported"; then
    skip "memcheck, racecheck" "compute-sanitizer does not support this device here"
else
    step memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 1 "$build/tests/gpu/gpu_attention_test" 40 500
    step racecheck 120 compute-sanitizer --tool racecheck --error-exitcode 1 "$build/tests/gpu/gpu_attention_test" 20 600
fi

if python3 -c 'import hypothesis, pytest, scikit_build_core, torch; assert torch.cuda.is_available()'; then
    step "build the Python package" 240 env CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" python3 -m pip install --quiet --no-index \
        --no-deps --no-build-isolation --target "$build/python" --config-settings=build-dir="$build/package" \
        --config-settings=cmake.define.LOCALATTN_CUDA=ON \
        --config-settings=cmake.define.LOCALATTN_CUDA_ARCHITECTURES="$capability" "$source_folder"
    export PYTHONPATH="$build/python" PYTHONSAFEPATH=1
    step "python -m localattn info" 60 python3 -m localattn info
    # Results are poisoned by torch's deterministic mode, in which its matrix products want this.
    export CUBLAS_WORKSPACE_CONFIG=:4096:8
    step "PyTorch operators on the device" 180 python3 -m pytest -q -p no:cacheprovider \
        "$source_folder/tests/python/test_cuda.py"
else
    skip "PyTorch operators on the device" "python3 lacks what the last lines name"
fi

if python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    step "bfloat16 matmul rate" 60 python3 "$source_folder/tests/gpu/matmul_rate.py"
else
    skip "bfloat16 matmul rate" "no python3 with a torch that sees the GPU"
fi
step bench 180 "$build/tests/gpu/gpu_bench" 20

printf '\n| step | result | time |\n| --- | --- | --- |\n'
printf '%s\n' "${table[@]}"
exit "$failed"

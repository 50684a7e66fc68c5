#!/usr/bin/env bash
# For whoever has an NVIDIA GPU: runs valar's CUDA device on it and writes a report to attach to an issue. What it asks:
#   1. are results what the reference device says, and the same bits however a job runs (tests/it/cuda_device.rs, cuda_gguf.rs and fp8_folders.rs, without the stand-in)
#      On compute capability 9.0 that is attention by products of warpgroups (kernels/prefill_sm90.cu), elsewhere by mma.sync;
#      in both cases it has never run on a GPU before.
#   2. does compute-sanitizer find anything (if it is installed)
#   3. how many tokens a second (valar bench, the GPU against the CPU; vLLM on the same prompts, if Python has it)
#   4. how near to the GPU's peaks each kernel comes: its time, and shares of memory's and of the multiprocessors' throughput
#      (Nsight Compute, if it is installed; it may need the right to read the GPU's counters)
#
# usage: tests/gpu/on-device.sh [REPORT]     (cuda-report.txt)
# Needs a driver from 525 on, cuBLASLt and NVRTC of CUDA 12 (LD_LIBRARY_PATH, VALAR_NVRTC), cargo. GPU: CUDA_VISIBLE_DEVICES.
set -uo pipefail
cd "$(dirname "$0")/../.."
report=${1:-cuda-report.txt}
workload=datasets/mt_bench/requests.jsonl
failed=0

# Runs a command under a heading; its output and exit code go to the report.
part() {
  printf '\n== %s\n' "$1"
  shift
  "$@" 2>&1
  local code=$?
  [ $code = 0 ] || failed=1
  echo "(exit code $code)"
}

vllm() {
  python3 - "$workload" <<'PY'
import json, sys, time, vllm
bodies = [json.loads(line)["body"] for line in open(sys.argv[1])]
prompts = [body["messages"] for body in bodies]
params = [vllm.SamplingParams(temperature=body["temperature"], max_tokens=body["max_tokens"], seed=body["seed"]) for body in bodies]
model = vllm.LLM("HuggingFaceTB/SmolLM2-135M-Instruct")
start = time.time()
outputs = model.chat(prompts, params)
tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
# valar's default model has the same weights in 4 bits.
print(f"vLLM {vllm.__version__}, bfloat16: {tokens} tokens in {time.time() - start:.2f} s")
PY
}

# Kernels one by one, so without graphs: some of the prompts' steps, and of those of single tokens.
share_of_peak() {
  local of=avg.pct_of_peak_sustained_elapsed
  local metrics="gpu__time_duration.sum,dram__throughput.$of,gpu__compute_memory_throughput.$of,sm__throughput.$of"
  VALAR_CUDA_GRAPHS=0 ncu --csv --metrics "$metrics" --launch-count 2000 "$1" bench "$workload" --device cuda --limit 8
}

all() {
  part "machine" nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv
  part "program" git describe --always --dirty
  part "build" cargo build --release
  local valar=target/release/valar
  part "conformance" env VALAR_TEST_GPU=1 cargo test --release --test it -- cuda_device cuda_gguf fp8_folders
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
      part "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$valar" bench "$workload" \
        --device cuda --limit 1 --memory 1GiB
    done
  else
    printf '\n== compute-sanitizer is not installed\n'
  fi
  if command -v ncu >/dev/null; then
    part "share of peak, by kernel" share_of_peak "$valar"
  else
    printf '\n== Nsight Compute is not installed\n'
  fi
  part "speed on the GPU" "$valar" bench "$workload" --device cuda
  part "speed on the CPU" "$valar" bench "$workload" --device cpu
  if python3 -c 'import vllm' 2>/dev/null; then part "vLLM" vllm; else printf '\n== vLLM is not installed\n'; fi
}

all | tee "$report"
grep -q '^(exit code [1-9]' "$report" && failed=1
echo "The report is in $report."
exit $failed

#!/usr/bin/env bash
# Everything that a machine with a GPU can show, in under ten minutes and without a network:
#
#     benchmarks/run_gpu.sh OUTDIR
#
# Installs the project, runs its tests, its kernels under compute-sanitizer, and the GPU benchmarks. Every step runs
# whatever became of the one before; the exit code is 1 if any failed, and a summary comes last. OUTDIR receives
# build.log, tests.log, sanitizer.log, benchmarks.log, report.json, table.md and plot.png.
#
# From the environment: STEPS, the steps to run (by default all: "build tests large sanitizer bench"); PYTHON, by
# default python3; WORKERS, the number of test processes (by default 8); PYTEST_ARGUMENTS, further words for pytest;
# BENCH_SECONDS, after which no further case is measured (by default 240).
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: benchmarks/run_gpu.sh OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd) || exit 2
root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
cd "$root" || exit 2

python=${PYTHON:-python3}
steps=" ${STEPS-build tests large sanitizer bench} "
workers=${WORKERS:-8}
read -r -a pytest_arguments <<<"${PYTEST_ARGUMENTS:-}"
export PYTHONUNBUFFERED=1
summary=()
failed=0

wanted() { [[ $steps == *" $1 "* ]]; }

has_module() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

note() {
  summary+=("$*")
  echo "$*"
}

# run_step NAME SECONDS LOG COMMAND...: runs the command with a time limit, appends what it prints to OUTDIR/LOG, and
# records how it ended.
run_step() {
  local name=$1 limit=$2 log=$out/$3 began=$SECONDS code
  shift 3
  echo "== $name"
  printf '\n== %s: %s\n' "$name" "$*" >>"$log"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  code=$?
  if [ $code -eq 0 ]; then
    note "ok       $name, $((SECONDS - began)) s$(last_count "$log")"
  else
    failed=1
    note "FAILED   $name, $((SECONDS - began)) s, exit code $code (124: ran into its limit of $limit s)"
    tail -n "${TAIL_LINES:-25}" "$log"
  fi
  return $code
}

# pytest's own last line, where the log ends in one.
last_count() {
  local line
  line=$(tail -n 1 "$1" | grep -E '(passed|skipped|deselected)' | tr -d '=')
  [ -z "$line" ] || echo ": $line"
}

if wanted build; then
  : >"$out/build.log"
  install=("$python" -m pip install --no-build-isolation --no-deps --no-index --verbose)
  if "$python" -m pip install --help | grep -q break-system-packages &&
    "$python" -c 'import pathlib, sys, sysconfig
sys.exit(sys.prefix != sys.base_prefix or not pathlib.Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists())'; then
    install+=(--break-system-packages)
  fi
  run_step "build and install" 400 build.log "${install[@]}" .
  grep -E "warning|error:|ptxas|CUDA compiler|registers" "$out/build.log" | sort | uniq -c | sort -rn | head -n 12
fi
# From here on the installed package is meant, not the folder beside this script.
if ! (cd / && "$python" -P -c "import qlae_kernels._native"); then
  failed=1
  note "FAILED   the installed package has no native module"
fi
(cd / && "$python" -P -m qlae_kernels) || failed=1

test_options=(-q -p no:cacheprovider --durations=12 -rsfE -o "addopts=--import-mode=importlib --benchmark-skip")
spread=()
if has_module xdist; then spread=(-n "$workers"); fi

if wanted tests; then
  : >"$out/tests.log"
  skipped=()
  for module in tyro yaml h5py sklearn tensorboard safetensors; do
    if ! has_module "$module"; then
      skipped=(--ignore=tests/qlae --ignore=tests/benchmarks/test_latent_quantize_benchmark.py)
      note "skipped  tests/qlae and tests/benchmarks/test_latent_quantize_benchmark.py: $module is not installed"
    fi
  done
  # The profiler sees no kernels while other processes use it.
  launches=tests/qlae_kernels/test_gpu.py::test_one_launch_each_way
  run_step "tests" 330 tests.log "$python" -P -m pytest "${test_options[@]}" "${spread[@]}" -m "not large" \
    "${skipped[@]}" --deselect "$launches" "${pytest_arguments[@]}" tests
  run_step "launches counted" 60 tests.log "$python" -P -m pytest "${test_options[@]}" "$launches"
fi

if wanted large; then
  # One after the other: each takes tens of gigabytes.
  run_step "more than 2**31 elements" 120 tests.log "$python" -P -m pytest "${test_options[@]}" -m large \
    tests/qlae_kernels/test_gpu.py
fi

# sanitize BACKEND TOOL: the backend's kernels on small cases under one of compute-sanitizer's tools.
sanitize() {
  # The caching allocator would hide accesses beyond an allocation that stay inside its own block.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=10 200 "$sanitizer" --tool "$2" --error-exitcode 9 \
    "$python" -P benchmarks/latent_quantize_sanitizer_case.py "$1"
}

if wanted sanitizer; then
  : >"$out/sanitizer.log"
  sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
  parts=$(mktemp -d)
  declare -A running=()
  for backend in cuda triton; do
    if [ -z "$sanitizer" ]; then
      note "skipped  sanitizer of $backend: compute-sanitizer is not installed"
    elif ! "$python" -P -c "import sys, qlae_kernels; sys.exit('$backend' not in qlae_kernels.available_backends())"; then
      note "skipped  sanitizer of $backend: the backend is not available"
    else
      for tool in memcheck racecheck synccheck; do
        sanitize "$backend" "$tool" >"$parts/$backend-$tool" 2>&1 &
        running[$backend-$tool]=$!
      done
    fi
  done
  for part in "${!running[@]}"; do
    wait "${running[$part]}"
    code=$?
    if [ $code -eq 0 ]; then
      note "ok       sanitizer, $part: $(grep -E 'SUMMARY' "$parts/$part" | tail -n 1 | tr -d '=')"
    else
      failed=1
      note "FAILED   sanitizer, $part, exit code $code"
      grep -vE '^=+ +(Host Frame|Saved host)' "$parts/$part" | head -n 25
    fi
    { printf '\n== %s\n' "$part"; cat "$parts/$part"; } >>"$out/sanitizer.log"
  done
  rm -rf "$parts"
fi

if wanted bench; then
  : >"$out/benchmarks.log"
  # Without -P: these modules import one another, and the package does not lie beside them.
  run_step "benchmarks" 330 benchmarks.log "$python" benchmarks/latent_quantize_gpu.py --output "$out" \
    --seconds "${BENCH_SECONDS:-240}"
  # us per call and, of the fused backends, percent of the copy's bandwidth; the rest lies in table.md.
  grep -E '^  both ' "$out/benchmarks.log"
  sed -n '/^## A training step/,$p' "$out/table.md" 2>/dev/null
fi

echo
echo "== summary, $SECONDS s"
printf '%s\n' "${summary[@]}"
exit $failed

#!/usr/bin/env bash
# The job for a machine without GPUs: verify, and leave the report. Usage: ci/cpu.sh [OUT]
#   BUDGET=30m         the long forms of the parts, and more cases: the nightly job
#   BACKEND=mine:make  also this kernel, fused against unfused, at tp $TP (2,4); fails the job if it is wrong
# Exit code: the worst of what ran: 0 pass, 1 fail, 2 wrong usage, 3 inconclusive.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out=${1:-runs/ci}
fusecheck=${FUSECHECK:-.venv/bin/fusecheck}
if [ ! -x "$fusecheck" ] && [ -z "${FUSECHECK:-}" ]; then make setup || exit 2; fi
export NO_COLOR=1
mkdir -p "$out"

runs=()
$fusecheck verify ${BUDGET:+--budget "$BUDGET"} --run-dir "$out/verify"
code=$?
[ -f "$out/verify/result.json" ] && runs+=("$out/verify")
if [ -n "${BACKEND:-}" ] && [ $code -ne 2 ]; then
    $fusecheck kernel --backend "$BACKEND" --tp "${TP:-2,4}" ${CASES:+--cases "$CASES"} --run-dir "$out/kernel"
    kernel=$?
    [ $code -eq 0 ] && code=$kernel
    [ $kernel -eq 1 ] && code=1
    [ -f "$out/kernel/result.json" ] && runs+=("$out/kernel")
fi
[ ${#runs[@]} -eq 0 ] && exit $code
$fusecheck report "${runs[@]}" --run-dir "$out/report" --markdown "$out/summary.md"
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then cat "$out/summary.md" >>"$GITHUB_STEP_SUMMARY"; fi
exit $code

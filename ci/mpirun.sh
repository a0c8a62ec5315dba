#!/usr/bin/env bash
# Verify fused kernels on the GPUs of this machine, under MPI and as virtual ranks. Usage: ci/mpirun.sh [ranks] [out]
# STEPS names the groups of steps (default: tp virtual rejected others tests); OTHERS the backends of the fourth.
# For four ranks and more: STEPS='patterns crossed others groups tests latency' ci/mpirun.sh 8, ten minutes.
# PAIRS names kernels, each with the dataflow that it has not; SECS is how long each of patterns goes on.
# Tried without a GPU: DEVICE=cpu PAIRS='emulated:trtllm=trtllm-fp32 emulated:trtllm-fp32=trtllm' OTHERS=unfused
# Every step has a deadline; the script fails if any step does not end as it should.
set -u
ranks=${1:-2}
out=${2:-runs/mpirun}
python=${PYTHON:-python3}
mpirun=${MPIRUN:-mpirun --allow-run-as-root --oversubscribe}
mkdir -p "$out"
hidden=2048,2880,3072,3584,4096,5120,6144,7168,8192,12288,16384 # of the models in verify/inputs/models.toml
failed=0

# step NAME EXPECTED-EXIT-CODE SECONDS COMMAND...: the log goes to $out, its end to the terminal
step() {
    local name=$1 expected=$2 limit=$3 began=$SECONDS code
    shift 3
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    [ "$code" = "$expected" ] || failed=1
    echo "== $name: exit $code (expected $expected), $((SECONDS - began)) s"
    tail -n "${SHOWN:-3}" "$out/$name.log" | cut -c1-400
}
kernel() { echo "$python -m fusecheck kernel --case-timeout 20"; }

pairs=${PAIRS:-flashinfer=flashinfer-fp32 flashinfer:fp32=flashinfer}
device=${DEVICE:-cuda}
steps=${STEPS:-tp virtual rejected others tests}
for group in $steps; do
    case $group in
    tp)
        for variant in flashinfer flashinfer:fp32; do
            # shellcheck disable=SC2046
            step "${variant/:/-}-tp$ranks" 0 150 $mpirun -n "$ranks" $(kernel) --backend $variant --tp "$ranks" \
                --tokens 1,16,128,512,2048 --hidden $hidden ${CASES:+--cases "$CASES"} \
                --json "$out/${variant/:/-}-tp$ranks.json"
        done
        ;;
    virtual)
        for variant in flashinfer flashinfer:fp32; do
            # shellcheck disable=SC2046
            step "${variant/:/-}-virtual" 0 150 $(kernel) --backend $variant --virtual-ranks 2,4,8,16 \
                --accept-refusals --json "$out/${variant/:/-}-virtual.json"
        done
        ;;
    rejected) # judged by the other accumulation: four ranks and more must be rejected
        for pair in $pairs; do
            variant=${pair%=*}
            for size in 4 8 16; do
                # shellcheck disable=SC2046
                step "${variant/:/-}-virtual$size-rejected" 1 60 $(kernel) --backend "$variant" \
                    --virtual-ranks $size --dataflow "${pair#*=}" --family gaussian --cases 6 \
                    --json "$out/${variant/:/-}-virtual$size-rejected.json"
            done
        done
        ;;
    patterns) # every operation and exchange that the kernel has, on as many ranks
        for pair in $pairs; do
            variant=${pair%=*}
            # shellcheck disable=SC2046
            step "${variant/:/-}-patterns-tp$ranks" 0 120 $mpirun -n "$ranks" $(kernel) --backend "$variant" \
                --tp "$ranks" --seconds "${SECS:-30}" --json "$out/${variant/:/-}-patterns-tp$ranks.json"
        done
        ;;
    crossed) # as rejected, between real processes; two ranks add up alike in every order
        for pair in $pairs; do
            variant=${pair%=*}
            # shellcheck disable=SC2046
            step "${variant/:/-}-crossed-tp$ranks" 1 60 $mpirun -n "$ranks" $(kernel) --backend "$variant" \
                --tp "$ranks" --dataflow "${pair#*=}" --family gaussian --cases 6 \
                --json "$out/${variant/:/-}-crossed-tp$ranks.json"
        done
        ;;
    groups) # two groups side by side, each on half of the ranks
        variant=${pairs%%=*}
        # shellcheck disable=SC2046
        step "${variant/:/-}-two-groups" 0 90 $mpirun -n "$ranks" $(kernel) --backend "$variant" \
            --tp $((ranks / 2)) --json "$out/${variant/:/-}-two-groups.json"
        ;;
    latency)
        for op in RESIDUAL_RMS_NORM_QUANT_FP8 RESIDUAL_RMS_NORM_OUT_QUANT_FP8; do
            step "latency-$op-tp$ranks" 0 90 $mpirun -n "$ranks" $python -m fusecheck latency --op $op --tp "$ranks" \
                --json "$out/latency-$op-tp$ranks.json"
        done
        ;;
    others)
        for backend in ${OTHERS:-flashinfer:unified flashinfer:pdl flashinfer-norm torch-symm}; do
            # shellcheck disable=SC2046
            step "${backend/:/-}-tp$ranks" 0 90 $mpirun -n "$ranks" $(kernel) --backend "$backend" --tp "$ranks" \
                --accept-refusals --json "$out/${backend/:/-}-tp$ranks.json"
        done
        ;;
    tests)
        step property-tests 0 300 $mpirun -n "$ranks" $python -m pytest -q property_tests/kernel \
            --backend "${pairs%%=*}" --device "$device" --tp "$ranks" --junitxml "$out/property-tests.xml"
        ;;
    *)
        echo "ci/mpirun.sh: no steps called $group, expected of: tp virtual rejected others tests patterns crossed groups latency" >&2
        exit 2
        ;;
    esac
done
exit $failed

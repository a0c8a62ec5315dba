#!/usr/bin/env bash
# A table of releases of FlashInfer. Usage: ci/releases.sh RELEASES [OUT]
# RELEASES has a folder a release, as ci/bundle.py packs it; each is judged in every variant, and OUT/releases.md is the table.
# RANKS, SECS for each run, VARIANTS. Without a GPU it is tried by VARIANTS='emulated:trtllm emulated:flashinfer' and empty folders.
# A kernel that fails is an entry of the table; the script fails if a run ends without a verdict.
set -u
releases=${1:?the folder of the releases}
out=${2:-runs/releases}
ranks=${RANKS:-2}
python=${PYTHON:-python3}
mpirun=${MPIRUN:-mpirun --allow-run-as-root --oversubscribe}
mkdir -p "$out"
failed=0
for release in "$releases"/*/; do
    for variant in ${VARIANTS:-flashinfer flashinfer:fp32 flashinfer:pdl}; do
        name=$(basename "$release")-${variant//:/-}
        PYTHONPATH="$release${PYTHONPATH:+:$PYTHONPATH}" timeout $((${SECS:-40} + 120)) $mpirun -n "$ranks" \
            $python -m fusecheck kernel --backend "$variant" --tp "$ranks" --seconds "${SECS:-40}" --case-timeout 20 \
            --accept-refusals --run-dir "$out/$name.run" --json "$out/$name.json" >"$out/$name.log" 2>&1
        code=$?
        echo "== $name: exit $code: $(grep -v '^$' "$out/$name.log" | tail -n 1 | cut -c1-300)"
        [ -e "$out/$name.json" ] || failed=1
    done
done
$python -m fusecheck.golden.releases "$out" >"$out/releases.md" || failed=1
cat "$out/releases.md"
exit $failed

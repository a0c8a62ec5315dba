#!/usr/bin/env bash
# Ask the accuracy question of a real model on one or two GPUs, on a machine without a network. Usage: ci/accuracy_gpu.sh STEP...
#   collect   move what was brought in .carry/ to $WORK (call it once for each load)
#   setup     join the model's parts, unpack the packages, GGUF to bf16 to FP8
#   tp1       FlashInfer's add + norm + quantise on one rank: MMLU, GSM8K
#   fused     FlashInfer's fused kernel on two ranks: MMLU, GSM8K
#   planted   bugs around the fused kernel: MMLU, each traced
# On a machine with one GPU both ranks share it; RANKS='--tp 2 --virtual' asks for that elsewhere.
# FORM=dynamic and the like takes another FP8 form in setup and planted; see `fusecheck accuracy calibrate --help`.
# Two H200s, 1.5B model: setup 75 s, MMLU 0-shot 165 s. GSM8K 5-shot 381 s.
# Brought: model.gguf.00 and so on, SHA256SUMS, site.tgz (lm-eval and what it needs), flashinfer.tgz (ci/bundle.py),
# data.tgz (mmlu/ and gsm8k/). What a run leaves for reading goes to $OUT.
set -euo pipefail
work=${WORK:-/tmp/accuracy}
out=${OUT:-$work/out}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
fused=${FUSED:-flashinfer:fp32}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
read -ra ranks <<<"${RANKS:-$([ "$gpus" -gt 1 ] && echo --tp 2 || echo --tp 2 --virtual)}"
export PYTHONPATH=$work/site HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=true
mkdir -p "$work/parts" "$work/site" "$out"

# ask NAME SECONDS OPTIONS...: one run of four arms, its console and records to $out
ask() {
    local name=${NAME:-$1} limit=$2 began=$SECONDS code=0
    shift 2
    take_code
    rm -rf "$work/runs/$name"
    timeout "$limit" "$python" -m fusecheck accuracy --model "$work/fp8" --data "$work/data" --device "$device" \
        --run-dir "$work/runs/$name" "$@" >"$work/$name.log" 2>&1 || code=$?
    echo "== $name: exit $code, $((SECONDS - began)) s"
    { head -n 2 "$work/$name.log" && grep -A 3 "^trace:" "$work/$name.log"; } | cut -c1-600 || true
    [ "$code" -lt 2 ] || tail -n 12 "$work/$name.log" | cut -c1-300
    (cd "$work" && find "$name.log" "runs/$name" -maxdepth 1 -type f -size -15M -print0 | tar czf "$out/$name.tgz" --null -T -)
}

# The package as it is in this checkout, without an installer.
take_code() {
    rm -rf "$work/site/fusecheck" && cp -r verify "$work/site/fusecheck"
    cp -r eval golden property_tests "$work/site/fusecheck/"
}

for step in "$@"; do
    case $step in
    collect)
        find .carry -type f -exec mv -t "$work/parts" {} +
        ls "$work/parts" | wc -l
        ;;
    setup)
        (cd "$work/parts" && sha256sum --quiet -c SHA256SUMS && cat model.gguf.* >"$work/model.gguf")
        for pack in site flashinfer; do tar xzf "$work/parts/$pack.tgz" -C "$work/site"; done
        mkdir -p "$work/data" && tar xzf "$work/parts/data.tgz" -C "$work/data"
        rm -rf "$work/bf16" "$work/fp8"
        take_code
        time "$python" -m fusecheck accuracy import "$work/model.gguf" "$work/bf16"
        time "$python" -m fusecheck accuracy calibrate "$work/bf16" "$work/fp8" --form "${FORM:-static}" --device "$device"
        ;;
    tp1 | fused)
        kernel=(--tp 1 --backend flashinfer-norm)
        [ "$step" = tp1 ] || kernel=("${ranks[@]}" --backend "$fused")
        ask "$step" 580 "${kernel[@]}" --tasks "${TASKS:-mmlu,gsm8k}" --shots "${SHOTS:-0}" \
            ${LIMIT:+--limit "$LIMIT"} ${BATCH:+--batch "$BATCH"} ${CHAT:+--apply-chat-template}
        ;;
    planted)
        take_code
        # shellcheck disable=SC2086
        timeout 580 "$python" -m fusecheck.eval.planted_model ${KINDS:-} --model "$work/fp8" --data "$work/data" \
            --backend "$fused" --device "$device" "${ranks[@]}" --tasks "${TASKS:-mmlu}" --limit "${LIMIT:-4000}" \
            ${BATCH:+--batch "$BATCH"} --run-dir "$work/runs/planted" --json "$out/planted.json" 2>"$out/planted.log"
        ;;
    *)
        echo "ci/accuracy_gpu.sh: no step called $step, expected of: collect setup tp1 fused planted" >&2
        exit 2
        ;;
    esac
done

#!/usr/bin/env bash
# First look at a GPU machine: unpack what travelled in .carry, run each backend briefly, print compact results.
set -u
out=${OUT:-runs/gpu}
mkdir -p "$out" /tmp/site
tar xzf .carry/fi072.tgz -C /tmp/site
export TERM=dumb
export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1
step() { echo "== $*"; local s=$SECONDS; "$@" 2>&1 | tail -n "${LINES_SHOWN:-7}" | cut -c1-330; echo "-- $((SECONDS - s)) s"; }
step python3 -c 'import torch, flashinfer; print(torch.__version__, flashinfer.__version__, torch.cuda.device_count())'
step timeout 100 python3 -m verify.cli kernel --backend flashinfer --tp 2 --cases 48 --case-timeout 20 --json "$out/flashinfer.json"
step timeout 60 python3 -m verify.cli kernel --backend flashinfer:fp32 --tp 2 --cases 48 --case-timeout 20 --json "$out/flashinfer-fp32.json"
step timeout 60 python3 -m verify.cli kernel --backend unfused --device cuda --tp 2 --cases 48 --case-timeout 20
step timeout 100 python3 -m verify.cli kernel --backend flashinfer --virtual-ranks 2,4,8,16 --cases 48 --case-timeout 20
step timeout 60 mpirun --allow-run-as-root -n 2 python3 -m verify.cli kernel --backend flashinfer --tp 2 --cases 48 --case-timeout 20

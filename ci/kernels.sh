#!/usr/bin/env bash
# Pack prebuilt kernels of other wheels for a GPU machine without a network. Usage: ci/kernels.sh [OUT] [NAME...]
# NAME: tokenspeed, vllm or sglang (all three).
# Of each wheel the one library that the backend loads, and what Python that needs, under empty packages: importing the
# whole package would need another torch and dozens of others. Parts of at most PART (36M); on the GPU machine:
#   cat OUT/tokenspeed.txz.* | tar xJ -C FOLDER    then    PYTHONPATH=FOLDER fusecheck kernel --backend tokenspeed
# TOKENSPEED, VLLM, SGLANG and TVM_FFI are versions, TARGET the GPU machine's Python. Needs pip, unzip, strip and xz, no GPU.
set -eu
out=$(realpath -m "${1:-dist/kernels}")
shift || true
target=${TARGET:-3.12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
pip=(python3 -m pip --quiet --disable-pip-version-check)
elsewhere=(--no-deps --only-binary=:all: --implementation cp --python-version "$target"
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64)

fetch() { # REQUIREMENT: the wheel of another machine, as $wheel
    "${pip[@]}" download "${elsewhere[@]}" -d "$work" "$1"
    wheel=$(ls -t "$work"/*.whl | head -1)
}

take() { # NAME PACKAGE FILE...: of the wheel, under an empty package
    unzip -q "$wheel" "${@:3}" '*.dist-info/METADATA' -d "$work/$1"
    touch "$work/$1/$2/__init__.py"
}

pack() { # NAME: strip the libraries and write OUT/NAME.txz.0 and so on
    find "$work/$1" -name '*.so' -exec strip {} +
    tar c -C "$work/$1" . | xz -T0 | split -b "${PART:-36M}" -d -a 1 - "$out/$1.txz."
    ls -l "$out/$1.txz".*
}

tokenspeed() {
    local cuda=tokenspeed_kernel/thirdparty/cuda
    fetch "tokenspeed-kernel==${TOKENSPEED:-0.1.4}"
    take tokenspeed tokenspeed_kernel tokenspeed_kernel/platform.py "$cuda/trtllm.py" "$cuda/cuda_ipc.py" \
        "$cuda/objs/trtllm_comm/*"
    touch "$work"/tokenspeed/{tokenspeed_kernel/thirdparty,$cuda}/__init__.py
    "${pip[@]}" install --no-compile "${elsewhere[@]}" --target "$work/tokenspeed" "apache-tvm-ffi==${TVM_FFI:-0.1.13.post3}"
}

vllm() {
    fetch "vllm==${VLLM:-0.33.0}"
    take vllm vllm vllm/_C_stable_libtorch.abi3.so
}

sglang() { # the library for sm_90
    fetch "sglang-kernel==${SGLANG:-0.4.6}"
    take sglang sgl_kernel sgl_kernel/sm90/common_ops.abi3.so
}

[ $# -gt 0 ] || set -- tokenspeed vllm sglang
for name; do
    "$name"
    pack "$name"
done

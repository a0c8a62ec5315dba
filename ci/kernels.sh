#!/usr/bin/env bash
# Pack prebuilt kernels of tokenspeed-kernel and vLLM for a GPU machine without a network. Usage: ci/kernels.sh [OUT]
# Of each wheel the one library that the backend loads, and what Python that needs, under empty packages: importing the
# whole package would need another torch and dozens of others. Parts of at most PART (36M); on the GPU machine:
#   cat OUT/tokenspeed.txz.* | tar xJ -C FOLDER    then    PYTHONPATH=FOLDER fusecheck kernel --backend tokenspeed
# TOKENSPEED, VLLM and TVM_FFI are versions, TARGET the GPU machine's Python. Needs pip, unzip, strip and xz, no GPU.
set -eu
out=$(realpath -m "${1:-dist/kernels}")
target=${TARGET:-3.12}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/tokenspeed" "$work/vllm"
pip=(python3 -m pip --quiet --disable-pip-version-check)
elsewhere=(--no-deps --only-binary=:all: --implementation cp --python-version "$target"
    --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64)

pack() { # NAME: strip the libraries and write OUT/NAME.txz.0 and so on
    find "$work/$1" -name '*.so' -exec strip {} +
    tar c -C "$work/$1" . | xz -T0 | split -b "${PART:-36M}" -d -a 1 - "$out/$1.txz."
    ls -l "$out/$1.txz".*
}

"${pip[@]}" download "${elsewhere[@]}" -d "$work" \
    "tokenspeed-kernel==${TOKENSPEED:-0.1.4}" "vllm==${VLLM:-0.33.0}"

cuda=tokenspeed_kernel/thirdparty/cuda
unzip -q "$work"/tokenspeed_kernel-*.whl tokenspeed_kernel/platform.py "$cuda/trtllm.py" "$cuda/cuda_ipc.py" \
    "$cuda/objs/trtllm_comm/*" '*.dist-info/METADATA' -d "$work/tokenspeed"
touch "$work"/tokenspeed/{tokenspeed_kernel,tokenspeed_kernel/thirdparty,$cuda}/__init__.py
"${pip[@]}" install "${elsewhere[@]}" --target "$work/tokenspeed" "apache-tvm-ffi==${TVM_FFI:-0.1.13.post3}"
pack tokenspeed

unzip -q "$work"/vllm-*.whl vllm/_C_stable_libtorch.abi3.so '*.dist-info/METADATA' -d "$work/vllm"
touch "$work/vllm/vllm/__init__.py"
pack vllm

#!/usr/bin/env python3
"""Pack FlashInfer with its kernels prebuilt, for a GPU machine without a network: `python ci/bundle.py --arch 9.0a`.

No GPU is needed, but a CUDA toolkit (CUDA_HOME, or nvcc on the PATH, or the nvidia-cuda-nvcc wheels), a C++ compiler,
a package index, and a Python that has torch. On the GPU machine, which brings torch and CUDA's libraries, unpack the
archive and put its folder on PYTHONPATH: FlashInfer takes the prebuilt modules and compiles nothing. Standard library
only. Exit code 2 and one line when it cannot go on.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

GENERATORS = {
    "trtllm_comm": "flashinfer.jit.comm:gen_trtllm_comm_module",
    "norm": "flashinfer.jit.norm:gen_norm_module",
}
"""What FlashInfer calls each module that Fusecheck's backends use, and what describes its build."""

BUILD_NEEDS = (
    *("apache-tvm-ffi", "click", "cuda-python", "einops", "filelock", "jinja2", "ninja", "numpy", "nvidia-ml-py"),
    *("packaging", "requests", "tabulate", "tqdm"),
)
"""What building imports, beside torch."""

RUN_NEEDS = ("apache-tvm-ffi", "click", "cuda-tile")
"""What goes along, since the usual image of torch with CUDA lacks it; more by --also."""

HEADERS = ("cublasLt.h", "cublas_v2.h", "curand.h", "curand_kernel.h")
"""The modules' sources include these and use nothing of them: empty ones do where the toolkit has none."""

COMPILE = "--compile"
"""The first argument by which this file calls itself, in the environment in which FlashInfer is to be compiled."""


class BundleError(Exception):
    """The bundle cannot be made; the message is one line that says what to do."""


@dataclass(frozen=True)
class Bundle:
    """What is to be packed, and where it is made.

    Attributes:
        version: of flashinfer-python.
        archs: compute capabilities as FlashInfer writes them, such as 9.0a.
        modules: keys of `GENERATORS`.
        target_python: the GPU machine's Python, major and minor.
        also: further packages to take along, as pip names them.
        cuda: the toolkit's root.
        work: where it is made; what is there from an earlier run is used again.
        out: the archive.
        jobs: compilers at a time.
    """

    version: str
    archs: tuple[str, ...]
    modules: tuple[str, ...]
    target_python: str
    also: tuple[str, ...]
    cuda: Path
    work: Path
    out: Path
    jobs: int

    @property
    def root(self) -> Path:
        """What becomes the archive."""
        return self.work / "bundle"


@dataclass(frozen=True)
class Command:
    """A program to run, and what it finds in its environment beside ours."""

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join([*(f"{key}={value}" for key, value in self.env.items()), *self.argv])


def commands(bundle: Bundle) -> list[Command]:
    """The programs that are run, in order: fetch for this machine, compile, fetch for the GPU machine."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-warn-conflicts")
    wheel = f"flashinfer-python=={bundle.version}"
    host, stand_ins = bundle.work / "host", bundle.work / "stand-ins"
    path = os.pathsep.join([str(host / "bin"), os.environ.get("PATH", "")])
    build_env = {
        "PYTHONPATH": str(host),
        "PATH": path,
        "CUDA_HOME": str(bundle.cuda),
        "CPATH": str(stand_ins / "include"),
        "LIBRARY_PATH": str(stand_ins),
        "FLASHINFER_CUDA_ARCH_LIST": " ".join(bundle.archs),
        "FLASHINFER_WORKSPACE_BASE": str(bundle.work),
        "MAX_JOBS": str(bundle.jobs),
    }
    described = [f"{name}:{GENERATORS[name]}" for name in bundle.modules]
    elsewhere = ("--python-version", bundle.target_python, "--implementation", "cp", "--only-binary=:all:")
    aot = bundle.root / "flashinfer" / "data" / "aot"
    return [
        Command((*pip, "--target", str(host), "--no-deps", wheel)),
        Command((*pip, "--target", str(host), *BUILD_NEEDS)),
        Command((sys.executable, __file__, COMPILE, str(bundle.cuda), str(bundle.work / "aot"), *described), build_env),
        Command((*pip, "--target", str(bundle.root), "--no-deps", *elsewhere, wheel, *RUN_NEEDS, *bundle.also)),
        Command(("cp", "-r", str(bundle.work / "aot"), str(aot))),
    ]


def make(bundle: Bundle) -> None:
    """Run the commands, prune what only compiling needs, and pack.

    Raises:
        BundleError: a command failed.
    """
    shutil.rmtree(bundle.root, ignore_errors=True)
    bundle.work.mkdir(parents=True, exist_ok=True)
    make_stand_ins(bundle)
    *earlier, copy = commands(bundle)
    for command in earlier:
        run(command)
    shutil.rmtree(bundle.root / "flashinfer" / "data")
    (bundle.root / "flashinfer" / "data").mkdir()
    run(copy)
    for cache in list(bundle.root.rglob("__pycache__")):
        shutil.rmtree(cache)
    (bundle.root / "MANIFEST.json").write_text(json.dumps(manifest(bundle), indent=1) + "\n", encoding="utf-8")
    bundle.out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(bundle.out, "w:gz") as archive:
        for path in sorted(bundle.root.iterdir()):
            archive.add(path, arcname=path.name)


def make_stand_ins(bundle: Bundle) -> None:
    """What linking and compiling ask for and a machine without a GPU may lack.

    An empty libcuda: the driver's own is found on the GPU machine. The unversioned name of libcudart, which the wheels
    lack. Empty headers of libraries that the sources only include.
    """
    stand_ins = bundle.work / "stand-ins"
    (stand_ins / "include").mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CC", "cc")
    library = str(stand_ins / "libcuda.so")
    run(Command((compiler, "-shared", "-x", "c", os.devnull, "-Wl,-soname,libcuda.so.1", "-o", library)))
    runtime = sorted(bundle.cuda.glob("lib*/libcudart.so*"))
    if not runtime:
        raise BundleError(
            f"no libcudart under {bundle.cuda}: install the CUDA runtime (nvidia-cuda-runtime) beside nvcc"
        )
    link = stand_ins / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(runtime[0].resolve())
    for header in HEADERS:
        if not (bundle.cuda / "include" / header).exists():
            (stand_ins / "include" / header).touch()


def compile_modules(cuda: str, target: str, *described: str) -> None:
    """Compile modules with the FlashInfer that is importable here, into `target/NAME/NAME.so`.

    Args:
        cuda: the toolkit's root.
        target: where to.
        described: `NAME:MODULE:FUNCTION` each, as in `GENERATORS`.
    """
    for found in sorted(Path(cuda).glob("lib*/libcudart.so*"))[:1]:
        ctypes.CDLL(str(found), mode=ctypes.RTLD_GLOBAL)  # 0.6 looks for it among what is loaded
    for line in described:
        name, module, function = line.split(":")
        spec = getattr(importlib.import_module(module), function)()
        spec.build(verbose=False)
        to = Path(target, name)
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(spec.jit_library_path, to / f"{name}.so")


def manifest(bundle: Bundle) -> dict[str, object]:
    """What the archive was made of, as JSON-ready values."""
    return {
        "flashinfer-python": bundle.version,
        "architectures": list(bundle.archs),
        "modules": list(bundle.modules),
        "python": bundle.target_python,
        "nvcc": cuda_version(bundle.cuda),
        "packages": sorted(path.name.removesuffix(".dist-info") for path in bundle.root.glob("*.dist-info")),
    }


def cuda_version(cuda: Path) -> str:
    """The toolkit's release, such as 13.0."""
    told = subprocess.run([cuda / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release ([\d.]+)", told)
    return match.group(1) if match else "unknown"


def run(command: Command) -> None:
    """Run a program; its output is shown only if it fails.

    Raises:
        BundleError: it is not there, or failed.
    """
    try:
        done = subprocess.run(
            command.argv, env=os.environ | command.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except OSError as error:
        raise BundleError(f"cannot run {command.argv[0]}: {error.strerror}; install it") from None
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace")[-4000:])
        raise BundleError(f"exit {done.returncode} of: {shlex.join(command.argv)[:200]}")


def find_cuda() -> Path:
    """The CUDA toolkit: CUDA_HOME or CUDA_PATH, nvcc on the PATH, or the wheels of this Python.

    Raises:
        BundleError: there is none, or the variable names a folder without nvcc.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            if (Path(root) / "bin" / "nvcc").exists():
                return Path(root)
            raise BundleError(f"{variable}={root} has no bin/nvcc, expected the root of a CUDA toolkit")
    if nvcc := shutil.which("nvcc"):
        # It may be a script that calls the real one, so it is asked where that lies.
        told = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        match = re.search(r"^#\$ _HERE_=(.+)$", told.stderr, flags=re.MULTILINE)
        return Path(match.group(1) if match else Path(nvcc).resolve().parent).parent
    for wheel in sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc")):
        return wheel.parent.parent
    raise BundleError("no CUDA toolkit: set CUDA_HOME, put nvcc on the PATH, or pip install nvidia-cuda-nvcc")


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        BundleError: a value that cannot be meant.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", default="9.0a", help="compute capabilities, comma-separated (default: 9.0a)")
    parser.add_argument("--version", default="0.7.2.post1", help="of flashinfer-python (default: %(default)s)")
    parser.add_argument("--modules", default=",".join(GENERATORS), help="comma-separated (default: %(default)s)")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--target-python", default=here, help="of the GPU machine (default: %(default)s, as here)")
    parser.add_argument("--also", action="append", default=[], metavar="PACKAGE", help="take this along, too")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time (default: all cores)"
    )
    parser.add_argument("--work", type=Path, default=Path("build/bundle"), help="made here (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="the archive (default: dist/flashinfer-VERSION-ARCHS.tgz)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    given = parser.parse_args(arguments)
    given.archs, given.names = tuple(given.arch.split(",")), tuple(given.modules.split(","))
    for arch in given.archs:
        if not re.fullmatch(r"\d+\.\d[af]?", arch):
            raise BundleError(f"--arch {arch!r}, expected a compute capability such as 9.0a or 10.0a")
    for name in given.names:
        if name not in GENERATORS:
            raise BundleError(f"--modules {name!r}, expected of: {', '.join(GENERATORS)}")
    if not re.fullmatch(r"3\.\d+", given.target_python):
        raise BundleError(f"--target-python {given.target_python!r}, expected major and minor such as 3.12")
    if given.jobs < 1:
        raise BundleError(f"--jobs {given.jobs}, expected 1 or more")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the bundle, or say in one line why not; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [COMPILE]:
        compile_modules(*arguments[1:])
        return 0
    try:
        given = parsed(arguments)
        out = given.out or Path("dist") / f"flashinfer-{given.version}-{'-'.join(f'sm{a}' for a in given.archs)}.tgz"
        bundle = Bundle(
            given.version,
            given.archs,
            given.names,
            given.target_python,
            tuple(given.also),
            find_cuda(),
            given.work.resolve(),
            out.resolve(),
            given.jobs,
        )
        if given.dry_run:
            print(*commands(bundle), f"# then packed into {bundle.out}", sep="\n")
            return 0
        make(bundle)
    except BundleError as error:
        print(f"ci/bundle.py: {error}", file=sys.stderr)
        return 2
    print(f"{bundle.out} ({bundle.out.stat().st_size >> 20} MiB): unpack it and put its folder on PYTHONPATH")
    return 0


if __name__ == "__main__":
    sys.exit(main())

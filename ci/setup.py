"""Make or adopt `.venv`, with everything that Fusecheck needs, and never the wrong torch.

torch is the one heavy dependency, and an index may offer a CUDA build of several gigabytes where a
CPU build is meant. So torch is settled first, by three rules:

1. The venv or the base interpreter has one: it stays, whatever build it is.
2. There is an NVIDIA driver: the index's own build.
3. There is none: the index's own build, unless that would pull CUDA packages. Then uv installs the CPU
   build, if uv is there: it knows where that lies. Else the user is asked for uv, or for the index
   of the CPU wheels (TORCH_INDEX).

Everything else is then installed with torch pinned to what is there. Standard library only, run by
any Python from 3.10 on: `python3 ci/setup.py`. Exit code 2 and one line when it cannot go on.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
EXTRAS = "eval,dev"
TORCH = "torch==2.13.0"
"""What is installed where there is no torch yet; the project itself takes any from its lower bound on."""

INSTALL = ("install", "--no-compile")
"""Most modules of these packages are never imported, so Python compiles those that are when they are."""

SHOWN = ("Downloading ", "Installing collected packages")
"""The lines of pip that say how far it is."""

OLDEST_PYTHON = (3, 10)
OLDEST_PIP = (23, 0)
"""The first pip whose `--dry-run --report` is complete."""


class SetupError(Exception):
    """The set-up cannot go on; the message is one line that says what to do."""


@dataclass(frozen=True)
class Plan:
    """What to do about the venv and about torch.

    Attributes:
        create: make the venv; else adopt the one that is there.
        inherit: let the venv see the base interpreter's packages, for its torch.
        install_torch: install torch before everything else.
        check_for_cuda: look first whether that would pull CUDA packages.
    """

    create: bool
    inherit: bool
    install_torch: bool
    check_for_cuda: bool


def decide(*, venv_exists: bool, venv_torch: str | None, base_torch: str | None, driver: bool, index: str) -> Plan:
    """Settle what to do from what is there.

    Args:
        venv_exists: a working `.venv` is there already.
        venv_torch: the version of the torch that it sees, or None.
        base_torch: the version of the base interpreter's torch, or None.
        driver: this machine has an NVIDIA driver.
        index: the index that the user named for torch, or empty.
    """
    if venv_exists:
        install = venv_torch is None
        return Plan(create=False, inherit=False, install_torch=install, check_for_cuda=install and not driver)
    if base_torch is not None and not index:
        return Plan(create=True, inherit=True, install_torch=False, check_for_cuda=False)
    return Plan(create=True, inherit=False, install_torch=True, check_for_cuda=not driver)


def cuda_packages(report: dict[str, object]) -> list[str]:
    """Name the CUDA packages in pip's installation report (its format, version 1)."""
    entries = report.get("install", [])
    if not isinstance(entries, list):
        return []
    names = sorted(str(entry["metadata"]["name"]).lower() for entry in entries)
    return [name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "triton"]


def torch_arguments(index: str) -> list[str]:
    """The arguments of `pip install` for torch."""
    return [TORCH, *(["--index-url", index] if index else [])]


def version_tuple(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def oldest_torch(pyproject: str) -> tuple[int, ...]:
    """The project's own lower bound on torch, read from the text of pyproject.toml."""
    match = re.search(r'"torch>=([\d.]+)"', pyproject)
    if match is None:
        raise SetupError("got no 'torch>=...' among the dependencies in pyproject.toml, expected one")
    return version_tuple(match.group(1))


def check_torch(installed: str, oldest: tuple[int, ...]) -> None:
    """Refuse a torch that is too old, rather than replace somebody's build.

    Raises:
        SetupError: it is older than `oldest`.
    """
    if version_tuple(installed) < oldest:
        wanted = ".".join(map(str, oldest))
        raise SetupError(
            f"got torch {installed}, expected {wanted} or newer: upgrade it, or start from another "
            "interpreter (make PYTHON=...); it is not replaced for you, because its build is your choice"
        )


def has_nvidia_driver() -> bool:
    """Whether this machine can use a CUDA build of torch."""
    return (
        Path("/proc/driver/nvidia/version").exists()
        or shutil.which("nvidia-smi") is not None
        or ctypes.util.find_library("cuda") is not None
    )


def installed_version(python: str, package: str) -> str | None:
    """The version of a package that an interpreter sees, or None; nothing is imported."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def venv_python() -> str:
    """The venv's interpreter."""
    return str(VENV / "bin" / "python")


def venv_works() -> bool:
    """Whether `.venv` is there, with an interpreter and pip."""
    if not Path(venv_python()).exists():
        return False
    return installed_version(venv_python(), "pip") is not None


def create_venv(*, inherit: bool) -> None:
    """Make `.venv`; with `inherit`, see what this interpreter sees.

    A venv made from within a virtual environment inherits from the system below it, so the
    environment's own packages are added by a path file.

    Raises:
        SetupError: the interpreter cannot make one.
    """
    options = ["--system-site-packages"] if inherit else []
    command = [sys.executable, "-m", "venv", *options, str(VENV)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"{sys.executable} cannot make a virtual environment: install its venv module (python3-venv)")
    if inherit and sys.prefix != sys.base_prefix:
        folders = [path for path in sys.path if path.endswith("site-packages")]
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        target = subprocess.run([venv_python(), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        (Path(target) / "inherited.pth").write_text("\n".join(folders) + "\n", encoding="utf-8")


def say(line: str) -> None:
    """Print what is being done, at once."""
    print(f"setup: {line}", flush=True)


def pip(*arguments: str) -> None:
    """Run the venv's pip, and show what it downloads and installs.

    Raises:
        SetupError: it failed; what it said is on stderr.
    """
    command = [venv_python(), "-m", "pip", "--disable-pip-version-check", "--no-color", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if line.strip().startswith(SHOWN):
                say(f"  {line.strip()[:100]}")
    if process.returncode != 0:
        raise SetupError(f"pip {' '.join(arguments)} failed, see above; can the package index be reached?")


def install_torch(index: str, *, cpu_only: bool) -> None:
    """Install torch, by uv's CPU build where pip's would bring CUDA packages that nothing here can use.

    Raises:
        SetupError: it cannot be installed, or only with CUDA packages.
    """
    arguments = torch_arguments(index)
    found = would_pull_cuda(arguments) if cpu_only else []
    if not found:
        say(f"installing {TORCH}, the largest package (CPU build about 200 MB)")
        pip(*INSTALL, *arguments)
        return
    uv = shutil.which("uv")
    if uv is None or index:
        raise SetupError(
            f"no NVIDIA driver here, but {TORCH} would pull {len(found)} CUDA packages ({found[0]}, ...): run "
            "`pip install uv` first, which knows where the CPU build lies, or give the index of the CPU wheels that "
            "PyTorch's start page names, as in `make test TORCH_INDEX=...`"
        )
    say(f"installing {TORCH} by uv, CPU build")
    command = [uv, "pip", "install", "--python", venv_python(), "--torch-backend=cpu", TORCH]
    if subprocess.run(command, check=False, cwd=ROOT).returncode != 0:
        raise SetupError(f"{' '.join(command)} failed, see above; can the package index be reached?")


def would_pull_cuda(arguments: list[str]) -> list[str]:
    """Ask pip what it would install; returns the CUDA packages among that.

    Raises:
        SetupError: pip cannot say.
    """
    say("asking pip which build of torch it would take")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        pip("install", "--dry-run", "--report", str(path), *arguments)
        return cuda_packages(json.loads(path.read_text(encoding="utf-8")))


def install_project(torch: str) -> None:
    """Install Fusecheck, editable, with its extras and with torch pinned to what is there."""
    with tempfile.TemporaryDirectory() as folder:
        constraint = Path(folder) / "constraints.txt"
        constraint.write_text(f"torch=={torch}\n", encoding="utf-8")
        pip(*INSTALL, "--constraint", str(constraint), "--editable", f".[{EXTRAS}]")


def set_up(index: str) -> str:
    """Make or adopt the venv and install everything; return the version of torch.

    Raises:
        SetupError: it cannot go on.
    """
    if sys.version_info[:2] < OLDEST_PYTHON:
        raise SetupError(f"got Python {sys.version.split()[0]}, expected 3.10 or newer: make PYTHON=python3.12")
    exists = venv_works()
    plan = decide(
        venv_exists=exists,
        venv_torch=installed_version(venv_python(), "torch") if exists else None,
        base_torch=installed_version(sys.executable, "torch"),
        driver=has_nvidia_driver(),
        index=index,
    )
    if plan.create:
        say("making .venv" + (", which sees the packages of this interpreter and its torch" if plan.inherit else ""))
        create_venv(inherit=plan.inherit)
    if version_tuple(installed_version(venv_python(), "pip") or "") < OLDEST_PIP:
        pip("install", "--upgrade", "pip")
    if plan.install_torch:
        install_torch(index, cpu_only=plan.check_for_cuda)
    torch = installed_version(venv_python(), "torch")
    if torch is None:
        raise SetupError("torch is not there after its installation: remove .venv and try again")
    check_torch(torch, oldest_torch((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    say(f"installing Fusecheck and what it needs ({EXTRAS}); torch {torch} stays")
    install_project(torch)
    return torch


def main() -> int:
    """Run the set-up; 0, or 2 after one line on stderr."""
    try:
        torch = set_up(os.environ.get("TORCH_INDEX", ""))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    print(f"setup: .venv is ready, torch {torch}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

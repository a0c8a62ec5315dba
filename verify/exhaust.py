"""`fusecheck exhaust`: the oracle's assumptions on the chip, over every input there is.

The cast of float32 to E4M3 against the table (all 2^32 inputs); the reciprocal root (assumption A3) and the reciprocal
(A4) over all normal floats; division (A4) over every divisor significand with many dividends. What declarations may
say beyond that, exact at powers of two (`exact_pow2`), is looked at over all of them.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from fusecheck.errors import Inconclusive
from fusecheck.formats.element import E4M3
from fusecheck.interrupts import Interruption
from fusecheck.report import Verdict, make_run_dir, write_result
from fusecheck.report.places import JsonFile, RunDir

CHUNK = 2**26
BLOCK = 1024
FIRST_NORMAL, FIRST_INFINITE = 0x00800000, 0x7F800000
"""Bits of the least normal float32 and of infinity."""
DIVIDENDS = 64

ROOT_ULPS, RECIPROCAL_ULPS, DIVISION_ULPS = 2, 1, 2
"""What A3 and A4 allow, in ulps from the correctly rounded value."""

POWERS = range(-125, 127)
"""Exponents of the powers of two whose reciprocal is normal, and by which approximate division is documented."""

Compute = Callable[[Tensor], Tensor]


def chunks(first: int, last: int, device: torch.device) -> Iterator[Tensor]:
    """All int32 bit patterns from `first` to `last` - 1 (as unsigned), in pieces."""
    for start in range(first, last, CHUNK):
        bits = torch.arange(start, min(start + CHUNK, last), dtype=torch.int64, device=device)
        yield torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)


def cast_against_table(cast: Compute, bits: Iterator[Tensor]) -> dict[str, Any]:
    """Compare a cast of float32 bits with the table; NaN codes of either sign are one."""
    inputs, wrong, first = 0, 0, None
    for piece in bits:
        got = cast(piece)
        expected = E4M3.encode(piece.view(torch.float32).to(torch.float64))
        differ = (got != expected) & ~(((got & 0x7F) == 0x7F) & ((expected & 0x7F) == 0x7F))
        inputs += len(piece)
        wrong += int(differ.sum())
        if first is None and bool(differ.any()):
            at = int(torch.nonzero(differ)[0])
            first = f"{int(piece[at]) & 0xFFFFFFFF:#010x} -> {int(got[at]):#04x}, expected {int(expected[at]):#04x}"
    return {"inputs": inputs, "wrong": wrong, "first": first}


def ulps_apart(got: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Ulps of float32 from the correctly rounded value, int32, and from the exact one, float64."""
    nearest = exact.to(torch.float32)
    apart = (got.view(torch.int32) - nearest.view(torch.int32)).abs()
    _, exponent = torch.frexp(exact)
    unit = torch.ldexp(torch.ones_like(exact), (exponent - 24).clamp(min=-149))
    return apart, (got.to(torch.float64) - exact).abs() / unit


class Worst:
    """The largest errors seen of one instruction.

    Args:
        allowed: ulps from the correctly rounded value.
    """

    def __init__(self, allowed: int) -> None:
        self._allowed, self._inputs, self._most, self._exact = allowed, 0, 0, 0.0
        self._histogram: dict[int, int] = {}

    def see(self, got: Tensor, exact: Tensor) -> None:
        """Count results; those whose exact value is not a normal float32 are left out."""
        normal = (exact.abs() >= 2.0**-126) & (exact.abs() < 2.0**128 - 2.0**103)
        got, exact = got[normal], exact[normal]
        if not len(got):
            return
        apart, error = ulps_apart(got, exact)
        self._inputs += len(got)
        self._most = max(self._most, int(apart.max()))
        self._exact = max(self._exact, float(error.max()))
        values, counts = torch.unique(apart.clamp(max=9), return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            self._histogram[value] = self._histogram.get(value, 0) + count

    def record(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {
            "inputs": self._inputs,
            "worst_ulps_from_rounded": self._most,
            "worst_ulps_from_exact": round(self._exact, 4),
            "allowed": self._allowed,
            "histogram": {str(k): v for k, v in sorted(self._histogram.items())},
            "holds": bool(self._inputs) and self._most <= self._allowed,
        }


def positive_normals(device: torch.device) -> Iterator[Tensor]:
    """All positive normal float32 values."""
    return (bits.view(torch.float32) for bits in chunks(FIRST_NORMAL, FIRST_INFINITE, device))


def worst_of(compute: Compute, exact: Compute, values: Iterator[Tensor], allowed: int) -> dict[str, Any]:
    """The worst error of a function of one float32 against its float64 value."""
    worst = Worst(allowed)
    for x in values:
        worst.see(compute(x), exact(x.to(torch.float64)))
    return worst.record()


def worst_division(divide: Callable[[Tensor, Tensor], Tensor], device: torch.device, allowed: int) -> dict[str, Any]:
    """Every divisor significand at a random exponent, by random dividends."""
    worst = Worst(allowed)
    generator = torch.Generator(device=device).manual_seed(8)
    for _ in range(DIVIDENDS):
        significand = torch.arange(2**23, dtype=torch.int32, device=device)
        exponent = torch.randint(64, 191, (2**23,), generator=generator, device=device, dtype=torch.int32)
        divisor = (significand | (exponent << 23)).view(torch.float32)
        dividend = torch.randn(2**23, generator=generator, device=device)
        worst.see(divide(dividend, divisor), dividend.to(torch.float64) / divisor.to(torch.float64))
    return worst.record()


def exact_at_powers_of_two(divide: Callable[[Tensor, Tensor], Tensor], dividends: Tensor) -> dict[str, Any]:
    """Divide the dividends, float32 in [1, 2), by every power of two: exact, both signs of the exponent.

    A dividend meets every exponent that leaves the quotient normal.
    """
    inputs, wrong, first = 0, 0, None
    for exponent in POWERS:
        divisor = torch.full_like(dividends, 2.0**exponent)
        got, exact = divide(dividends, divisor), (dividends.double() * 2.0**-exponent).float()
        differ = got != exact
        inputs += len(dividends)
        wrong += int(differ.sum())
        if first is None and bool(differ.any()):
            at = int(torch.nonzero(differ)[0])
            first = f"{float(dividends[at])} / 2^{exponent} -> {float(got[at])}, expected {float(exact[at])}"
    return {"inputs": inputs, "wrong": wrong, "first": first, "holds": bool(inputs) and wrong == 0}


def significands(device: torch.device) -> Tensor:
    """All float32 values in [1, 2)."""
    return torch.arange(0x3F800000, 0x40000000, dtype=torch.int32, device=device).view(torch.float32)


class _Chip:
    """Single instructions of a GPU as functions of tensors."""

    def __init__(self, device: torch.device) -> None:
        from fusecheck.onepass import instructions

        self._device, self._kernels = device, instructions

    def cast(self, bits: Tensor) -> Tensor:
        """The codes, uint8, of float32 values given as int32 bits."""
        out = torch.empty(len(bits), dtype=torch.int16, device=self._device)
        self._kernels.cast_e4m3[_grid(bits)](bits, out, len(bits), BLOCK=BLOCK)
        return (out & 0xFF).to(torch.uint8)

    def one(self, name: str) -> Compute:
        """An instruction of one operand."""

        def compute(x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            self._kernels.one_operand[_grid(x)](x, out, len(x), ASM=f"{name} $0, $1;", BLOCK=BLOCK)
            return out

        return compute

    def two(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        """An instruction of two operands."""

        def compute(a: Tensor, b: Tensor) -> Tensor:
            out = torch.empty_like(a)
            self._kernels.two_operands[_grid(a)](a, b, out, len(a), ASM=f"{name} $0, $1, $2;", BLOCK=BLOCK)
            return out

        return compute


def _grid(x: Tensor) -> tuple[int]:
    return (-(-len(x) // BLOCK),)


def check_device(device: torch.device) -> None:
    """Refuse a device that has no such instructions.

    Raises:
        Inconclusive: no GPU of capability 8.9 or more, or no Triton.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        raise Inconclusive("no CUDA GPU with Triton here: run `fusecheck exhaust` where there is one")
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise Inconclusive(f"{torch.cuda.get_device_name(device)} has no E4M3 cast: it needs capability 8.9")


def on_chip(device: torch.device) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run every instruction over its inputs; its name, and what it showed."""
    chip = _Chip(device)
    cast = cast_against_table(chip.cast, chunks(0, 2**32, device))
    yield "cvt.rn.satfinite.e4m3x2.f32", cast | {"holds": cast["inputs"] == 2**32 and cast["wrong"] == 0}
    for asm in ("rsqrt.approx.f32", "rsqrt.approx.ftz.f32"):
        yield asm, worst_of(chip.one(asm), torch.rsqrt, positive_normals(device), ROOT_ULPS)
    for asm, allowed in (("rcp.approx.ftz.f32", RECIPROCAL_ULPS), ("rcp.rn.f32", 0)):
        yield asm, worst_of(chip.one(asm), torch.reciprocal, positive_normals(device), allowed)
    for asm, allowed in (("div.approx.ftz.f32", DIVISION_ULPS), ("div.full.f32", DIVISION_ULPS), ("div.rn.f32", 0)):
        yield asm, worst_division(chip.two(asm), device, allowed)
    reciprocal = chip.one("rcp.approx.ftz.f32")
    one = torch.ones(1, device=device)
    yield "rcp.approx.ftz.f32 of 2^n", exact_at_powers_of_two(lambda _, divisor: reciprocal(divisor), one)
    for asm in ("div.approx.ftz.f32", "div.full.f32"):
        yield f"{asm} by 2^n", exact_at_powers_of_two(chip.two(asm), significands(device))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("exhaust")(command)


def command(
    json_file: JsonFile = None,
    run_dir: RunDir = None,
) -> None:
    """Do the oracle's assumptions about casts, roots and quotients hold on this GPU, for every input?"""
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    directory = make_run_dir("exhaust", run_dir)
    console = Console(highlight=False)
    found: dict[str, dict[str, Any]] = {}
    with Interruption() as stop:
        for name, entry in on_chip(device):
            found[name] = entry
            console.out(f"{name}: {entry['inputs']:,} inputs, {_worst(entry)}")
    verdict = Verdict.of(failed=not all(entry["holds"] for entry in found.values()), complete=not stop.happened)
    seconds = round(time.monotonic() - began, 3)
    summary = {"instructions": found, "seconds": seconds, "interrupted": stop.happened}
    write_result(directory, "exhaust", verdict, summary, [], json_file)
    console.print(verdict.value)
    if verdict is not Verdict.PASS:
        raise typer.Exit(verdict.exit_code)


def _worst(entry: dict[str, Any]) -> str:
    if "wrong" in entry:
        return f"{entry['wrong']} wrong" + (f", the first: {entry['first']}" if entry["first"] else "")
    return (
        f"within {entry['worst_ulps_from_rounded']} ulp of the rounded value ({entry['allowed']} allowed), "
        f"{entry['worst_ulps_from_exact']} ulp of the exact one"
    )

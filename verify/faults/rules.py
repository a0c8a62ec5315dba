"""The formulas of the field's pass criteria, each a function of one rank's outputs; `criteria` names them."""

from __future__ import annotations

import numpy as np

from fusecheck.faults.comparison import Codes, Evidence, Floats, close, decoded, far, lattice, raw_key, ulps


def each(e: Evidence, atol: float, rtol: float) -> bool:
    """Residual and norm within tolerance."""
    ok = bool(close(e.got.residual, e.expected.residual, atol, rtol).all())
    if e.got.norm is not None and e.expected.norm is not None:
        ok = ok and bool(close(e.got.norm, e.expected.norm, atol, rtol).all())
    return ok


def both_codes(e: Evidence) -> tuple[Codes, Codes] | None:
    """The codes and what they should be, where the op returns them."""
    return None if e.got.codes is None or e.expected.codes is None else (e.got.codes, e.expected.codes)


def both_values(e: Evidence) -> tuple[Floats, Floats] | None:
    """The dequantised codes and what they should be."""
    pair = both_codes(e)
    return None if pair is None else (decoded(pair[0]) * e.scale, decoded(pair[1]) * e.scale)


def dequantised(e: Evidence, atol: float, rtol: float) -> bool:
    """The dequantised codes within tolerance."""
    values = both_values(e)
    return values is None or bool(close(*values, atol, rtol).all())


def share(e: Evidence, atol: float, rtol: float, most: float) -> bool:
    """At most so large a share of residual, norm and dequantised codes is far; NaN is not counted."""
    pairs = [(e.got.residual, e.expected.residual)]
    if e.got.norm is not None and e.expected.norm is not None:
        pairs.append((e.got.norm, e.expected.norm))
    values = both_values(e)
    pairs += [values] if values is not None else []
    return all(far(a, b, atol, rtol).mean() <= most for a, b in pairs)


def flashinfer_mnnvl(e: Evidence) -> bool:
    """FlashInfer MNNVL: tolerance, and a share of codes that may be off."""
    values = both_values(e)
    ok = each(e, 0.15, 0.05)
    if values is None:
        return ok
    with np.errstate(invalid="ignore"):
        wrong = np.abs(values[0] - values[1]) > np.maximum(0.05 * np.abs(values[1]), 0.15)
    return ok and bool(wrong.mean() <= 0.002)


def flashinfer_dynamic(e: Evidence) -> bool:
    """FlashInfer, dynamic FP8: a loose residual and one part in twenty of y."""
    ok = bool(close(e.got.residual, e.expected.residual, 0.8, 0.01).all())
    return ok and dequantised(e, 0.05 * e.scale, 0.05)


def flashinfer_bench(e: Evidence) -> bool:
    """FlashInfer --validate: half of y may be wrong."""
    ok = bool(close(e.got.residual, e.expected.residual, 0.05, 0.05).all())
    if e.got.norm is not None and e.expected.norm is not None:
        ok = ok and bool(close(e.got.norm, e.expected.norm, 0.15, 0.05).all())
    return ok and dequantised(e, 0.5, 0.5)


def code_values(e: Evidence, atol: float, rtol: float) -> bool:
    """The codes read as numbers, within tolerance."""
    pair = both_codes(e)
    return pair is None or bool(close(decoded(pair[0]), decoded(pair[1]), atol, rtol).all())


def own_codes(e: Evidence) -> bool:
    """FlashInfer, group FP8: the codes of the kernel's own norm."""
    return e.got.codes is None or e.own_codes is None or bool((e.got.codes == e.own_codes).all())


def flashinfer_contract(e: Evidence) -> bool:
    """FlashInfer, CuTe DSL: a bit-exact residual, and a norm within one ulp of its own residual."""
    ok = bool((ulps(e.got.residual, e.expected.residual, e.bits) == 0).all())
    if e.got.norm is not None and e.own_norm is not None:
        ok = ok and bool((ulps(e.got.norm, e.own_norm, e.bits) <= 1).all())
    return ok


def tensorrt_cpp(e: Evidence) -> bool:
    """TensorRT-LLM, C++: a residual within 1, all else from the own outputs."""
    ok = not far(e.got.residual, e.expected.residual, 1.0, 0.0).any()
    if e.got.norm is not None and e.own_norm is not None:
        ok = ok and not far(e.got.norm, e.own_norm, 1e-2, 0.0).any()
    if e.got.codes is not None and e.own_codes is not None:
        ok = ok and not far(decoded(e.got.codes), decoded(e.own_codes), 0.0, 0.0).any()
    return bool(ok)


def vllm_rocm(e: Evidence) -> bool:
    """On ROCm, vLLM: a few codes may be off by more than one."""
    pair = both_codes(e)
    if pair is None:
        return True
    distance = np.abs(raw_key(pair[0]) - raw_key(pair[1]))
    return bool((distance > 1).sum() <= distance.size // 100_000 + 8)


def modular(e: Evidence) -> bool:
    """Modular: codes within one, few of them off."""
    ok = bool((ulps(e.got.residual, e.expected.residual, e.bits) <= 1).all())
    pair = both_codes(e)
    if pair is None:
        return ok
    distance = np.abs(pair[0].astype(int) - pair[1].astype(int))
    return ok and bool((distance <= 1).all() and (distance > 0).mean() <= 0.05)


def cosine(e: Evidence) -> bool:
    """SGLang's kernel: the angle between the outputs."""
    ok = bool(close(e.got.residual, e.expected.residual, 1e-3, 1e-3).all())
    values = both_values(e)
    if values is None:
        return ok
    a, b = values[0].ravel(), values[1].ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return ok and (norms == 0 or bool(a @ b / norms > 0.999))


def sglang_fork(e: Evidence) -> bool:
    """A fork of SGLang: codes within two."""
    ok = bool(close(e.got.residual, e.expected.residual, 1e-2, 1e-2).all())
    if e.got.norm is not None and e.expected.norm is not None:
        ok = ok and bool(close(e.got.norm, e.expected.norm, 2e-2, 2e-2).all())
    pair = both_codes(e)
    return ok and (pair is None or bool((np.abs(lattice(pair[0]) - lattice(pair[1])) <= 2).all()))


def aiter_share(e: Evidence) -> bool:
    """AITER: a share of y may be far."""
    values = both_values(e)
    if values is None:
        return e.got.norm is None or e.expected.norm is None or mostly(e.got.norm, e.expected.norm)
    return mostly(*values)


def mostly(a: Floats, b: Floats) -> bool:
    """Fewer than one in twenty is far."""
    return bool((~close(a, b, 5e-2, 5e-2)).mean() < 0.05)


def torch_default(e: Evidence) -> bool:
    """torch.testing: its default tolerances, exact codes."""
    rtol = 1.6e-2 if e.bits == 8 else 1e-3
    return each(e, 1e-5, rtol) and code_values(e, 0.0, 0.0)


def engine(e: Evidence) -> bool:
    """TransformerEngine: near, or the two roundings of their own mean, which any two neighbouring codes are."""
    pair = both_codes(e)
    if pair is None:
        return True
    a, b = decoded(pair[0]), decoded(pair[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        wrong = (np.abs(a - b) > 1e-2) & ((b == 0) | (np.abs((a - b) / b) > 1e-2))
    neighbours = np.abs(raw_key(pair[0]) - raw_key(pair[1])) <= 1
    return not bool((wrong & ~neighbours).any())


def engine_overlap(e: Evidence) -> bool:
    """TransformerEngine: only the element with the largest difference counts; a NaN is that element, and passes."""
    values = both_values(e)
    if values is None:
        return True
    a, b = values[0].ravel(), values[1].ravel()
    with np.errstate(invalid="ignore"):
        distance = np.abs(a - b)
    worst = int(np.argmax(distance))
    return not bool(distance[worst] / max(abs(b[worst]), 1e-5) > 0.125 and distance[worst] > 0.0625)


def bits_of_sum(e: Evidence) -> bool:
    """nccl-tests: equal bits."""
    return bool(((e.got.residual == e.expected.residual) | np.isnan(e.expected.residual)).all())


def backend_bench(e: Evidence) -> bool:
    """BackendBench: one per cent of everything, NaN where NaN is expected."""

    def near(a: Floats, b: Floats) -> bool:
        return bool((close(a, b, 1e-2, 1e-2) | (np.isnan(a) & np.isnan(b))).all())

    ok = near(e.got.residual, e.expected.residual)
    if e.got.norm is not None and e.expected.norm is not None:
        ok = ok and near(e.got.norm, e.expected.norm)
    pair = both_codes(e)
    return ok and (pair is None or near(decoded(pair[0]), decoded(pair[1])))


def kernel_bench(e: Evidence) -> bool:
    """KernelBench: one per cent of one output."""
    if e.got.norm is None or e.expected.norm is None:
        return dequantised(e, 1e-2, 1e-2)
    return bool(close(e.got.norm, e.expected.norm, 1e-2, 1e-2).all())


def jax(e: Evidence) -> bool:
    """JAX: ten per cent of a code, one of the rest."""
    return each(e, 1e-2, 1e-2) and code_values(e, 1e-1, 1e-1)


def deep_gemm(e: Evidence) -> bool:
    """1 - 2 <a, b> / (|a|^2 + |b|^2) < 1e-3 over the dequantised output."""
    values = both_values(e)
    if values is None:
        return True
    a, b = values
    total = float((a * a + b * b).sum())
    return total == 0 or bool(1 - 2 * float((a * b).sum()) / total < 1e-3)


def torchao(e: Evidence) -> bool:
    """Signal to quantisation noise of at least 18 dB over the dequantised output."""
    values = both_values(e)
    if values is None:
        return True
    a, b = values
    noise, signal = float(np.linalg.norm(b - a)), float(np.linalg.norm(b))
    return noise == 0 or bool(signal > 0 and 20 * np.log10(signal / noise) >= 18)

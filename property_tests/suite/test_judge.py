"""`fusecheck judge`: calls on disk, in files of one's own and as FlashInfer's logger of 0.7.4 wrote them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusecheck.property_tests.suite.command_line import run
from fusecheck.property_tests.suite.testing_ranks import EPS, HIDDEN, SCALE, TOKENS, fused, operands

DUMPS = Path(str(resources.files("fusecheck.golden"))) / "dumps"
RANKS = 2


@pytest.fixture
def judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command; its exit code and what it printed."""

    def judged(*arguments: str | Path) -> tuple[int, str]:
        code = run("judge", *arguments, "--run-dir", tmp_path / "run")
        told = capsys.readouterr()
        return code, told.out + told.err

    return judged


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two calls of two ranks, a folder each."""
    made = [tmp_path / f"rank{rank}" for rank in range(RANKS)]
    for rank, folder in enumerate(made):
        folder.mkdir()
        for name in ("first", "second"):
            partial, residual_in, gamma = operands(rank)
            residual, norm, quant = fused([operands(other)[0] for other in range(RANKS)], residual_in, gamma)
            inputs = {"partial": partial, "residual_in": residual_in, "gamma": gamma, "scale": torch.tensor([SCALE])}
            outputs = {"residual": residual, "norm": norm, "quant": quant}
            save_file(inputs | outputs, folder / f"{name}.safetensors", {"eps": str(EPS)})
    return made


def change(path: Path, **tensors: torch.Tensor) -> None:
    """Write a file again with other tensors."""
    save_file(load_file(path) | tensors, path, {"eps": str(EPS)})


def test_calls_in_folders_of_one_rank_each_are_judged(
    judge: Callable[..., tuple[int, str]], folders: list[Path], tmp_path: Path
) -> None:
    elements = 2 * RANKS * 3 * TOKENS * HIDDEN
    code, said = judge(*folders)
    assert (code, said.splitlines()[0].split(", judged")[0]) == (0, f"pass: 2 calls of 2 ranks, {elements:,} elements")
    code, said = judge(tmp_path, "--dataflow", "trtllm-fp32")
    assert (code, "is missing for rank 2" in said) == (2, True)  # the folder of the first run lies there too
    shutil.rmtree(tmp_path / "run")
    above = tmp_path / "both"
    above.mkdir()
    for folder in folders:
        folder.rename(above / folder.name)
    assert judge(above, "--dataflow", "trtllm-fp32")[0] == 0
    record = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert (record["command"], record["verdict"], record["summary"]["elements"]) == ("judge", "pass", elements)


def test_a_wrong_code_on_one_rank_is_a_finding_with_call_and_rank(
    judge: Callable[..., tuple[int, str]], folders: list[Path]
) -> None:
    quant = fused([operands(rank)[0] for rank in range(RANKS)], *operands(0)[1:])[2]
    quant.view(torch.uint8)[3, 5] ^= 1
    change(folders[1] / "second.safetensors", quant=quant)
    code, said = judge(*folders, "--dataflow", "trtllm-fp32")
    assert code == 1
    assert said.startswith("second rank 1: quant: element[3,5] y/scale in [")


def test_a_file_says_which_quantiser_made_its_scales(judge: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    partial, residual_in, gamma = operands(0)
    residual, norm, _ = fused([partial], residual_in, gamma)
    scales = norm.float().abs().amax(-1, keepdim=True) / 448
    tensors = {"partial": partial, "residual_in": residual_in, "gamma": gamma, "residual": residual, "norm": norm}
    tensors |= {"quant": (norm.float() / scales).to(torch.float8_e4m3fn), "scale_out": scales}
    file, told = tmp_path / "rank0" / "only.safetensors", {"eps": str(EPS), "quantiser": "dynamic-fp8"}
    file.parent.mkdir()
    save_file(tensors, file, told)
    assert judge(file.parent)[0] == 0
    save_file(tensors | {"scale_out": scales.roll(1, 0)}, file, told)
    code, said = judge(file.parent)
    assert (code, said.startswith("only rank 0: scale: element[0,0] ")) == (1, True)
    save_file(tensors, file, told | {"quantiser": "int8"})
    assert "only.safetensors: quantiser='int8', expected one of" in judge(file.parent)[1]


@pytest.mark.parametrize("form", ["flashinfer-0.7.4", "flashinfer-0.7.4-safetensors"])
def test_what_flashinfers_logger_wrote_is_judged_without_flashinfer(
    judge: Callable[..., tuple[int, str]], form: str
) -> None:
    code, said = judge(DUMPS / form)
    assert (code, said.splitlines()[0]) == (0, "pass: 2 calls of 2 ranks, 512 elements, judged by flashinfer-fp32")
    # At two ranks both accumulations add alike.
    assert judge(DUMPS / form, "--dataflow", "flashinfer")[0] == 0
    code, said = judge(DUMPS / form, "--dataflow", "vllm-native")
    assert code == 1
    assert "call0000 rank 0: norm: element[" in said


@pytest.fixture
def dumps(tmp_path: Path) -> Path:
    """A copy of the dumps, to be spoilt."""
    return Path(shutil.copytree(DUMPS / "flashinfer-0.7.4", tmp_path / "dumps"))


def test_a_dump_that_is_cut_short_or_lacks_a_rank_is_named(judge: Callable[..., tuple[int, str]], dumps: Path) -> None:
    fusion = sorted(dumps.glob("*_allreduce_fusion_call0002"))
    whole = (fusion[0] / "inputs.pt").read_bytes()
    (fusion[0] / "inputs.pt").write_bytes(whole[: len(whole) // 2])
    code, said = judge(dumps)
    assert (code, "inputs.pt is cut short or no file of tensors" in said) == (2, True), said
    (fusion[0] / "inputs.pt").write_bytes(b"\x80\x02c__builtin__\neval\n.")
    assert judge(dumps)[0] == 2
    (fusion[0] / "inputs.pt").write_bytes(whole)
    (fusion[0] / "metadata.jsonl").write_text('{"function_name": "allreduce')
    assert "metadata.jsonl is cut short; dump again" in judge(dumps)[1]
    shutil.rmtree(fusion[0])
    assert "is missing for rank 0" in judge(dumps)[1]
    shutil.rmtree(next(dumps.glob("*_create_allreduce_fusion_workspace_call0001")))
    assert "made no workspace that was dumped, so its rank is unknown" in judge(dumps)[1]


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (lambda folder: (folder / "second.safetensors").unlink(), 2, "call second of rank 0"),
        (lambda folder: (folder / "first.safetensors").write_bytes(b"x" * 40), 2, "no readable safetensors file"),
        (
            lambda folder: change(folder / "first.safetensors", weights=torch.ones(2)),
            2,
            "holds a tensor 'weights', expected of: partial, residual_in",
        ),
        (
            lambda folder: change(folder / "first.safetensors", partial=torch.ones(2, 8).bfloat16()),
            2,
            "partials[1] has shape [2, 8], expected [6, 256]",
        ),
        (lambda folder: [path.unlink() for path in folder.parent.glob("rank*/*")], 3, "nothing to judge"),
    ],
    ids=["call missing", "no safetensors", "unknown tensor", "shapes differ", "nothing there"],
)
def test_broken_files_are_refused_in_one_line(
    judge: Callable[..., tuple[int, str]], folders: list[Path], spoil: Callable[[Path], object], code: int, message: str
) -> None:
    spoil(folders[1])
    got, said = judge(*folders)
    assert (got, message in said, len(said.strip().splitlines())) == (code, True, 1), said

"""The command line: one sub-command per question, and the mapping of errors to exit codes."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

import fusecheck
from fusecheck.commands import Commands
from fusecheck.errors import Inconclusive, UsageError
from fusecheck.manual import page_width
from fusecheck.ranks.mpi import enter

BY_CTRL_C = 130
"""What typer makes of a KeyboardInterrupt, from some version on."""

app = typer.Typer(
    name="fusecheck",
    cls=Commands,
    help="Decide whether a fused AllReduce + residual + RMSNorm + FP8 kernel may replace the ops it fuses.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help folds to any width; panels cut their text off
    context_settings={"help_option_names": ["-h", "--help"], "terminal_width": page_width()},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"fusecheck {fusecheck.__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def main() -> None:
    """Run the command line; errors become one line and an exit code."""
    try:
        enter()  # under mpirun only rank 0 goes on from here
        code = app(prog_name="fusecheck", standalone_mode=False) or 0
        if code == BY_CTRL_C:
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted", 3)
    except Exception as error:
        message, code = _told(error)
        if not message:
            raise
        _complain(message, code)


def _told(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code; nothing of one that is ours."""
    if isinstance(error, (UsageError, Inconclusive)):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("fusecheck"):
        return f"{error.name} is not installed here, and this command needs it{_extra(error.name)}", 3
    if isinstance(error, RecursionError) and _raised_in(error).parent.name == "json":
        return "a JSON text is nested too deeply to be one of Fusecheck's; give the file that it wrote", 2
    if hasattr(error, "format_message"):  # what typer raises for wrong options, whichever click it carries
        return f"{error.format_message()} Try --help.", 2
    return "", 1


def _raised_in(error: Exception) -> Path:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename)


_EXTRAS = {
    **dict.fromkeys(("pytest", "hypothesis", "xdist"), "tests"),
    **dict.fromkeys(("lm_eval", "transformers", "tokenizers", "accelerate"), "eval"),
    "matplotlib": "latency",
    "mpi4py": "mpi",
    "flashinfer": "flashinfer",
    "tensorrt_llm": "trtllm",
}
"""Which of our extras brings a package, by its import name."""


def _extra(module: str) -> str:
    extra = _EXTRAS.get(module.partition(".")[0])
    return f"; pip install 'fusecheck[{extra}]'" if extra else ""


def _complain(message: str, exit_code: int) -> NoReturn:
    print(f"fusecheck: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(exit_code)

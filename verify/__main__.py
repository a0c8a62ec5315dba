"""Where the program starts: whatever ends it, Ctrl-C in an import or a full disk behind stdout, is said in one line."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from fusecheck import interrupts


def main() -> None:
    """Run the command line and end the process with its exit code."""
    noted = interrupts.Noted()
    if interrupts.raises():
        signal.signal(signal.SIGINT, noted)
    try:
        from fusecheck.cli import main as command_line

        command_line()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
        _end("", code)
    except BaseException as error:
        if noted.happened or isinstance(error, KeyboardInterrupt):
            _end("interrupted", 3)
        if not isinstance(error, OSError) or _takes_more(1):
            raise
        _end(f"stdout cannot be written ({error.strerror}); what a run has found is in its --run-dir", 2)


def _takes_more(descriptor: int) -> bool:
    """Whether a file still takes what is written, by trying."""
    try:
        os.write(descriptor, b"\n")
    except OSError:
        return False
    return True


def _end(message: str, code: int) -> NoReturn:
    """Say the last line and leave. From here on Ctrl-C is late: ranks are being sent home, and the record is written.

    Raises:
        SystemExit: always.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except OSError as error:
        message = message or f"stdout cannot be written ({error.strerror})"
        code = code or 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python does not try again, and complain, at its end
    if message:
        print(f"fusecheck: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

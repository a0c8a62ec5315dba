"""What a run leaves behind: its verdict, `result.json`, JUnit, a page, and the environment it ran in."""

from verify.report.interruption import Interruption
from verify.report.result import Verdict, environment, make_run_dir, write_markdown, write_result

__all__ = ["Interruption", "Verdict", "environment", "make_run_dir", "write_markdown", "write_result"]

"""What a run leaves behind: its verdict, `result.json`, and the environment it ran in."""

from verify.report.result import Verdict, environment, make_run_dir, write_result

__all__ = ["Verdict", "environment", "make_run_dir", "write_result"]

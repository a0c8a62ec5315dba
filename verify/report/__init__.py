"""What a run leaves behind: its verdict, `result.json`, JUnit, a page, and the environment it ran in."""

from fusecheck.report.result import Verdict, environment, make_run_dir, write_markdown, write_result

__all__ = ["Verdict", "environment", "make_run_dir", "write_markdown", "write_result"]

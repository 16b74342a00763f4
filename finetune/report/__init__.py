"""What the user looks at first: the page of a run, one HTML file that needs nothing else."""

from finetune.report.page import write_report

__all__ = ["write_report"]

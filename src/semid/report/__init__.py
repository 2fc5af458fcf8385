"""Diagnosing tokenizers and drawing what was found: pages, tables, JSON."""

from semid.report.compare import Comparison, compare
from semid.report.diagnose import diagnose
from semid.report.diagnosis import Diagnosis

__all__ = ["Comparison", "Diagnosis", "compare", "diagnose"]

"""Diagnosing tokenizers, and their results as pages, tables and JSON."""

from semid.report import pages as pages  # registers the pages with the results they show
from semid.report.audit import Audit, audit
from semid.report.compare import compare
from semid.report.diagnose import diagnose
from semid.report.results import Comparison, Diagnosis

__all__ = ["Audit", "Comparison", "Diagnosis", "audit", "compare", "diagnose"]

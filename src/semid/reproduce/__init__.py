"""The papers' tables and figures from recipes: runs, a ledger of results, claims and pages."""

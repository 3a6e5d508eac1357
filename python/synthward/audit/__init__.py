"""Audits: what an attacker achieves against a run, beside what the run claims (docs/audit.md)."""

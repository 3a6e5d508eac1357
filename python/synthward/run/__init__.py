"""Runs: fitting a generator to records under a budget, and sampling cohorts from it."""

from synthward.run.fit import FitOptions as FitOptions
from synthward.run.fit import fit_run as fit_run
from synthward.run.folder import RunFolder as RunFolder
from synthward.run.sampling import sample_run as sample_run

"""Evaluation of a synthetic table: marginals and pairs, utility of classifiers, copies.

Everything here that is given real records computes figures that the privacy budget does not pay for. They
are for the custodian of the records; a report made for release leaves them out.
"""

from synthward.evaluate.auroc import Interval, auroc
from synthward.evaluate.binning import NUMERIC_BINS, BinnedTable, bin_records
from synthward.evaluate.copies import CopyCheck, check_copies
from synthward.evaluate.evaluation import evaluate_records
from synthward.evaluate.marginals import PairTV, one_way_tv, two_way_tv
from synthward.evaluate.result import RELEASABLE_ROWS, Comparison, EvaluationResult
from synthward.evaluate.utility import Utility, measure_utility

__all__ = [
    "NUMERIC_BINS",
    "RELEASABLE_ROWS",
    "BinnedTable",
    "Comparison",
    "CopyCheck",
    "EvaluationResult",
    "Interval",
    "PairTV",
    "Utility",
    "auroc",
    "bin_records",
    "check_copies",
    "evaluate_records",
    "measure_utility",
    "one_way_tv",
    "two_way_tv",
]

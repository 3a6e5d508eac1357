"""Whether an encoder can have been fitted to some records: its noisy counts are held against theirs.

Nothing is kept for this. A hash of the records beside a released encoder would let whoever knows all records but one
try out what the last one is; the noisy counts are released anyhow, and paid for. So records are told apart as far as
that noise allows, and no further.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri

from synthward.data import Records
from synthward.encoding.columns import LEAF_DEVIATIONS, SHARE_FLOOR, ContinuousCoder
from synthward.encoding.encoder import TableEncoder, histograms_of, is_token_column

# Share of encoders of these very records that are taken for those of others.
FALSE_ALARM = 1e-9
# The query rounds values to a grid, and its noise to it again (`QueryMechanism.gaussian_vector`): shares of its
# sensitivity.
_ROUNDING, _REACH = 2.0**-12, 1.0 + 2.0**-11
# Shares are differences of cumulated ones: off by less than this.
_CLOSE = 1e-12


def may_be_of(encoder: TableEncoder, records: Records, noise_multiplier: float) -> bool:
    """False where a count of `records` is further from the encoder's than noise takes one of all in `FALSE_ALARM`.

    Nobody paid for the answer: it is for the records' custodian alone.

    Args:
        noise_multiplier: of the query that `encoder` was fitted by.
    """
    histograms = histograms_of(records)
    sensitivity, size = math.sqrt(len(histograms)), sum(map(len, histograms))
    std = noise_multiplier * sensitivity
    far = -float(ndtri(FALSE_ALARM / (2 * size))) * std * _REACH + _ROUNDING * sensitivity
    columns = {column.name: column for column in records.schema.modelled}
    counts = dict(zip(columns, histograms, strict=False))
    # The encoder says one where the noisy number was less: that is no further from any number of units.
    fits = abs(float(histograms[-1][0]) - encoder.units) <= far
    for coder in encoder.coders:
        column, exact = columns[coder.name], counts[coder.name]
        if isinstance(coder, ContinuousCoder):
            fits &= _fits_shares(coder.cdf, exact[1:], far, LEAF_DEVIATIONS * std)
            continue
        is_flag = not is_token_column(column)
        floor = 0.0 if is_flag or column.kind in ("ordinal", "integer") else LEAF_DEVIATIONS * std
        # What can not be missing has no count of it; whether a number is there, that alone, and a sum of many bins.
        of = slice(0 if column.missing else 1, 1 if is_flag else None)
        fits &= _fits_levels(coder.leaf[of], coder.group[of], exact[of], far, floor)
    return fits


def _fits_levels(leaf: np.ndarray, group: np.ndarray, exact: np.ndarray, far: float, floor: float) -> bool:
    """Levels that stand above the floor weigh their noisy counts; those of a token in which none does, one each."""
    is_empty = np.bincount(group, weights=leaf != 1.0) == 0
    is_kept = (leaf > 0.0) & ~is_empty[group]
    # A token of a level that was counted as one looks empty, too.
    fits = np.where(is_kept, np.abs(leaf - exact) <= far, exact <= max(floor, 1.0) + far)
    return bool(fits.all())


def _fits_shares(cdf: np.ndarray, exact: np.ndarray, far: float, floor: float) -> bool:
    """Of bins that stand above the floor there are shares alone: with some total, all of them must fit."""
    shares = np.diff(cdf) * (1.0 + SHARE_FLOOR) - SHARE_FLOOR / len(exact)
    # Where no bin did, all have one share; they fit then with a total of as many floors.
    is_kept = shares > _CLOSE
    kept, shares = exact[is_kept], shares[is_kept]
    far += _CLOSE * float(exact.sum())
    least = max(float(((kept - far) / shares).max()), float(kept.sum()) - len(kept) * far)
    most = min(float(((kept + far) / shares).min()), float(kept.sum()) + len(kept) * far)
    return least <= most and bool((exact[~is_kept] <= floor + far).all())

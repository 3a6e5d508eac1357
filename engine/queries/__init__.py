"""Charged queries about records: each answer is in the ledger before it exists.

Arrays of coded values and the units that their rows belong to go in. How far one unit can move an answer is computed
here, for a unit with any number of rows. Sums are whole numbers and so is the noise, from the purpose "queries" of the
key schedule.
"""

from synthward.engine.queries.bounds import Bounds as Bounds
from synthward.engine.queries.bounds import find_bounds as find_bounds
from synthward.engine.queries.counts import Count as Count
from synthward.engine.queries.counts import count_rows as count_rows
from synthward.engine.queries.counts import count_units as count_units
from synthward.engine.queries.discovery import Categories as Categories
from synthward.engine.queries.discovery import discover_categories as discover_categories
from synthward.engine.queries.marginals import Marginals as Marginals
from synthward.engine.queries.marginals import count_marginals as count_marginals
from synthward.engine.queries.mechanism import QueryMechanism as QueryMechanism
from synthward.engine.queries.quantiles import Quantiles as Quantiles
from synthward.engine.queries.quantiles import find_quantiles as find_quantiles
from synthward.engine.queries.units import Units as Units

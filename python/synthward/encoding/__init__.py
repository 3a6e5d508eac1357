"""From typed records to tokens and normal scores, learned from one charged query only."""

from synthward.encoding.columns import ContinuousCoder, TokenCoder
from synthward.encoding.encoder import Encoded, TableEncoder
from synthward.encoding.layout import Layout

__all__ = ["ContinuousCoder", "Encoded", "Layout", "TableEncoder", "TokenCoder"]

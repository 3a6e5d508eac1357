"""The declared schema of a table: what a generator may know about records without reading them."""

from synthward.schema.column import Column as Column
from synthward.schema.load import load_schema as load_schema
from synthward.schema.model import Condition as Condition
from synthward.schema.model import ImpliesConstraint as ImpliesConstraint
from synthward.schema.model import LeConstraint as LeConstraint
from synthward.schema.model import Schema as Schema

"""Records in and out: typed reading, constraints, and cohorts written in constant memory."""

from synthward.data.arrow import arrow_schema as arrow_schema
from synthward.data.arrow import to_arrow as to_arrow
from synthward.data.constraints import check_constraints as check_constraints
from synthward.data.constraints import enforce_constraints as enforce_constraints
from synthward.data.dataset import DatasetWriter as DatasetWriter
from synthward.data.draft import draft_schema as draft_schema
from synthward.data.manifest import Layout as Layout
from synthward.data.manifest import PartRecord as PartRecord
from synthward.data.manifest import check_dataset as check_dataset
from synthward.data.reader import read_records as read_records
from synthward.data.records import IngestReport as IngestReport
from synthward.data.records import Records as Records
from synthward.data.records import split_records as split_records
from synthward.data.writer import CohortWriter as CohortWriter

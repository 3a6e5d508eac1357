"""Drafts a schema from a table, for a person to edit. The draft reads the data, so it is not private."""

from __future__ import annotations

import datetime as dt
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from synthward.codes import icd9
from synthward.data.source import Source
from synthward.engine.errors import DataError
from synthward.schema.toml import toml_key, toml_value

#: Text that a draft takes for a missing value where it finds it.
_MISSING_WORDS = ("?", "NA", "N/A", "NaN", "nan", "NULL", "null")
_MAX_CATEGORIES = 1000
_MAX_DISTINCT = 10_000
_ID_NAME = re.compile(r"(^|_)(id|nbr|number|key|uuid|mrn|no)$", re.IGNORECASE)
_UNIT_NAME = re.compile(r"patient|person|subject|member|pat_|mrn", re.IGNORECASE)
_CODED_NAME = re.compile(r"(^|_)(id|code|type|status|class|flag)(_|$)", re.IGNORECASE)
_ICD_NAME = re.compile(r"diag|icd|(^|_)dx", re.IGNORECASE)
_BOOLEAN_PAIRS = ({"true", "false"}, {"yes", "no"}, {"y", "n"}, {"t", "f"}, {"0", "1"})

_HEADER = """\
# A DRAFT, made by looking at the records in {file}.
#
# This draft is NOT private. Its bounds, categories and missing-value marks were read off the records: the
# largest value may belong to one person, a rare category may name one. A generator's privacy guarantee holds
# only if what the schema says is public knowledge. So before any use, a person must edit this file: - replace
# every min and max by bounds known from outside (a data dictionary, physiology, a calendar); - replace every
# list of categories by the published code list, or a shorter list with other = "Other"; - check each kind,
# name the unit (the column that identifies a person) and the label; - give ids kind = "id", and set exclude =
# true where a column is not to be modelled. Then delete this comment.
"""


@dataclass
class _Seen:
    """What a draft notes of one column while it reads."""

    name: str
    rows: int = 0
    missing: int = 0
    missing_words: set[str] = field(default_factory=set)
    distinct: dict[str, None] | None = field(default_factory=dict)  # None: too many to keep
    repeated: bool = False
    type: pa.DataType | None = None
    is_number: bool = True
    is_date: bool = True
    low: float = math.inf
    high: float = -math.inf
    decimals: int = 0
    first_date: dt.datetime | None = None
    last_date: dt.datetime | None = None


def draft_schema(path: Path | str) -> tuple[str, list[str]]:
    """A schema file's text for the table, and warnings (one line each) about what a person must look at.

    The text loads with `load_schema`, and reading the same table with it clips nothing. Raises DataError for
    a file that cannot be read or has no rows.
    """
    source = Source(path)
    seen = {name: _Seen(name) for name in source.names}
    rows = 0
    for batch in source.batches(source.names):
        rows += batch.num_rows
        for name, column in seen.items():
            _look(column, batch.column(name))
    if rows == 0:
        raise DataError(f"{source.path}: the file has no rows")
    warnings = [
        "this draft looked at the records and is not private: a person must replace its bounds and "
        "categories by public ones before use"
    ]
    tables = [_draft_column(column, rows, warnings) for column in seen.values()]
    if not any("exclude" not in table and table["kind"] != "id" for table in tables):
        warnings.append("no column looks fit to model: all are ids or free text")
    words = sorted({word for column in seen.values() for word in column.missing_words} - {""})
    lines = [_HEADER.format(file=source.path.name), "version = 1", f"name = {toml_value(_stem(source.path))}"]
    lines += _unit_lines(seen)
    lines += [f"missing_values = {toml_value(['', *words])}"]
    for column, table in zip(seen.values(), tables, strict=True):
        lines += ["", f"[columns.{toml_key(column.name)}]"]
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n", warnings


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _unit_lines(seen: dict[str, _Seen]) -> list[str]:
    guesses = [name for name, column in seen.items() if _looks_like_id(column) and _UNIT_NAME.search(name)]
    note = "the person to protect; without it every row is a person of its own"
    lines = [f'# unit = "..."    # the id column of {note}']
    if guesses:
        lines = [f"# unit = {toml_value(guesses[0])}    # a guess: {note}"]
    return [*lines, '# label = "..."   # the outcome, and label_positive = "..."']


def _look(seen: _Seen, values: pa.Array) -> None:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    seen.type = values.type
    seen.rows += len(values)
    texts = _texts(values)
    words = pa.array(["", *_MISSING_WORDS], pa.string())
    absent = pc.or_kleene(pc.is_null(texts), pc.is_in(texts, value_set=words))
    if (count := pc.sum(absent).as_py() or 0) > 0:
        seen.missing += count
        found = pc.unique(pc.drop_null(pc.filter(texts, absent))).to_pylist()
        seen.missing_words |= set(found)
    texts = pc.filter(texts, pc.invert(absent))
    counts = pc.value_counts(texts)
    uniques = counts.field("values")
    seen.repeated |= len(uniques) < len(texts)
    _keep_distinct(seen, uniques)
    if len(uniques):
        _look_at_numbers(seen, uniques)
        _look_at_dates(seen, uniques)


def _texts(values: pa.Array) -> pa.Array:
    if pa.types.is_floating(values.type):
        # As the reader will hold them, so that bounds are exact.
        values = values.cast(pa.float64())
    try:
        return pc.utf8_trim_whitespace(values.cast(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pc.if_else(
            pc.is_valid(values), pa.scalar("(" + str(values.type) + ")"), pa.scalar(None, pa.string())
        )


def _keep_distinct(seen: _Seen, uniques: pa.Array) -> None:
    if seen.distinct is None:
        return
    before = len(seen.distinct)
    seen.distinct.update(dict.fromkeys(uniques.to_pylist()))
    seen.repeated |= len(seen.distinct) < before + len(uniques)
    if len(seen.distinct) > _MAX_DISTINCT:
        seen.distinct = None


def _look_at_numbers(seen: _Seen, uniques: pa.Array) -> None:
    if not seen.is_number:
        return
    try:
        numbers = uniques.cast(pa.float64())
    except pa.ArrowInvalid:
        seen.is_number = False
        return
    bounds = pc.min_max(numbers)
    low, high = bounds["min"].as_py(), bounds["max"].as_py()
    if not (math.isfinite(low) and math.isfinite(high)) or pc.any(pc.is_nan(numbers)).as_py():
        seen.is_number = False
        return
    seen.low, seen.high = min(seen.low, low), max(seen.high, high)
    if pc.any(pc.match_substring_regex(uniques, "[eE]")).as_py():
        seen.decimals = 99
    fraction = pc.extract_regex(uniques, r"\.(?P<digits>[0-9]*[1-9])0*$")
    longest = pc.max(pc.utf8_length(pc.struct_field(fraction, "digits"))).as_py() or 0
    seen.decimals = max(seen.decimals, longest)


def _look_at_dates(seen: _Seen, uniques: pa.Array) -> None:
    if not seen.is_date or (seen.is_number and seen.type is not None and pa.types.is_string(seen.type)):
        seen.is_date = False
        return
    try:
        moments = pc.min_max(uniques.cast(pa.timestamp("us")))
    except pa.ArrowInvalid:
        seen.is_date = False
        return
    low, high = moments["min"].as_py(), moments["max"].as_py()
    seen.first_date = low if seen.first_date is None else min(low, seen.first_date)
    seen.last_date = high if seen.last_date is None else max(high, seen.last_date)


def _looks_like_id(seen: _Seen) -> bool:
    many = seen.distinct is None or len(seen.distinct) > max(20, 0.2 * seen.rows)
    return many and bool(_ID_NAME.search(seen.name)) and seen.missing == 0


def _draft_column(seen: _Seen, rows: int, warnings: list[str]) -> dict[str, object]:
    """The keys of one column's table."""
    table = _draft_kind(seen, rows, warnings)
    if seen.missing and table["kind"] != "id":
        table["missing"] = True
    return table


def _draft_kind(seen: _Seen, rows: int, warnings: list[str]) -> dict[str, object]:
    where = f"column '{seen.name}'"
    distinct = seen.distinct
    if seen.missing == seen.rows:
        warnings.append(f"{where}: has no value at all; excluded")
        return {"kind": "text", "exclude": True}
    if _looks_like_id(seen):
        return {"kind": "id"}
    if _ICD_NAME.search(seen.name) and distinct is not None and _are_icd9(distinct):
        return {"kind": "code", "system": "icd9", "level": "category"}
    if seen.first_date is not None and seen.last_date is not None and seen.is_date:
        return _draft_datetime(seen.first_date, seen.last_date)
    if distinct is not None and {value.lower() for value in distinct} in _BOOLEAN_PAIRS:
        return {"kind": "boolean"}
    if seen.is_number and not (
        distinct is not None and len(distinct) <= 50 and _CODED_NAME.search(seen.name)
    ):
        return _draft_number(seen, warnings)
    if distinct is not None and len(distinct) <= _MAX_CATEGORIES and (len(distinct) <= 50 or seen.repeated):
        if len(distinct) == 1:
            warnings.append(f"{where}: has the same value in every row; list the other values it could have")
        whole_floats = seen.is_number and seen.decimals == 0 and pa.types.is_floating(seen.type)
        return {"kind": "categorical", "categories": _sorted_levels(distinct, whole_floats)}
    warnings.append(f'{where}: has very many values; excluded as text (or give it kind = "id")')
    return {"kind": "text", "exclude": True}


def _are_icd9(distinct: dict[str, None]) -> bool:
    # A count of diagnoses is made of small numbers, which would be codes too.
    return any(len(text) >= 3 for text in distinct) and all(map(icd9.category_of, distinct))


def _sorted_levels(distinct: dict[str, None], whole_floats: bool) -> list[str]:
    """Levels in the order of the first number in each, then of the text."""
    texts = {str(int(float(text))) for text in distinct} if whole_floats else set(distinct)

    def order(text: str) -> tuple[float, str]:
        number = re.search(r"[0-9]+(\.[0-9]+)?", text)
        return (float(number[0]) if number else math.inf, text)

    return sorted(texts, key=order)


def _draft_datetime(low: dt.datetime, high: dt.datetime) -> dict[str, object]:
    timed = low.time() != dt.time() or high.time() != dt.time()
    if timed:
        return {
            "kind": "datetime",
            "min": low.replace(microsecond=0),
            "max": high.replace(microsecond=0) + dt.timedelta(seconds=1),
        }
    first, last = low.date(), high.date()
    return {"kind": "datetime", "min": first, "max": last if last > first else last + dt.timedelta(days=1)}


def _draft_number(seen: _Seen, warnings: list[str]) -> dict[str, object]:
    low, high = seen.low, seen.high
    if low == high:
        warnings.append(
            f"column '{seen.name}': has the same value in every row; give the bounds it could have"
        )
        high = low + 1
    whole = seen.decimals == 0 and max(abs(low), abs(high)) <= 2.0**53
    if whole:
        return {"kind": "integer", "min": int(low), "max": int(high)}
    table: dict[str, object] = {"kind": "continuous", "min": low, "max": high}
    if 0 < seen.decimals <= 6:
        table |= {
            "decimals": seen.decimals,
            "min": round(low, seen.decimals),
            "max": round(high, seen.decimals),
        }
    return table

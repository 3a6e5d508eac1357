"""ICD-9-CM diagnosis codes: three-character categories and their chapters.

The vocabulary is made by rule, so it is public: 001-999, V01-V91 and E800-E999. The rule also makes a few
categories that the classification never assigned; they cost a level and nothing else. The chapters are the 17
numeric ones of the tabular list and the two supplementary classifications (V and E).

Source: International Classification of Diseases, Ninth Revision, Clinical Modification (NCHS and CMS).
"""

from __future__ import annotations

import re
from functools import cache

_NUMERIC_CHAPTERS: tuple[tuple[int, int, str], ...] = (
    (1, 139, "infectious and parasitic diseases"),
    (140, 239, "neoplasms"),
    (240, 279, "endocrine, nutritional and metabolic diseases, and immunity disorders"),
    (280, 289, "diseases of the blood and blood-forming organs"),
    (290, 319, "mental disorders"),
    (320, 389, "diseases of the nervous system and sense organs"),
    (390, 459, "diseases of the circulatory system"),
    (460, 519, "diseases of the respiratory system"),
    (520, 579, "diseases of the digestive system"),
    (580, 629, "diseases of the genitourinary system"),
    (630, 679, "complications of pregnancy, childbirth and the puerperium"),
    (680, 709, "diseases of the skin and subcutaneous tissue"),
    (710, 739, "diseases of the musculoskeletal system and connective tissue"),
    (740, 759, "congenital anomalies"),
    (760, 779, "certain conditions originating in the perinatal period"),
    (780, 799, "symptoms, signs and ill-defined conditions"),
    (800, 999, "injury and poisoning"),
)

#: (code range, title) of each chapter, in order; `chapter_of` returns an index into it.
CHAPTERS: tuple[tuple[str, str], ...] = (
    *((f"{low:03d}-{high:03d}", title) for low, high, title in _NUMERIC_CHAPTERS),
    ("V01-V91", "factors influencing health status and contact with health services"),
    ("E800-E999", "external causes of injury and poisoning"),
)

_V_CHAPTER = len(_NUMERIC_CHAPTERS)
_E_CHAPTER = _V_CHAPTER + 1
_CODE = re.compile(r"(?P<letter>[VE]?)(?P<digits>[0-9]+)(?:\.[0-9]*)?", re.ASCII)


@cache
def categories() -> tuple[str, ...]:
    """All three-character categories in the order of the classification: numeric, V, E."""
    numeric = (f"{number:03d}" for number in range(1, 1000))
    supplementary = (f"V{number:02d}" for number in range(1, 92))
    external = (f"E{number:03d}" for number in range(800, 1000))
    return (*numeric, *supplementary, *external)


@cache
def _category_set() -> frozenset[str]:
    return frozenset(categories())


def category_of(code: str) -> str | None:
    """The category of a code, or None where the text is not an ICD-9 code of the vocabulary.

    With a dot, what stands before it is the category, padded with zeros ("8.5" is 008.5). Without one, up to
    three digits (two after V) are a category, padded ("8" is 008), and more digits are a full code written
    without its dot ("25083" is 250.83). Case and surrounding blanks do not matter.
    """
    match = _CODE.fullmatch(code.strip().upper())
    if match is None:
        return None
    letter, digits = match["letter"], match["digits"]
    width = 2 if letter == "V" else 3
    if len(digits) > width and "." in code:
        return None
    category = letter + digits[:width].zfill(width)
    return category if category in _category_set() else None


def chapter_of(category: str) -> int:
    """Index into `CHAPTERS` of a category as `category_of` gives it."""
    if category.startswith("V"):
        return _V_CHAPTER
    if category.startswith("E"):
        return _E_CHAPTER
    number = int(category)
    for index, (low, high, _) in enumerate(_NUMERIC_CHAPTERS):
        if low <= number <= high:
            return index
    raise ValueError(f"{category!r} is not an ICD-9 category")

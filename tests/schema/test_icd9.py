"""The ICD-9 vocabulary made by rule, and the categories of codes as records write them."""

from __future__ import annotations

import pytest

from synthward.codes import CHAPTERS, categories, category_of, chapter_of


def test_vocabulary_by_rule():
    assert len(categories()) == len(set(categories())) == 999 + 91 + 200
    assert categories()[0] == "001"
    assert categories()[-1] == "E999"
    assert len(CHAPTERS) == 19


@pytest.mark.parametrize(
    ("code", "category"),
    [
        ("250.83", "250"),
        ("250", "250"),
        ("25083", "250"),
        ("8", "008"),
        ("8.5", "008"),
        ("41", "041"),
        ("0389", "038"),
        ("V57.1", "V57"),
        ("V571", "V57"),
        ("v7", "V07"),
        ("E885.9", "E885"),
        ("E8859", "E885"),
        (" 428 ", "428"),
    ],
)
def test_category_of(code, category):
    assert category_of(code) == category


@pytest.mark.parametrize(
    "text", ["", "?", "0", "000", "V00", "V92", "E100", "2508.3", "I10", "12a", "1.2.3", "٤٢"]
)
def test_what_is_no_code(text):
    assert category_of(text) is None


@pytest.mark.parametrize(
    ("category", "chapter"),
    [
        ("001", 0),
        ("139", 0),
        ("140", 1),
        ("250", 2),
        ("389", 5),
        ("390", 6),
        ("999", 16),
        ("V57", 17),
        ("E800", 18),
    ],
)
def test_chapters(category, chapter):
    assert chapter_of(category) == chapter


def test_every_category_has_a_chapter_and_every_chapter_a_category():
    chapters = [chapter_of(category) for category in categories()]
    assert chapters == sorted(chapters)
    assert set(chapters) == set(range(len(CHAPTERS)))

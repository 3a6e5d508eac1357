"""Public code systems: vocabularies that are known without looking at any record."""

from synthward.codes.icd9 import CHAPTERS as CHAPTERS
from synthward.codes.icd9 import categories as categories
from synthward.codes.icd9 import category_of as category_of
from synthward.codes.icd9 import chapter_of as chapter_of

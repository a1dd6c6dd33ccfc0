"""Short texts that differ by one typo, which Jaccard similarity misses: in 5-grams it counts up to five times.

A typo is a letter too many, too few, another one, or two that changed places (Damerau 1964), in the texts as
near_duplicates.py compares them: words in lower case, joined by one space. Two texts that are one typo apart are equal
once each has lost at most one letter, so pairs are found by those forms (SymSpell's way) and none is missed.
"""

from __future__ import annotations

import polars as pl

from dataset_builders.near_duplicates import compared_words, in_blocks

SHORT = 64  # characters; in longer texts one typo leaves a Jaccard similarity of 0.8 or more
_ROWS = 1 << 14  # of texts whose forms are in memory at a time


def typo_matches(texts: pl.Series, others: pl.Series, similarity: float) -> pl.DataFrame:
    """row of `texts`, other (a row of `others`) and similarity, for short texts that are one typo apart, by rows.

    The similarity is 1 - 1 / length of the longer; below `similarity` a typo may make another word.
    """
    known = _forms(others, 0).rename({"row": "other", "words": "other_words"})
    found = [pl.DataFrame(schema={"row": pl.Int64, "other": pl.Int64, "similarity": pl.Float64})]
    for start in range(0, len(texts), _ROWS):
        met = _forms(texts.slice(start, _ROWS), start).join(known, on="form").unique(["row", "other"])
        longer = pl.max_horizontal(pl.col("words", "other_words").str.len_chars())
        met = met.with_columns(similarity=1 - 1 / longer).filter(pl.col("similarity") >= similarity)
        pairs = met.select("words", "other_words").iter_rows()
        is_typo = pl.Series([is_one_typo(*pair) for pair in pairs], dtype=pl.Boolean)
        found.append(met.filter(is_typo).select("row", "other", "similarity").sort("row", "other"))
    return pl.concat(found)


def is_one_typo(one: str, other: str) -> bool:
    """
    >>> is_one_typo("a dog", "a dig"), is_one_typo("a dog", "a dg"), is_one_typo("a dog", "a odg")
    (True, True, True)
    >>> is_one_typo("a dog", "a dog"), is_one_typo("a dog", "a god")
    (False, False)
    """
    short, long = sorted((one, other), key=len)
    place = next((place for place, letter in enumerate(short) if letter != long[place]), len(short))
    rests = short[place:], long[place:]
    if len(short) < len(long):
        return rests[0] == rests[1][1:]
    return one != other and (rests[0][1:] == rests[1][1:] or rests[0] == rests[1][1::-1] + rests[1][2:])


def _forms(texts: pl.Series, start: int) -> pl.DataFrame:
    """row, words and form (a hash) for each way to leave out at most one letter of each short text."""
    rows, words, forms = [], [], []
    for row, text in enumerate(in_blocks(texts), start):
        if len(text) < 2 * SHORT and 1 < len(text := compared_words(text)) < SHORT:
            made = {hash(text), *(hash(text[:place] + text[place + 1 :]) for place in range(len(text)))}
            rows += [row] * len(made)
            words += [text] * len(made)
            forms += made
    schema = {"row": pl.Int64, "words": pl.String, "form": pl.Int64}
    return pl.DataFrame({"row": rows, "words": words, "form": forms}, schema=schema)

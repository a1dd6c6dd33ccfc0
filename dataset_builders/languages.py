"""Languages by their ISO 639-1 codes, as the Hub writes them: mteb's code, and Snowball's stemmer where it has one."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

_TABLE = """
af afr-Latn | ar ara-Arab arabic | az aze-Latn | bg bul-Cyrl | bn ben-Beng | bs bos-Latn | ca cat-Latn catalan
cs ces-Latn czech | cy cym-Latn | da dan-Latn danish | de deu-Latn german | el ell-Grek greek | en eng-Latn english
eo epo-Latn esperanto | es spa-Latn spanish | et est-Latn estonian | eu eus-Latn basque | fa fas-Arab persian
fi fin-Latn finnish | fr fra-Latn french | ga gle-Latn irish | gl glg-Latn | gu guj-Gujr | he heb-Hebr
hi hin-Deva hindi | hr hrv-Latn | hu hun-Latn hungarian | hy hye-Armn armenian | id ind-Latn indonesian | is isl-Latn
it ita-Latn italian | ja jpn-Jpan | ka kat-Geor | kk kaz-Cyrl | km khm-Khmr | kn kan-Knda | ko kor-Kore | lo lao-Laoo
lt lit-Latn lithuanian | lv lav-Latn | mk mkd-Cyrl | ml mal-Mlym | mn mon-Cyrl | mr mar-Deva | ms msa-Latn
my mya-Mymr | ne nep-Deva nepali | nl nld-Latn dutch | no nor-Latn norwegian | pa pan-Guru | pl pol-Latn polish
pt por-Latn portuguese | ro ron-Latn romanian | ru rus-Cyrl russian | si sin-Sinh | sk slk-Latn | sl slv-Latn
sq sqi-Latn | sr srp-Cyrl serbian | st sot-Latn sesotho | sv swe-Latn swedish | sw swa-Latn | ta tam-Taml tamil
te tel-Telu | th tha-Thai | tl tgl-Latn | tr tur-Latn turkish | uk ukr-Cyrl | ur urd-Arab | uz uzb-Latn | vi vie-Latn
yi yid-Hebr yiddish | zh zho-Hans
"""
_ROWS = [entry.split() for line in _TABLE.strip().splitlines() for entry in line.split("|")]
MTEB_CODES = {code: mteb for code, mteb, *_ in _ROWS}
STEMMERS = {code: stemmer for code, _, *names in _ROWS for stemmer in names}
# bm25s's lists
STOP_WORDS = frozenset(["da", "de", "en", "es", "fr", "it", "ko", "nl", "no", "pt", "ru", "sv", "tr", "zh"])


def language_name(code: str) -> str:
    """
    >>> language_name("de")
    'German'
    """
    from mteb.languages import ISO_TO_LANGUAGE

    return ISO_TO_LANGUAGE[MTEB_CODES[code][:3]]


def _known(code: str) -> str:
    if code not in MTEB_CODES:
        raise ValueError(f"write one of the codes {', '.join(MTEB_CODES)}, or leave it out")
    return code


Language = Annotated[str, AfterValidator(_known)]

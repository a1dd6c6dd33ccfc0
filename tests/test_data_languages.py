"""Texts in scripts and languages that English rules do not fit."""

import pytest
from tiny_data import write_encoder, write_recipe, write_table

from common.cli import InputError
from common.steps import read_manifest
from dataset_builders.bm25 import tokenise
from dataset_builders.build import main
from dataset_builders.languages import MTEB_CODES, STEMMERS, STOP_WORDS, language_name

# question, the passage that answers it, and one that does not
TEXTS = {
    "zh": ("植物园几点开门？", "青岛的植物园每天九点开门。", "火车站有两条线路通往海边。"),
    "ja": ("東京タワーへの行き方", "地下鉄で東京タワーまで十分です。", "図書館は月曜日に休みます。"),
    "th": ("ร้านหนังสือเปิดกี่โมง", "ทุกวันร้านหนังสือเปิดตอนเก้าโมง", "รถไฟไปเชียงใหม่เต็มแล้ว"),
    "de": ("Welche Kündigungsfristen gelten?", "Die Kündigungsfrist beträgt drei Monate.", "Das Haus ist alt."),
    "ar": ("أين المدارس القديمة؟", "مدرسة قديمة في القاهرة", "الطعام لذيذ جدا"),
    "hi": ("हिन्दी की किताबें", "यहाँ हिन्दी की बहुत किताबें हैं", "मौसम अच्छा है"),
}


@pytest.mark.parametrize("language", TEXTS)
def test_bm25_finds_the_passage_that_shares_words(language):
    question, answer, other = ({*words} for words in tokenise(TEXTS[language], language))
    assert question & answer and not question & other
    question, answer, other = ({*words} for words in tokenise(TEXTS[language]))
    # known by the characters, whatever the language
    assert language not in ("zh", "ja", "th") or (question & answer and not question & other)


def test_words_are_pairs_of_characters_stems_and_no_stop_words():
    assert tokenise(["Python3入门的猫，猫"], "ja") == [["python3", "入门", "门的", "的猫", "猫"]]
    assert tokenise(["die Häuser der Stadt"], "de") == [["haus", "stadt"]]
    assert tokenise(["the dogs in the running"]) == tokenise(["the dogs in the running"], "en") == [["dog", "run"]]
    assert tokenise(["the dogs"], "vi") == [["the", "dogs"]], "neither Snowball nor bm25s has Vietnamese"


def test_the_table_of_languages_is_that_of_the_libraries():
    import Stemmer
    from bm25s.tokenization import _infer_stopwords

    others = {"porter", "dutch_porter"}  # older stemmers of a language that has a newer one
    assert sorted(STEMMERS.values()) == sorted({*Stemmer.algorithms()} - others)
    assert all(_infer_stopwords(code) for code in STOP_WORDS) and {*MTEB_CODES} >= STOP_WORDS
    assert all(map(language_name, MTEB_CODES)) and len(MTEB_CODES) > 60


def test_a_build_reads_the_language_and_tells_when_bm25_finds_nothing(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    write_table(folder / "train.parquet", query=["Häuser", "Hunde", "q"], positive=["ein Haus", "fena", "gilo"])
    recipe = write_recipe(tmp_path / "recipe.yaml", folder, write_encoder(tmp_path / "model"))
    flags = ["--config", str(recipe), "--output_dir", str(tmp_path / "data"), "--eval_splits", "[]"]
    with pytest.raises(InputError, match=r"'source\.language' is 'german': write one of the codes af, ar"):
        main([*flags, "--language", "german"])
    with pytest.raises(InputError):  # three rows are too few for a teacher
        main([*flags, "--language", "de", "--num_negatives", "1"])
    manifest = read_manifest(tmp_path / "data" / "candidates")
    assert manifest["warnings"] == ["bm25 finds no document for 2 of 3 queries"]
    assert "warning: bm25 finds no document for 2 of 3 queries; is source.language" in capsys.readouterr().err

"""Does the way a teacher grades in a build give the scores that the model is meant to give?

    python -m dataset_builders.build --config recipes/data/natural-questions.yaml --output_dir DIR --check_teacher 200

Batches, low precision, stored vectors and serving engines go wrong without a word: all scores zero for one merged
checkpoint, near random for another's chat template. So a sample is graded twice, by the build's own code and by plain
sentence-transformers. A hybrid has no other implementation to be compared with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import InputError
from dataset_builders.build_record import Build
from dataset_builders.calibration import check_spread
from dataset_builders.data_recipe import GradedRecipe, StsRecipe
from dataset_builders.embeddings import load_model
from dataset_builders.schema import check_finite
from dataset_builders.scores import scorer_of, write_graded
from dataset_builders.teachers import FOLD, Teacher, load_reranker, take_texts

# Of the reference scores' standard deviation: how far the build may be from the reference. bfloat16 stays below;
# scores that are random differ by about 1 in the mean.
TOLERATED = {"mean_difference": 0.05, "max_difference": 0.5}


def check_teacher(build: Build, sample: int) -> dict[str, Any]:
    """Grade `sample` pairs as the build does (batches, dtype, stored vectors) and as plain sentence-transformers
    does (float32, one pair at a time); print and return how far they are apart, in the teacher's unit.

    Raises InputError when the mean difference is more than 5 % of the reference scores' standard deviation, or the
    largest more than 50 %, and when either scorer returns NaN or the same score for all.
    """
    teacher = build.recipe.teacher
    build.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build.cache) as name:  # beside the vectors: every worker of a cluster sees it
        folder = Path(name)
        scorer, pairs = scorer_of(build, teacher), write_graded(build, folder / "graded.arrow")
        rows = np.random.default_rng(0).choice(len(pairs), min(sample, len(pairs)), replace=False)
        drawn = pairs.take(np.sort(rows))
        queries, documents = drawn["query"].to_numpy(), drawn["document"].to_numpy()
        built = scorer.scores(np.stack([queries, documents], axis=1), folder)
    texts = take_texts(scorer.queries, queries), take_texts(scorer.texts, documents)
    facts = compare_scores(built, reference_scores(teacher, *texts))
    words = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in facts.items())
    print(f"teacher {teacher.model}: {words}", flush=True)
    for name, share in TOLERATED.items():
        if facts[name] > share * facts["reference_deviation"]:
            raise InputError(
                f"teacher {teacher.model!r}: its scores are not those of the reference scorer: {name} "
                f"{facts[name]:.4g}, more than {share:.0%} of their deviation {facts['reference_deviation']:.4g} "
                f"(Spearman {facts['spearman']:.3f}); try --teacher.dtype float32 or another version of the model"
            )
    return facts


def refuse_unchecked(recipe: GradedRecipe | StsRecipe, folder: Path, sample: int) -> None:
    """Raises InputError, before anything is made, where the teacher of what comes into `folder` cannot be checked."""
    if sample < 2:
        raise InputError(f"--check_teacher {sample}: use 2 or more, to compare their spread; 200 tell enough")
    if isinstance(recipe, StsRecipe):
        raise InputError(f"--check_teacher: {folder} would be sts, which has no teacher; drop it")
    teacher = recipe.teacher
    if not isinstance(teacher, Teacher):
        raise InputError(f"--check_teacher: teacher {teacher.kind} has no reference scorer; check one that is a model")
    if FOLD in teacher.model:
        raise InputError(f"--check_teacher: {teacher.model} is several models; check one: --teacher.model NAME")


def compare_scores(built: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How far the build's scores are from the `reference`. Raises InputError when either is NaN or all the same.

    >>> compare_scores(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))["max_difference"]
    1.0
    """
    from scipy.stats import spearmanr

    for name, scores in (("build", built), ("reference", reference)):
        check_finite(scores, f"teacher scores ({name})")
        check_spread(scores, f"teacher scores ({name})")
    differences = np.abs(np.asarray(built, np.float64) - reference)
    return {
        "pairs": len(built),
        "mean_difference": float(differences.mean()),
        "max_difference": float(differences.max()),
        "reference_deviation": float(np.std(reference)),
        "spearman": float(spearmanr(built, reference).statistic),
    }


def reference_scores(teacher: Teacher, queries: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    """(n,) scores of the pairs by sentence-transformers alone: float32, one at a time, nothing cached or sorted."""
    from torch.nn import Identity
    from tqdm import tqdm

    section = teacher.model_copy(update={"dtype": "float32"})
    pairs = tqdm(list(zip(queries, texts, strict=True)), desc="reference scorer", unit=" pairs")
    if teacher.kind == "cross_encoder":
        reranker, raw = load_reranker(section), Identity()
        return np.array([reranker.predict(pair, prompt=teacher.prompt, activation_fn=raw) for pair in pairs])
    from sentence_transformers import SentenceTransformer

    encoder = load_model(SentenceTransformer, section)
    if teacher.max_seq_length:
        encoder.max_seq_length = teacher.max_seq_length
    vectors = (
        (
            encoder.encode_query(query, prompt=teacher.query_prompt),
            encoder.encode_document(text, prompt=teacher.document_prompt),
        )
        for query, text in pairs
    )
    return np.array([encoder.similarity(query, text).item() for query, text in vectors])

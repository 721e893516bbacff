# make quickstart   everything once on drawn faces: train, verify, export, recognise
# make test         the whole test suite, on two processes (JOBS=8 for more)
# make lint         ruff
# make gpu          everything that is measured and tested on a GPU, where there is one; JSON in work_dirs/gpu
# make fuzz         10,000 damaged files for all readers (DAMAGED=100000 for more), and a table of what became of them

PYTHON ?= python3
# The version the suite was last run with. Any torch >= 2.6 will do: make test TORCH=torch==2.6.0
TORCH ?= torch==2.13.0
JOBS ?= 2
DAMAGED ?= 10000
BIN := .venv/bin

.PHONY: quickstart test lint gpu fuzz clean

quickstart: .venv/installed
	$(BIN)/insightface-kprpe quickstart

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

gpu: .venv/installed-test
	$(BIN)/python -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'torch sees no GPU')"
	mkdir -p work_dirs/gpu
	$(BIN)/python benchmarks/attention.py --out work_dirs/gpu/attention.json
	$(BIN)/python benchmarks/train_gpu.py --out work_dirs/gpu/train.json
	$(BIN)/python benchmarks/dfa.py --out work_dirs/gpu/dfa.json
	$(BIN)/python benchmarks/face_analysis.py --out work_dirs/gpu/face_analysis.json
	$(BIN)/python -m pytest tests/test_feed.py

fuzz: .venv/installed-test
	$(BIN)/python tests/fuzz $(DAMAGED)

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install "$(TORCH)" --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install "$(TORCH)" --editable .[test]
	touch $@

clean:
	rm -rf .venv work_dirs

# make quickstart   everything once on drawn faces: train, verify, export, recognize
# make test         the whole test suite, on two processes (JOBS=8 for more)
# make small-pack   a small trained pack, from data that you have: see docs/small_pack.md
# make lint         ruff
# make gpu          everything that is measured and tested on a GPU, where there is one; JSON in work_dirs/gpu
# make fuzz         10,000 damaged files for all readers (DAMAGED=100000 for more), and a table of what became of them

PYTHON ?= python3
# The version the suite was last run with. Any torch >= 2.6 will do: make test TORCH=torch==2.6.0
TORCH ?= torch==2.13.0
JOBS ?= 2
DAMAGED ?= 10000
BIN := .venv/bin

# What make small-pack reads; give them on the command line, as in make small-pack FIW=/data/fiw LFW=/data/lfw
FIW ?= fiw
LFW ?= lfw
DETECTOR ?= scrfd_500m_kps.onnx
LANDMARKS ?= landmarks
RETINAFACE ?= retinaface_mobilenet0.25.pth

.PHONY: quickstart test small-pack lint gpu fuzz clean

quickstart: .venv/installed
	$(BIN)/insightface-kprpe quickstart

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

small-pack: .venv/installed
	$(BIN)/python benchmarks/small_pack.py --fiw $(FIW) --lfw $(LFW) --detector $(DETECTOR) \
		--landmarks $(LANDMARKS) --retinaface $(RETINAFACE)

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

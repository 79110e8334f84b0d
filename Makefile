# make demo     the shipped network on a photo, fine-tuned, exported, measured (demo.py)
# make check    ruff and the quick tests, under a minute
# make test     all tests
# make weights START=checkpoint PHOTOS=folder     how weights/face_ssd300.pth was made, see weights/README.md
# Each makes .venv first and installs requirements.txt there. PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/python demo.py

SEEDS = 1 2 3 4
NEGATIVES = runs/negatives.json
SETS = $(addprefix $(PHOTOS)/,masks_train.json masks_train.json webcam_train.json) $(NEGATIVES) $(NEGATIVES)

weights: $(SEEDS:%=weights-%)
	$(BIN)/python checkpoints.py $(SEEDS:%=runs/weights-%/last.pth) $(START) --shares 2 2 2 2 1 --out runs/face_ssd300.pth

$(SEEDS:%=weights-%): weights-%: $(NEGATIVES)
	$(BIN)/python train.py @recipes/weights.txt --load-from $(START) --data $(SETS) --val $(PHOTOS)/masks_val.json \
		--seed $* --out runs/weights-$*

$(NEGATIVES): .venv/installed
	$(BIN)/python data.py --data $(PHOTOS)/negatives_train.json --out runs/negatives.png --split 2 $@ runs/negatives-kept-out.json

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal -m "not slow"

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal

.venv/installed: requirements.txt
	@echo "First, once: PyTorch, OpenVINO and the rest of requirements.txt go into .venv."
	@echo "On Linux that is 5 GB on the disk, for PyTorch brings CUDA: several minutes. Each download shows its progress."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

.PHONY: demo check test weights $(SEEDS:%=weights-%)

# make demo     the shipped network on a photo, fine-tuned, exported, measured (tools.demo)
# make check    ruff and the quick tests, under a minute
# make test     all tests
# make weights PHOTOS=folder     runs/made/face_ssd300.pth, made as the shipped one. FLAGS="--device cuda" and the
#              like are handed on to train.py
# make weights-1.0 ... and weights-0.5 ...     the same at those widths
# Each makes .venv first and installs requirements.txt there. PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/python -m tools.demo

# WIDER's own photos, and nine parts in ten of those without a face. Stopped, the same line goes on.
SETS = runs/sets/negatives_train.json runs/sets/plain_train.json
WIDER = $(PHOTOS)/wider_train.json
# What the shipped networks start from is in the repository's history.
BEFORE = aa01f16

weights: runs/made/face_ssd300.pth
weights-%: runs/made/face_ssd300_%.pth ;

RUN = $(BIN)/python train.py @recipes/weights.txt --data $(WIDER) $(SETS) --complete $(WIDER) \
	--val $(PHOTOS)/wider_dev.json --load-from $< --seed $(1) --out runs/$*-$(1) \
	$(if $(wildcard runs/$*-$(1)/last.pth),--resume) $(FLAGS)

# Half of each is the start, which knows other photos than WIDER's better.
runs/made/%.pth: runs/start/%.pth $(SETS)
	$(call RUN,0)
	$(call RUN,1)
	$(BIN)/python -m tools.average $< runs/$*-0/last.pth runs/$*-1/last.pth --shares 2 1 1 --out $@

runs/start/%.pth: .venv/installed
	mkdir -p runs/start
	git show $(BEFORE):weights/$*.pth > $@

# Width 1.0 begins as the shipped network, widened.
runs/start/face_ssd300_1.0.pth: weights/face_ssd300.pth .venv/installed
	$(BIN)/python -m tools.width $< 1.0 $@

runs/sets/%.json: .venv/installed
	$(BIN)/python -m tools.look --data $(PHOTOS)/$*.json --out runs/sets/$*.png --split 10 $@ runs/sets/$*-held-out.json

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

.PHONY: demo check test weights
.SECONDARY:
.DELETE_ON_ERROR:

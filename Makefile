# make demo     the shipped network on a photo, fine-tuned, exported, measured (tools.demo)
# make check    ruff and the quick tests, under a minute
# make test     all tests
# make weights PHOTOS=folder RELEASED=wider_face_tiny_ssd_075x.pth     runs/face_ssd300.pth, made as the
#              shipped one. FLAGS="--device cuda" and the like are handed on to train.py
# make weights-1.0 ... and weights-0.5 ...     the same at those widths
# Each makes .venv first and installs requirements.txt there. PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/python -m tools.demo

# WIDER's own photos, and nine parts in ten of each other set. Stopped, the same line goes on.
KINDS = masks_train_seen webcam_train_seen web_train plain_train negatives_train
SETS = $(KINDS:%=runs/sets/%.json)
WIDER = $(PHOTOS)/wider_train.json
# What the shipped networks start from and learn from is in the repository's history.
BEFORE = 5cf2940

TRAIN = $(BIN)/python train.py @recipes/weights.txt --data $(WIDER) $(SETS) --complete $(WIDER) \
	--val $(PHOTOS)/wider_dev.json --teacher $(RELEASED) runs/start-1.0.pth

# One more epoch at a tenth of the rate, whose weights alone are averaged. A share of the start forgets less.
LAST = --epochs 23 --ema 0.98

weights: $(SETS) runs/start.pth runs/start-1.0.pth
	$(TRAIN) --load-from runs/start.pth --out runs/weights $(if $(wildcard runs/weights/last.pth),--resume) $(FLAGS)
	$(TRAIN) --load-from runs/start.pth --out runs/weights --resume $(LAST) $(FLAGS)
	$(BIN)/python -m tools.average runs/weights/last.pth runs/start.pth --shares 19 1 --out runs/face_ssd300.pth

weights-%: $(SETS) runs/start-%.pth runs/start-1.0.pth
	$(TRAIN) --load-from runs/start-$*.pth --out runs/weights-$* \
		$(if $(wildcard runs/weights-$*/last.pth),--resume) $(FLAGS)
	$(TRAIN) --load-from runs/start-$*.pth --out runs/weights-$* --resume $(LAST) $(FLAGS)
	$(BIN)/python -m tools.average runs/weights-$*/last.pth runs/start-$*.pth --shares 19 1 --out runs/face_ssd300_$*.pth

runs/start.pth: .venv/installed
	mkdir -p runs
	git show $(BEFORE):weights/face_ssd300.pth > $@

runs/start-%.pth: .venv/installed
	mkdir -p runs
	git show $(BEFORE):weights/face_ssd300_$*.pth > $@

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

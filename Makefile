# make demo     the shipped network on a photo, fine-tuned, exported, measured (demo.py)
# make check    ruff and the quick tests, under a minute
# make test     all tests
# make weights START=checkpoint PHOTOS=folder     weights of the kind of weights/face_ssd300.pth, see its README.md.
#              FLAGS="--device cuda" and the like are handed on to train.py
# make weights-0.5 PHOTOS=folder     the shipped network at width 0.5 or any other, taught by it
# Each makes .venv first and installs requirements.txt there. PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/python -m tools.demo

# Nine parts in ten of each set; masks and webcam are shown twice.
KINDS = masks_train_seen webcam_train_seen web_train street_train everyday_train sport_train crowd_train plain_train
SETS = $(KINDS:%=runs/sets/%.json) runs/sets/masks_train_seen.json runs/sets/webcam_train_seen.json
NEGATIVES = runs/sets/negatives_train.json

TRAIN = $(BIN)/python train.py @recipes/weights.txt --load-from $(START) --data $(SETS) $(NEGATIVES) \
	--val $(PHOTOS)/masks_val_seen.json
ALIGNED = --seed 1 --matching aligned --class-loss cross-entropy --box-loss smooth-l1

# Two runs that differ in what they find best, and their mean. Stopped, the same line goes on.
weights: $(SETS) $(NEGATIVES)
	$(TRAIN) --out runs/quality $(if $(wildcard runs/quality/last.pth),--resume) $(FLAGS)
	$(TRAIN) $(ALIGNED) --out runs/aligned $(if $(wildcard runs/aligned/last.pth),--resume) $(FLAGS)
	$(BIN)/python checkpoints.py runs/quality/last.pth runs/aligned/last.pth --shares 2 1 --out runs/face_ssd300.pth

weights-%: $(SETS) $(NEGATIVES)
	$(BIN)/python train.py @recipes/weights.txt --load-from --width $* --data $(SETS) $(NEGATIVES) \
		--val $(PHOTOS)/masks_val_seen.json --batch-size 192 --lr 0.02 --ema 0.998 --epochs 40 --milestones 34 \
		--out runs/width-$* $(if $(wildcard runs/width-$*/last.pth),--resume) $(FLAGS)

runs/sets/%.json: .venv/installed
	$(BIN)/python data.py --data $(PHOTOS)/$*.json --out runs/sets/$*.png --split $(or $(PARTS),10) $@ runs/sets/$*-aside.json

$(NEGATIVES): PARTS = 2

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

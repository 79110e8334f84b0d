# make demo: the whole workflow on a drawn dataset, in minutes on two CPU cores. make test: the tests.
# make weights START=checkpoint PHOTOS=folder: how weights/face_ssd300.pth was made, see weights/README.md.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/python sample.py data/sample --train 800 --val 60
	rm -rf runs/demo
	$(BIN)/python train.py @recipes/demo.txt
	$(BIN)/python evaluate.py --data data/sample/val.json --model runs/demo/best.pth --face-sizes 0 19 30 60
	$(BIN)/python detect.py data/sample/val --model runs/demo/best.pth --out runs/demo/detections --grid runs/demo.png
	@echo "What it finds, drawn: runs/demo.png"

SEEDS = 1 2 3 4
NEGATIVES = runs/negatives.json
SETS = $(addprefix $(PHOTOS)/,masks_train.json masks_train.json webcam_train.json) $(NEGATIVES) $(NEGATIVES)

weights: $(SEEDS:%=weights-%)
	$(BIN)/python average.py $(SEEDS:%=runs/weights-%/last.pth) $(START) --shares 2 2 2 2 1 --out runs/face_ssd300.pth

$(SEEDS:%=weights-%): weights-%: $(NEGATIVES)
	$(BIN)/python train.py @recipes/weights.txt --load-from $(START) --data $(SETS) --val $(PHOTOS)/masks_val.json \
		--seed $* --out runs/weights-$*

$(NEGATIVES): .venv/installed
	$(BIN)/python data.py --data $(PHOTOS)/negatives_train.json --out runs/negatives.png --split 2 $@ runs/negatives-kept-out.json

test: .venv/installed-dev
	$(BIN)/python -m pytest -q

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo weights $(SEEDS:%=weights-%) test

# make demo: the whole workflow on a drawn dataset, in minutes on two CPU cores. make test: the tests.
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/python sample.py data/sample --train 800 --val 60
	rm -rf runs/demo
	$(BIN)/python train.py @recipes/demo.txt
	$(BIN)/python evaluate.py --data data/sample/val.json --model runs/demo/best.pth --face-sizes 0 19 30 60
	$(BIN)/python detect.py data/sample/val --model runs/demo/best.pth --out runs/demo/detections --grid runs/demo.png
	@echo "What it finds, drawn: runs/demo.png"

test: .venv/installed-dev
	$(BIN)/python -m pytest -q

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test

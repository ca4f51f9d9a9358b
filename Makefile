# Two commands for a newcomer: `make demo` and `make test`. Both set up what they need in .venv, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test wheel-test lint clean

$(VENV)/ready: pyproject.toml setup.py constraints-cpu.txt CMakeLists.txt $(wildcard kernels/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[train,openvino,kernels,line,dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/omniad demo --out demo

test: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The wheel alone, without torch, gives a verdict from the demo's bundle.
wheel-test: $(VENV)/ready demo/line.omniad
	rm -rf build/wheel build/clean && $(BIN)/python -m build --quiet --wheel --outdir build/wheel
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check build/wheel/*.whl
	cd build && clean/bin/python ../tests/wheel_verdict.py ../demo/line.omniad

demo/line.omniad:
	$(MAKE) demo

lint: $(VENV)/ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(VENV) build demo *.egg-info omniad_edge/*.so

# make demo   align the packaged model on this machine and write a report
# make test   lint, types and tests; make test-long: more whole runs
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
MODEL := .cache/models/smollm2-135m-instruct

.PHONY: demo test test-long lint model venv clean

venv: $(VENV)/.stamp

# Rebuilt only when the lock or the set-up itself changes.
$(VENV)/.stamp: requirements/cpu.lock scripts/setup_env.sh pyproject.toml
	PYTHON=$(PYTHON) bash scripts/setup_env.sh $(VENV)
	touch $@

$(MODEL)/config.json: | $(VENV)/.stamp
	$(BIN)/python -m pilaf_ray.assets --folder $(MODEL)

model: $(MODEL)/config.json

demo: venv model
	$(BIN)/pilaf-ray train configs/quickstart.yaml run.name=demo-$$(date +%Y%m%d-%H%M%S)

test: venv
	bash scripts/check $(BIN)

test-long: venv
	$(BIN)/python -m pytest -q --long -m long

lint: venv
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) .cache build *.egg-info

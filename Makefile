# Two commands do everything, installation included: `make demo` and `make test`.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
OUT ?= out

.PHONY: leaderboard studies demo test fast slow vllm-test rivals rivals-test cgroup cgroup-vm traces sample notebook gallery reference frontend clean

demo: $(VENV)/.installed  ## The main job: the built-in model under a quarter of its expert bytes.
	$(BIN)/foregate run reference --memory-budget 25% --max-new-tokens 96 --stats \
	  -p "Question: Natalia sold 48 clips in April and half as many in May. How many clips did she sell in all?"

test: $(VENV)/.installed  ## Every quick check: what CI runs.
	BIN=$(BIN) scripts/check

fast: $(VENV)/.installed  ## The tests alone.
	$(BIN)/pytest

slow: $(VENV)/.installed  ## The long tests (minutes).
	$(BIN)/pytest -m slow

cgroup: $(VENV)/.installed  ## Several gigabytes of experts, four times the budget, under a hard memory limit. Needs root.
	$(BIN)/python -m foregate.testing.cgroup_run --dir $(OUT)/large --gigabytes 4
	$(BIN)/python -m foregate.testing.cgroup_run --dir $(OUT)/large --gigabytes 4 --prompt-tokens 2048 --tokens 4

cgroup-vm: $(VENV)/.installed  ## The other kinds (v2, systemd-run) in a virtual machine (ten minutes). Needs root, qemu, mmdebstrap.
	scripts/cgroup-vm $(OUT)/cgroup-vm

traces: $(VENV)/.installed  ## Traces of the reference model, five domains (an hour; resumes). DATA=directory with gsm8k_test.jsonl, mmlu/
	$(BIN)/python -m foregate.trace.make_traces --data-dir $(DATA) --out $(OUT)/traces

sample: $(VENV)/.installed  ## The trace that ships, with timings (minutes; a quiet machine). Then: make notebook gallery. DATA as above
	$(BIN)/python -m foregate.trace.make_traces --sample --data-dir $(DATA) --out $(OUT)/sample-traces

notebook: $(VENV)/.installed  ## Run notebooks/routing_predictability.ipynb on the shipped trace and store its output.
	$(BIN)/python -m foregate.analysis.notebook notebooks/routing_predictability.ipynb

gallery: $(VENV)/.installed  ## The figures of docs/gallery.md, from the reference model. STEPS="name …" for some of them
	$(BIN)/python scripts/gallery.py $(STEPS)

leaderboard: $(VENV)/.installed  ## dev/LEADERBOARD.md: traces, every predictor trained and judged (an hour and a half; resumes). DATA=directory with gsm8k_test.jsonl
	$(BIN)/python -m foregate.evaluation.leaderboard $(if $(DATA),--data-dir $(DATA)) --out $(OUT)/leaderboard

studies: $(VENV)/.installed  ## docs/studies.md: the published tables and figures on our model (after leaderboard, whose traces it reads; resumes). DATA as there
	$(BIN)/python -m foregate.evaluation.studies $(if $(DATA),--data-dir $(DATA)) --leaderboard $(OUT)/leaderboard --out $(OUT)/studies

reference: $(VENV)/.installed  ## Train the reference model on (hours; resumes). DATA=directory with gsm8k_train.jsonl
	$(BIN)/foregate reference train --resume --data-dir $(DATA)

frontend:  ## Build the dashboard's page into the package. Needs Node; users of the package do not.
	cd frontend && npm ci --no-audit --no-fund && npm run check && npm run build

vllm-test: $(VENV)/.installed .venv-vllm/.installed  ## Real vLLM against transformers (minutes, 2 GB).
	$(BIN)/pytest -m vllm tests/test_vllm.py

rivals: .venv-rivals/.installed  ## llama.cpp (compiled here: ten minutes a core) and accelerate, for bench.

.PHONY: airllm
airllm: .venv-airllm/.installed  ## airllm, which wants transformers 4: an environment more.

rivals-test: $(VENV)/.installed rivals  ## What the rivals compute against transformers (minutes).
	$(BIN)/pytest -m rivals tests/test_rivals.py tests/test_bench.py

.venv-rivals/.installed: rivals-constraints.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-rivals
	CMAKE_ARGS="-DGGML_NATIVE=ON" .venv-rivals/bin/pip install -q --disable-pip-version-check \
	  -c constraints.txt -r rivals-constraints.txt -e ".[rivals]"
	touch $@

.venv-airllm/.installed: airllm-constraints.txt
	$(PYTHON) -m venv .venv-airllm
	.venv-airllm/bin/pip install -q --disable-pip-version-check -r airllm-constraints.txt
	touch $@

.venv-vllm/.installed: vllm-constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --disable-pip-version-check --no-deps -r vllm-constraints.txt
	.venv-vllm/bin/pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard src/foregate/native/*.c src/foregate/native/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(OUT) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

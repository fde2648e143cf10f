# make train     trains a byte-level language model on real text, from nothing
# make test      runs the tests of primitives, models, and one mixer of each primitive
# make rest      runs the other tests of the suite: of all mixers, and of what stands above and beside them
# make thorough  runs more tests than the suite has: of what it shows for one mixer of each primitive, the others; more cases
# make parity    compares with independent implementations (installs CPU torch, transformers, ...)
# make aot       compiles for TPUs and GPUs, without any, in an environment of its own (installs their compilers, 2.4 GB)
# make slurm     sweeps on a SLURM cluster of one node, which is started and stopped (installs Debian's packages; as root)
# make ray       sweeps on a Ray cluster of two nodes on this machine (an environment of its own)
# make harness   lm-evaluation-harness on checkpoints, without a network (an environment of its own)
# make hosts     runs of several processes on this machine, as on several hosts: killed, stopped, resumed in other numbers
# make cloud     runs on object stores that are emulated on this machine (an environment of its own)
# make lint      ruff

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
WORKDIR ?= runs/first

.PHONY: train test rest thorough parity aot slurm ray hosts harness cloud lint clean

# Large pages, which glibc takes from its environment only; the rest is in common/allocator.py.
train: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
train: $(VENV)/.installed
	$(BIN)/python train.py --config=configs/lm.py:mixer=rwkv4+local_attention,ngrams=6 --workdir=$(WORKDIR) $(ARGS)
	$(BIN)/python eval.py --workdir=$(WORKDIR) --sample="KING HENRY:" --length=400

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup --part=core $(ARGS)

rest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup --part=rest $(ARGS)

thorough: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "thorough and not slow" $(ARGS)

# The comparisons run what XLA makes by default; the other tests do without its fusion emitters (see tests/conftest.py).
parity: export FUSION_EMITTERS = 1
parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -n 2 -m parity tests/parity $(ARGS)

# In the environment above every start of JAX would look for a TPU.
aot: export FUSION_EMITTERS = 1
aot: $(VENV)-aot/.installed
	$(VENV)-aot/bin/python -m pytest -n 2 -m aot tests/compilation $(ARGS)

slurm: $(VENV)/.installed-dev
	command -v sbatch slurmctld slurmd munged >/dev/null || \
		DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -y -qq --no-install-recommends munge slurmctld slurmd slurm-client
	$(BIN)/python -m pytest -m slurm tests/sweeps $(ARGS)

ray: $(VENV)-ray/.installed
	$(VENV)-ray/bin/python -m pytest -m ray tests/sweeps $(ARGS)

harness: $(VENV)-harness/.installed
	$(VENV)-harness/bin/python -m pytest -m harness tests/evaluation $(ARGS)

cloud: $(VENV)-cloud/.installed
	$(VENV)-cloud/bin/python -m pytest -m cloud tests/training $(ARGS)

hosts: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m hosts tests/training $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)-aot/.installed: requirements-aot.txt requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(VENV)-aot
	$(VENV)-aot/bin/python -m pip install --quiet -r requirements-aot.txt
	touch $@

$(VENV)/.installed-parity: requirements-parity.txt $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet -r requirements-parity.txt
	touch $@

$(VENV)-ray/.installed: requirements-ray.txt requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(VENV)-ray
	$(VENV)-ray/bin/python -m pip install --quiet -r requirements-ray.txt
	touch $@

$(VENV)-harness/.installed: requirements-harness.txt requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(VENV)-harness
	$(VENV)-harness/bin/python -m pip install --quiet -r requirements-harness.txt
	touch $@

$(VENV)-cloud/.installed: requirements-cloud.txt requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(VENV)-cloud
	$(VENV)-cloud/bin/python -m pip install --quiet -r requirements-cloud.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-aot $(VENV)-ray $(VENV)-harness $(VENV)-cloud

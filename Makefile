# make demo: the three stages on the embedded default, two CPU ranks, and the table.  make test: the tests.
# make faults: runs that are killed, data that are damaged and servers that fail, for a quarter of an hour.
# All on the CPU, also where there are GPUs; make demo DS_ACCELERATOR=cuda RANKS=1 trains on one GPU.
PYTHON ?= python3
VENV := .venv
RANKS ?= 2
DS_ACCELERATOR ?= cpu
export DS_ACCELERATOR
# DeepSpeed compiles its CPU communication once; in the default place, two clones would overwrite each other's.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

.PHONY: demo test faults

# DS_SKIP_CUDA_CHECK: nothing is compiled for CUDA at install time, so the versions of compiler and torch may differ.
$(VENV)/installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	DS_SKIP_CUDA_CHECK=1 $(VENV)/bin/python -m pip install -q -e '.[test]'
	touch $@

demo: $(VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/deepspeed --num_gpus $(RANKS) \
		launchers/train.py --stage all --run_name demo --overwrite

test: $(VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m pytest tests -n 2 --dist loadfile

faults: $(VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python -m pytest tests -m faults -n 2 --dist loadfile

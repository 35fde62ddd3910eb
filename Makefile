SHELL := /bin/bash
PYTHON := .venv/bin/python
.PHONY: setup check test demo bench kernels wheel clean

setup: ## make .venv with everything that is needed
	@bash tools/setup.sh

check: setup ## style, types, generated header, spelling
	$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m mypy && $(PYTHON) tools/gen_events_h.py --check && $(PYTHON) tools/gen_man.py --check && $(PYTHON) tools/gen_calico_log.py --check && $(PYTHON) tools/gen_log_corpus.py --check && $(PYTHON) -m codespell_lib --skip './.*,./build,./tests/data' .

test: ## all tests; those of the pure core with full branch coverage
	@bash tools/setup.sh binutils gcc iproute2 nftables tshark
	@bash tools/test.sh

demo: setup ## the main job on the built-in lab
	@$(PYTHON) -W ignore tools/demo.py

bench: ## what the collectors cost, beside bpftrace
	@bash tools/setup.sh bpftrace bpftool
	@$(PYTHON) -W ignore tools/bench.py

kernels: ## the demo and the kernel and lab tests on a Debian release's own kernel, in a VM
	@bash tools/vm.sh $(or $(SUITE),bookworm) $(KERNEL)

wheel: setup ## build the wheel, install it elsewhere, find its BPF sources
	@bash tools/wheel.sh

clean: ## remove what was built
	rm -rf .venv build dist agent/*.egg-info

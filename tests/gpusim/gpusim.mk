# GPU code without a GPU; included by the Makefile.
.PHONY: gpu-figures kernel-report test-gpu

kernel-report: $(VENV)/.dev $(VENV)/.built  ## registers, spills, occupancy of every GPU kernel: baseline and docs page
	TRITON_INTERPRET=1 $(PY) -m tests.gpusim.static.report $(ARGS)

gpu-figures: $(VENV)/.dev $(VENV)/.built  ## without a GPU: executor speed, traffic, mutants, roofline model; docs page
	TRITON_INTERPRET=1 $(PY) -m bench.gpusim

test-gpu: $(VENV)/.dev $(VENV)/.built  ## on a machine with a GPU: tests, sanitizer and timings into one CSV
	$(PY) -m tests.gpusim.device.run $(ARGS)

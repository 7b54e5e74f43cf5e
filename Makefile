# Every target makes .venv by itself on the first call; later calls reuse it.
# Lists of dependency groups are in pyproject.toml; a stamp a list says that it is installed.

PYTHON := .venv/bin/python
JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
# Most of a short process is the compilation of small programs: they are kept too, and every process reads them.
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS
WORKERS ?= 2

.PHONY: demo test test-flower lint types docs examples bench bench-peers sweep clean

demo: .venv/.installed-demo
	.venv/bin/ergodica demo --out demo-output

test: .venv/.installed-test
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile

# Flower wants older versions of packages that ergodica has newer ones of, so it gets an environment of its own.
test-flower: .venv-flower/.installed
	.venv-flower/bin/python -m pytest -m 'slow or not slow' tests/integrations/test_flower*.py

sweep: .venv/.installed-test
	$(PYTHON) -m pytest -n $(WORKERS) -m 'slow or sweep' --timeout 3600

lint: .venv/.installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/lint-imports
	$(PYTHON) tools/check_sizes.py

types: .venv/.installed-dev
	.venv/bin/pyright

docs: .venv/.installed-dev
	rm -rf docs/reference/generated
	$(PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html

examples: .venv/.installed-demo
	for file in examples/*.py; do echo "== $$file" && $(PYTHON) $$file || exit 1; done

BENCHMARKS := step_time federated_step stream_memory stochasticity_study gradients_to_accuracy bayesian_networks pair_potential \
	federated_experiments elbo_gradients site_estimators stein_controls stein_gradients posterior_gradients learned_control_variates \
	discrete_latents mixture_labels semi_supervised fit_overhead flow_proposal path_gradients flow_training
bench: .venv/.installed-demo
	for name in $(BENCHMARKS); do echo "== $$name" && $(PYTHON) benchmarks/$$name.py || exit 1; done

# Laws that peers sample: BlackJAX here, SGMCMCJax and jax-sgmc in an environment of their own with an old JAX.
PEERS_DIRECTORY ?= .cache/peers
bench-peers: .venv/.installed-demo
	$(PYTHON) benchmarks/peers/blackjax_laws.py
	sh benchmarks/peers/old_environment.sh $(PEERS_DIRECTORY) $(PYTHON)

.venv/.installed-demo: pyproject.toml tools/bootstrap.sh
	sh tools/bootstrap.sh
	@touch $@

.venv/.installed-test: pyproject.toml tools/bootstrap.sh
	sh tools/bootstrap.sh test
	@touch $@ .venv/.installed-demo

.venv/.installed-dev: pyproject.toml tools/bootstrap.sh
	sh tools/bootstrap.sh dev
	@touch $@ .venv/.installed-test .venv/.installed-demo

.venv-flower/.installed: pyproject.toml tools/bootstrap.sh
	VENV=.venv-flower EXTRAS=flower sh tools/bootstrap.sh test
	@touch $@

clean:
	rm -rf .venv .venv-flower .cache docs/_build demo-output

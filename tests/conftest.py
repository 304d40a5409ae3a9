"""One thread for each of pytest-xdist's workers: with more, the threads of one spin on the cores of the others."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the programs that a test starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

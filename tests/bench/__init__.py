"""The promises of ``SECURITY.md`` as a bench for anyone: ``python -m tests.bench [--quick] [--rows R1,I3]``."""

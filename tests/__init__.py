import os

# Tests measure no speed and often share the machine: threads that wait should sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

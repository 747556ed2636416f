"""Measurements that anyone can repeat: ratios taken in one run, on random weights of real shapes."""

"""Writes ``expected/<family>.npz`` from transformers: ``python -m tests.zoo.make_expected [FAMILY ...]``.

Needs torch and transformers (``pip install localvlm[train]``); everything else in the repository reads the files.
"""

from __future__ import annotations

import argparse

import numpy as np

from tests.zoo import EXPECTED, FAMILIES, fingerprint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default all")
    args = parser.parse_args()
    import torch

    from tests.zoo.reference import expected

    torch.set_num_threads(1)
    EXPECTED.mkdir(exist_ok=True)
    for name in args.families or FAMILIES:
        arrays = expected(FAMILIES[name]) | {"fingerprint": fingerprint(FAMILIES[name].weights())}
        path = EXPECTED / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()

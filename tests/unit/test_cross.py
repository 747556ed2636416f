"""Guide and model of any two families: where the guide looks stays where it is; see :mod:`tests.cross`."""

from __future__ import annotations

from pathlib import Path

from localvlm.engine.client import Engine
from tests import cross, zoo


def test_quarters_of_a_picture_keep_their_mass_between_all_families(tmp_path: Path) -> None:
    sizes = cross.SIZES[2:3]
    with Engine() as engine:
        sights = {name: cross.look(engine, zoo.build(name, tmp_path), sizes) for name in zoo.FAMILIES}
    table = cross.worst(sights, sights, sizes)
    assert len(table) == len(zoo.FAMILIES) ** 2
    for model in zoo.FAMILIES:
        right, mirrored, twice = zip(*(found for (_, m), found in table.items() if m == model), strict=True)
        assert max(right) <= cross.BOUND < max(mirrored), model
        assert bool(max(twice) > cross.BOUND) is cross.overlapping(sights[model]), model

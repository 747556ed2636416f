"""How long an answer would take each way, and the quickest way that is allowed.

:mod:`shapes` counts what a VLM computes, :mod:`rates` holds what this machine takes for it, :mod:`sample` measures that
on the VLMs of :mod:`minis`, :mod:`memory` keeps it, :mod:`work` puts both together, :mod:`plans` compares the ways, and
:mod:`choice` does all of it for one question. Nothing here knows of terminals, and nothing runs the VLMs that are
asked.
"""

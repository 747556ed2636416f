"""Every method on the same questions: data, scores, a run that survives a kill, and how it is told.

Knows the pipeline and what lies below it; the command line alone knows of it.
"""

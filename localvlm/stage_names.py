"""What the stages of an answer are called while they run."""

__all__ = ["STAGE_NAMES"]

STAGE_NAMES = {
    "load": "loading",
    "guide_encode": "the guide looks",
    "guide_prefill": "the guide reads",
    "guide_decode": "the guide answers",
    "encode": "the model looks",
    "prefill": "the model reads",
    "decode": "the model answers",
}
"""By the names of :data:`localvlm.answers.STAGES`."""

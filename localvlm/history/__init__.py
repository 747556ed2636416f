"""Conversations that stay: one SQLite file of this user, which many processes may have open at once.

:class:`History` keeps, searches and removes them. What it is given is kept as it is, control characters and lone
surrogates too: whoever shows it makes it safe to show. Pictures are not kept, only where they were and the hash of
their pixels.
"""

from localvlm.history.records import STATUSES, ConversationSummary, StoredImage, StoredTurn
from localvlm.history.store import History, history_file, remove_history

__all__ = [
    "STATUSES",
    "ConversationSummary",
    "History",
    "StoredImage",
    "StoredTurn",
    "history_file",
    "remove_history",
]

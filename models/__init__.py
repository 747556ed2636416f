"""Models that ship with localvlm, and the scripts that made them."""

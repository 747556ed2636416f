"""``python -m localvlm``."""

from localvlm.cli.main import main

if __name__ == "__main__":
    main()

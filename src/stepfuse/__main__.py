"""``python -m stepfuse``."""

from stepfuse.engine.cli import main

if __name__ == "__main__":
    main()

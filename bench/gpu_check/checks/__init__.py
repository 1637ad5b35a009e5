"""One check a file, each with a ``CHECK``."""

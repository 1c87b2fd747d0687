"""One file for each row of the results table; ``get_config()`` gives its settings."""

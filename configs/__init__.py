"""The recommended recipe, one file for each network and number of bits; ``get_config()`` gives the settings."""

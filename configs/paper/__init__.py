"""The released settings, to the letter: one file for each network and number of bits."""

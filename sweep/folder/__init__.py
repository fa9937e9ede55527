"""Name every path of the sweep folder, and write its files whole."""

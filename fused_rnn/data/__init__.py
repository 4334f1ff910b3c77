"""Plain data that every room may read: what a cell is, which rows a time step has."""

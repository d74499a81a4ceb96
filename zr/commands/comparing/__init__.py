"""What `zr compare` is made of: plans, the running of their cells, what a cell's process does, results and report."""

"""The paper's models, data and runs, and the `lipdyn` command line."""

"""The threads of a trace: workers that run models and blocks, OpenMP's helpers, how one is ended."""

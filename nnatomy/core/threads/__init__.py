"""The threads of a trace: workers that run models and blocks, on which core they wake, OpenMP's helpers, how one is ended."""

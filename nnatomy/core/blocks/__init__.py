"""Several blocks on one forward pass: `Trace.invoke` and lasting edits, each with rows of its own of the joined batch."""

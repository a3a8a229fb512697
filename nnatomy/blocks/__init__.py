"""Several blocks on one pass: `tracer.invoke`, lasting edits, whose rows are whose, bodies taken out of their frames."""

"""What users of other libraries write, on models of this one: a room for each library, imported by its own name."""

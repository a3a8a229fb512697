"""`nnsight.intervention.tracing.util`."""

#: An exception in a block is not wrapped here: it arrives as it was raised, and any is one of these.
ExceptionWrapper = Exception

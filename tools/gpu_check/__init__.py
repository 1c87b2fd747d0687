"""What a machine without a GPU can know of the GPU programs: XLA's own GPU compiler, and what it made."""

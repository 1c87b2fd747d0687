"""What the package asks of the machine: devices, processes, signals, progress, memory, caches."""

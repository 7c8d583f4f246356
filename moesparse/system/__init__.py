"""The machine: files that survive a kill, memory, processes, devices."""

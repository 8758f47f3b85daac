"""What backs the store's numbers: size, fidelity, speed and memory, beside the alternatives.

`material.py` runs a real teacher once and writes a store of each kind; `formats.py` writes the same rows in other
formats; `fidelity.py` asks what decoded rows are worth to a student; `speed.py` and `memory.py` time and weigh reading.
"""

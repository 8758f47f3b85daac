"""Several processes as one: who they are, how a model is cut between them, how its tensors are put together again.

Reading order: processes.py, tensor_parallel.py, tensors.py. One process is the case where nothing is cut.
"""

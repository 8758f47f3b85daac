"""Store rows -> packed training batches: order, packing, the label shift and the numpy-to-torch border."""

"""The store: the contract between the phases. numpy, zarr, numcodecs and pyarrow only."""

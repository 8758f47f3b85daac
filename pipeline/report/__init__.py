"""Reports: one HTML file for a run or a comparison, with its curves and plots inside."""

"""What an online run has in place of a store: a tokenised corpus in memory, and a frozen teacher on each batch."""
